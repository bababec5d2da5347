"""What a run's traces and pairs add up to. Read as streams: memory holds counts, never texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from orpo_distill.page.files import Row, RunFiles, Source, judged, whole_rows
from orpo_distill.records import FinishReason, Outcome, Pair, read_jsonl

OUTCOMES = [outcome.value for outcome in Outcome]
UNJUDGED = "not judged yet"


@dataclass
class Lengths:
    """Lengths of texts: in words, and in tokens as the sampler counted them (where it could tell)."""

    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, text: str, tokens: int | None = None) -> None:
        """Count a text."""
        self.words.append(len(text.split()))
        if tokens is not None:
            self.tokens.append(tokens)


@dataclass
class Measured:
    """The traces of one stage."""

    source: Source
    traces: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # at max_new_tokens, whether or not they had stated an answer
    problems: Counter[str] = field(default_factory=Counter)  # id -> traces
    solved: set[str] = field(default_factory=set)  # ids of problems with a correct trace
    lengths: Lengths = field(default_factory=Lengths)
    prompt_tokens: int = 0

    @property
    def parsed(self) -> float | None:
        """Share of the judged traces that state an answer, right or wrong."""
        judged_traces = self.traces - self.outcomes[UNJUDGED]
        stated = self.outcomes[Outcome.CORRECT] + self.outcomes[Outcome.WRONG]
        return stated / judged_traces if judged_traces else None

    def share(self, outcome: str) -> float | None:
        """Share of all traces with this outcome."""
        return self.outcomes[outcome] / self.traces if self.traces else None


def measure(source: Source) -> Measured:
    """Read a stage's traces once. Raises DataError if they are damaged."""
    found = Measured(source)
    for trace, verdict in judged(source):
        found.traces += 1
        found.outcomes[verdict.outcome.value if verdict else UNJUDGED] += 1
        found.cut += trace.finish_reason is FinishReason.LENGTH
        found.problems[trace.problem_id] += 1
        if verdict and verdict.correct:
            found.solved.add(trace.problem_id)
        if trace.finish_reason is not FinishReason.ERROR:
            found.lengths.add(trace.text, trace.completion_tokens)
        found.prompt_tokens += trace.prompt_tokens or 0
    return found


@dataclass
class Paired:
    """The pairs of one round, and what fell out on the way to them."""

    round: int
    metrics: Row
    problems: int
    solved: int  # problems with a correct teacher trace
    contrasted: int | None  # of these, with a wrong trace for the other side; None where none is needed
    paired: int
    dropped: dict[str, Counter[str]]  # side -> reason -> count
    chosen: Lengths
    rejected: Lengths


def pairings(files: RunFiles, teacher: Measured | None) -> list[Paired]:
    """Every round whose pairs are finished."""
    return [
        _paired(files, number, teacher)
        for number in files.rounds
        if (files.path / f"round-{number}" / "pairs" / "pairs.jsonl").exists()
    ]


def _paired(files: RunFiles, number: int, teacher: Measured | None) -> Paired:
    folder = files.path / f"round-{number}" / "pairs"
    paired: set[str] = set()
    chosen, rejected = Lengths(), Lengths()
    for pair in read_jsonl(folder / "pairs.jsonl", Pair):
        paired.add(pair.problem_id)
        chosen.add(pair.chosen)
        if pair.rejected_id:
            rejected.add(pair.rejected)
    dropped: dict[str, Counter[str]] = {"problem": Counter(), "chosen": Counter(), "rejected": Counter()}
    wrong = set(paired)
    for row in whole_rows(folder / "dropped.jsonl"):
        side, reason = str(row.get("side")), str(row.get("reason"))
        dropped.setdefault(side, Counter())[reason] += 1
        if side == "rejected" and reason not in OUTCOMES:  # it was wrong, and fell out later
            wrong.add(str(row.get("problem_id")))
    solved = (teacher.solved if teacher else set()) | paired
    metrics = files.metrics(f"round-{number}/pairs")
    problems = metrics.get("problems") or len(paired) + dropped["problem"].total()
    contrasted = len(solved & wrong) if rejected.words or dropped["rejected"] else None
    return Paired(number, metrics, int(problems), len(solved), contrasted, len(paired), dropped, chosen, rejected)


def mean(values: Sequence[float]) -> float | None:
    """None for no values."""
    return fmean(values) if values else None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of them lie (nearest rank); None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
