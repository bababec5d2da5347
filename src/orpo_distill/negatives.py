"""Who wrote which wrong traces: all sources of a run beside each other, problem after problem.

Two sources are only ever compared on problems for which both have enough negatives, with the first few of each by
sample index, so that neither gets the easier problems or more tries. Streams: memory holds numbers, and the texts of
the problems that are chosen to be scored.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError
from orpo_distill.judged import Judged, JudgedTraces
from orpo_distill.measures import diversity_of, paired_means
from orpo_distill.records import INITIAL, TEACHER, Outcome, Pair, Problem, derive_seed, read_jsonl

MEASURES = ("rouge_l", "distinct_2", "unique_answers", "words")


@dataclass(frozen=True, slots=True)
class Negative:
    """A wrong trace, as far as it is measured."""

    text: str
    answer: str | None
    cut: bool


@dataclass(frozen=True, slots=True)
class Chosen:
    """A problem that is chosen to be scored, with as many negatives of both sources."""

    key: int
    problem: Problem
    first: Sequence[Negative]
    second: Sequence[Negative]


@dataclass(frozen=True, slots=True)
class Rules:
    """How sources are compared: negatives a problem, problems to be scored, and the seed that chooses these."""

    traces: int
    scored: int
    seed: int


class Comparison:
    """Two sources' negatives for the same problems."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._values: list[tuple[Mapping[str, float | None], Mapping[str, float | None]]] = []
        self._chosen: list[Chosen] = []

    def add(self, problem: Problem, first: Sequence[Negative], second: Sequence[Negative]) -> None:
        """Take in a problem's negatives, if both sources have enough."""
        count = self._rules.traces
        if min(len(first), len(second)) < count:
            return
        first, second = first[:count], second[:count]
        both = [diversity_of([one.text for one in side], [one.answer for one in side]) for side in (first, second)]
        self._values.append((both[0], both[1]))
        key = derive_seed(self._rules.seed, "mechanisms", problem.id)
        self._chosen.append(Chosen(key, problem, first, second))
        if len(self._chosen) > 2 * self._rules.scored:
            self._chosen = self.chosen

    @property
    def problems(self) -> int:
        """How many problems both sources have enough negatives for."""
        return len(self._values)

    @property
    def chosen(self) -> list[Chosen]:
        """The problems to be scored: the same ones for every comparison, as far as it has them."""
        return heapq.nsmallest(self._rules.scored, self._chosen, key=lambda one: one.key)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every measure's paired means; none where there is no problem."""
        for measure in MEASURES:
            defined = [(a[measure], b[measure]) for a, b in self._values]
            values = [(a, b) for a, b in defined if a is not None and b is not None]
            if values:
                first, second = (list(side) for side in zip(*values, strict=True))
                yield {"measure": measure, "traces": self._rules.traces, **paired_means(first, second)}


@dataclass
class Tally:
    """What came of the samples of one source."""

    problems: int = 0
    dried_up: int = 0  # problems without a wrong trace
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    words: int = 0
    tokens: int = 0
    counted: int = 0  # samples whose tokens are known

    def add(self, samples: Sequence[Judged]) -> None:
        """Take in a problem's samples."""
        self.problems += bool(samples)
        self.dried_up += bool(samples) and all(sample.outcome is not Outcome.WRONG for sample in samples)
        self.outcomes.update(sample.outcome for sample in samples)
        self.words += sum(len(sample.text.split()) for sample in samples)
        self.tokens += sum(sample.trace.completion_tokens or 0 for sample in samples)
        self.counted += sum(sample.trace.completion_tokens is not None for sample in samples)

    def numbers(self) -> dict[str, Any]:
        """Plain data: counts, shares of the samples, mean lengths (`tokens` are the sampler's own)."""
        total = self.outcomes.total()
        return {
            "problems": self.problems,
            "dried_up": self.dried_up,
            "samples": total,
            **{outcome.value: self.outcomes[outcome] / total if total else None for outcome in Outcome},
            "words": self.words / total if total else None,
            "tokens": self.tokens / self.counted if self.counted else None,
        }


@dataclass
class Gathered:
    """What the negatives of a run came to. Sources are named by their stages."""

    samples: dict[str, Tally]
    initial: dict[str, Tally]  # by a latest student's stage: the initial student's same samples
    sources: dict[str, Comparison]  # by stage: its negatives against the initial student's
    trained_on: dict[int, Comparison]  # by round: the rejected sides of its pairs against those of round 1


def gather(inputs: Mapping[str, Path], rounds: Sequence[int], rules: Rules) -> Gathered:
    """Read all traces, verdicts and pairs once. `inputs` are folders of finished stages by name.

    `rounds` are those whose pairs are compared with round 1's. Raises DataError where files do not belong together.
    """
    names = [name for name in inputs if name in (TEACHER, INITIAL) or name.endswith("/student")]
    traces = {name: JudgedTraces(inputs[name], inputs[f"{name}-verdicts"]) for name in names}
    pairs = {number: _Rejected(inputs[f"round-{number}/pairs"]) for number in (1, *rounds)}
    others = [name for name in names if name != INITIAL] if INITIAL in names else []
    latest = [name for name in others if name != TEACHER]
    found = Gathered(
        {name: Tally() for name in names},
        {name: Tally() for name in latest},
        {name: Comparison(rules) for name in others},
        {number: Comparison(rules) for number in rounds},
    )
    for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem):
        samples = {name: stream.take(problem.id) for name, stream in traces.items()}
        rejected = {number: stream.take(problem.id) for number, stream in pairs.items()}
        for name, taken in samples.items():
            found.samples[name].add(taken)
        for name in latest:
            indices = {sample.trace.sample_index for sample in samples[name]}
            found.initial[name].add([one for one in samples[INITIAL] if one.trace.sample_index in indices])
        for name in others:
            found.sources[name].add(problem, _negatives(samples[name]), _negatives(samples[INITIAL]))
        answers = {one.trace.id: one.answer for taken in samples.values() for one in taken}
        for number in rounds:
            found.trained_on[number].add(problem, *(_trained_on(rejected[n], answers) for n in (number, 1)))
    for stream in traces.values():
        stream.finish()
    for made in pairs.values():
        made.finish()
    return found


def _negatives(samples: Sequence[Judged]) -> list[Negative]:
    return [Negative(one.text, one.answer, one.cut) for one in samples if one.outcome is Outcome.WRONG]


def _trained_on(pairs: Sequence[Pair], answers: Mapping[str, str | None]) -> list[Negative]:
    return [Negative(pair.rejected, answers.get(pair.rejected_id), pair.rejected_cut) for pair in pairs]


class _Rejected:
    """The pairs of a round with different rejected traces, read as a stream, one problem after another."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "pairs.jsonl"
        self._groups = itertools.groupby(read_jsonl(self._path, Pair), key=lambda pair: pair.problem_id)
        self._next = self._read()

    def _read(self) -> tuple[str, list[Pair]] | None:
        for problem_id, pairs in self._groups:
            return problem_id, list(pairs)
        return None

    def take(self, problem_id: str) -> list[Pair]:
        """One pair for each rejected trace of the next problem; none if the next ones belong to another problem."""
        if self._next is None or self._next[0] != problem_id:
            return []
        pairs = {pair.rejected_id: pair for pair in self._next[1] if pair.rejected_id}
        self._next = self._read()
        return list(pairs.values())

    def finish(self) -> None:
        """Raises DataError if pairs are left."""
        if self._next is not None:
            raise DataError(
                f"{self._path}: expected pairs of the problems in problems.jsonl, in their order, found some of "
                f"problem {self._next[0]!r}; make the pairs again"
            )
