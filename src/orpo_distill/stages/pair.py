"""Pair: verified traces become training rows.

Chosen: the teacher's correct, whole traces. Rejected: traces that state a wrong answer, from the latest or the initial
student as the coin of `mixing` says (or the teacher's own). Each side is filtered by length in the student's tokens,
then by diversity; what is left is paired. Every problem and trace that falls out is a line of `dropped.jsonl`.

All files are in the order of the problems, so they are joined as streams: memory holds one block of problems.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, SerializeAsAny

from orpo_distill.config import PairsSection
from orpo_distill.diversity import diverse
from orpo_distill.errors import DataError
from orpo_distill.groups import most_tokens, token_counts
from orpo_distill.judged import Judged, JudgedTraces
from orpo_distill.mixing import Phi, latest_share
from orpo_distill.progress import progress
from orpo_distill.records import (
    Message,
    Outcome,
    Pair,
    Problem,
    atomic_file,
    derive_seed,
    read_jsonl,
    to_json,
)
from orpo_distill.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")

BLOCK = 256  # problems whose texts are tokenised together


class PairOptions(PairsSection):
    """The section `pairs` with phi at its value for one round, and what else making that round's pairs takes."""

    phi: Phi
    task: SerializeAsAny[Task]
    round: PositiveInt
    seed: int
    samples: PositiveInt  # the student's K
    tokenizer: str  # the student's model
    trust_remote_code: bool = False
    max_length: PositiveInt  # tokens of prompt, response and end of sequence together
    needs_rejected: bool = True  # False: a row for every chosen trace, no negatives are read


@dataclass(frozen=True, slots=True)
class Dropped:
    """A trace that no pair uses, or a problem that gives no pair (then `trace_id` is empty)."""

    problem_id: str
    trace_id: str
    side: Literal["chosen", "rejected", "problem"]
    reason: str


@dataclass(frozen=True, slots=True)
class _Case:
    """One problem with the traces that may stand on either side."""

    problem: Problem
    prompt: tuple[Message, ...]
    chosen: Sequence[Judged]
    latest: Sequence[Judged]  # what the coin gave to the latest student
    others: Sequence[Judged]  # the rest of the rejected side's pool
    stand_ins: Sequence[Judged]  # join the pool if no trace of `latest` is usable


@dataclass
class _Tally:
    """What the report says of a round's pairs."""

    problems: int = 0
    paired_problems: int = 0
    pairs: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # side -> traces that passed every filter
    used: Counter[str] = field(default_factory=Counter)  # side -> traces that stand in a pair
    policies: Counter[str] = field(default_factory=Counter)  # rejected policy -> pairs
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # (side, reason) -> count
    sent_to_latest: int = 0  # problems
    fell_back: int = 0  # problems

    def add(self, pairs: Sequence[Pair], dropped: Sequence[Dropped]) -> None:
        """Count what one problem gave."""
        self.problems += 1
        self.paired_problems += bool(pairs)
        self.pairs += len(pairs)
        self.used["chosen"] += len({row.chosen_id for row in pairs})
        self.used["rejected"] += len({row.rejected_id for row in pairs if row.rejected_id})
        self.policies.update(row.rejected_policy for row in pairs if row.rejected_policy)
        self.dropped.update((drop.side, drop.reason) for drop in dropped)

    def reasons(self, side: str) -> dict[str, int]:
        """Why things fell out on a side, most frequent first."""
        return {reason: count for (where, reason), count in self.dropped.most_common() if where == side}

    def metrics(self) -> dict[str, Any]:
        """Plain data. Shares are None where there is nothing to divide by."""
        return {
            "pairs": self.pairs,
            "problems": self.problems,
            "paired_problems": self.paired_problems,
            "pairs_per_problem": _share(self.pairs, self.paired_problems),
            "used": {side: self.used[side] for side in SIDES},
            "dropped": {side: self.reasons(side) for side in ("problem", *SIDES)},
            "rejected_policies": {policy: n / self.pairs for policy, n in sorted(self.policies.items())},
            "sent_to_latest": self.sent_to_latest,
            "fell_back": self.fell_back,
            "fell_back_share": _share(self.fell_back, self.sent_to_latest),
        }


def pair(options: PairOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `pairs.jsonl` (problem order, then chosen and rejected sample index) and `dropped.jsonl`.

    Inputs: `problems`, `teacher`, `teacher-verdicts`; `initial` and `latest`, each with its verdicts, where negatives
    come from them. Raises DataError if the files do not belong together, or leave nothing to train on.
    """
    tally = _Tally()
    problems = inputs["problems"] / "problems.jsonl"
    with problems.open("rb") as lines:
        total = sum(1 for _ in lines)
    if not total:
        raise DataError(f"expected problems in {problems}, found none; check the task's train split")
    tokenizer = _load_tokenizer(options)
    cases = _cases(options, inputs)
    with (
        atomic_file(out / "pairs.jsonl") as pair_file,
        atomic_file(out / "dropped.jsonl") as dropped_file,
        progress("pairs", total) as advance,
    ):
        while block := list(islice(cases, BLOCK)):
            rooms = [options.max_length - tokens - 1 for tokens in _prompt_tokens(tokenizer, block)]  # 1: its end
            sieves = [_Sieve(options, case, room) for case, room in zip(block, rooms, strict=True)]
            counts = token_counts(tokenizer, (text for sieve in sieves for text in sieve.uncounted()))
            for sieve in sieves:
                pairs, dropped = _pair_case(options, sieve, counts, tally)
                pair_file.writelines((to_json(row) + "\n").encode() for row in pairs)
                dropped_file.writelines((to_json(row) + "\n").encode() for row in dropped)
            advance(len(block))
    _check(options, tally)
    return tally.metrics()


def _load_tokenizer(options: PairOptions) -> PreTrainedTokenizerBase:
    from orpo_distill.models import load_tokenizer

    return load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, block: Sequence[_Case]) -> list[int]:
    from orpo_distill.samplers.prompts import encode_prompts

    return [len(tokens) for tokens in encode_prompts(tokenizer, [case.prompt for case in block])]


def _cases(options: PairOptions, inputs: Mapping[str, Path]) -> Iterator[_Case]:
    streams = {
        name: JudgedTraces(inputs[name], inputs[f"{name}-verdicts"])
        for name in ("teacher", "initial", "latest")
        if name in inputs
    }
    for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem):
        sampled = {name: stream.take(problem.id) for name, stream in streams.items()}
        prompt = options.task.messages(problem)
        case = _Case(problem, prompt, sampled["teacher"], (), (), ())
        yield _with_negatives(options, case, sampled)
    for stream in streams.values():
        stream.finish()


def _with_negatives(options: PairOptions, case: _Case, sampled: Mapping[str, Sequence[Judged]]) -> _Case:
    if not options.needs_rejected:
        return case
    if options.negatives_from == "teacher":
        return replace(case, others=sampled["teacher"])
    problem_id, samples = case.problem.id, options.samples
    first = 0
    if options.round > 1:
        first = latest_share(options.phi, options.phi_unit, options.seed, options.round, problem_id, samples)
    stand_in = first if options.on_empty == "initial" else 0
    return replace(
        case,
        latest=_indices(sampled, "latest", problem_id, range(first)),
        others=_indices(sampled, "initial", problem_id, range(first, samples)),
        stand_ins=_indices(sampled, "initial", problem_id, range(stand_in)),
    )


def _indices(sampled: Mapping[str, Sequence[Judged]], name: str, problem_id: str, indices: range) -> Sequence[Judged]:
    """The traces with these sample indices. Raises DataError if one is missing: it was never sampled."""
    if not indices:
        return ()
    found = [sample for sample in sampled[name] if sample.trace.sample_index in indices]
    if len(found) != len(indices):
        raise DataError(
            f"expected {len(indices)} traces of problem {problem_id!r} from the {name} student, found {len(found)}; "
            "sample it again with this seed, phi and number of samples"
        )
    return found


def _fault(sample: Judged, side: Side) -> str:
    """Why a trace cannot stand on its side whatever its length; "" if it can."""
    if sample.outcome is not (Outcome.CORRECT if side == "chosen" else Outcome.WRONG):
        return sample.outcome.value
    return "truncated" if side == "chosen" and sample.cut else ""


class _Sieve:
    """Filters the traces of one case, for whose responses `room` tokens are left, and remembers what fell through."""

    def __init__(self, options: PairOptions, case: _Case, room: int) -> None:
        self.case, self.room = case, room
        self.longest = min(room, options.max_response_tokens or room)
        self.dropped: list[Dropped] = []
        self.counts: Mapping[str, int] = {}  # tokens of the texts that are `uncounted`
        self._options = options

    def uncounted(self) -> Iterator[str]:
        """The texts whose tokens must be counted to know whether they fit.

        Short ones do in any case, see `groups.most_tokens`.
        """
        case, surely = self.case, self.longest if self._options.min_response_tokens == 1 else 0
        pool = (*case.latest, *case.others, *case.stand_ins)
        for side, samples in zip(SIDES, (case.chosen, pool), strict=True):
            for sample in samples:
                if not _fault(sample, side) and not 0 < most_tokens(sample.text) <= surely:
                    yield sample.text

    def keep(self, samples: Sequence[Judged], side: Side, reasons: Iterable[str]) -> list[Judged]:
        """The samples whose reason is ""; the others are dropped for theirs."""
        kept = []
        for sample, reason in zip(samples, reasons, strict=True):
            if reason:
                self.dropped.append(Dropped(self.case.problem.id, sample.trace.id, side, reason))
            else:
                kept.append(sample)
        return kept

    def drop_unpaired(self, samples: Sequence[Judged], side: Side, used: set[int]) -> None:
        """Give a reason to kept samples that no pair uses."""
        self.keep(samples, side, ("" if index in used else "unpaired" for index in range(len(samples))))

    def usable(self, samples: Sequence[Judged], side: Side) -> list[Judged]:
        """Those with the right outcome and length."""
        return self.keep(samples, side, (_fault(sample, side) or self._length_fault(sample) for sample in samples))

    def diverse(self, samples: Sequence[Judged], side: Side) -> list[Judged]:
        """Those that are unlike the ones kept before."""
        return self.keep(samples, side, diverse([sample.text for sample in samples], self._options.rouge_l_max))

    def chosen(self) -> list[Judged]:
        """The chosen side: at most `max_chosen`, in sample order."""
        kept = self.diverse(self.usable(self.case.chosen, "chosen"), "chosen")
        most = self._options.max_chosen or len(kept)
        return self.keep(kept, "chosen", ("" if index < most else "over_max_chosen" for index in range(len(kept))))

    def rejected(self) -> tuple[list[Judged], bool]:
        """The rejected side, in order of sample index, and whether initial traces stood in for the latest's."""
        latest = self.usable(self.case.latest, "rejected")
        fell_back = bool(self.case.stand_ins) and not latest
        pool = [*(self.case.stand_ins if fell_back else ()), *self.case.others]
        return self.diverse([*latest, *self.usable(pool, "rejected")], "rejected"), fell_back

    def _length_fault(self, sample: Judged) -> str:
        tokens = self.counts.get(sample.text, 1)  # one that was not counted fits
        if tokens < self._options.min_response_tokens:
            return "too_short"
        return "too_long" if tokens > self.longest else ""


def pair_indices(
    pairing: Literal["cycle", "product", "random"], chosen: int, rejected: int, most: int, seed: int
) -> list[tuple[int, int]]:
    """Which of a problem's chosen and rejected traces (by number) stand in a pair: at most `most` pairs, sorted.

    `cycle` goes through both sides at once and repeats the shorter one until the longer is used up; `product` takes
    all combinations; `random` one partner for each chosen trace. Where there are more than `most`, the seed decides
    which stay, and as many chosen traces as possible keep a pair. Off-policy rounds thus repeat the same pairs.
    """
    if not chosen or not rejected:
        return []
    coin = random.Random(seed)
    if pairing == "cycle":
        found = [(i % chosen, i % rejected) for i in range(max(chosen, rejected))]
    elif pairing == "product":
        found = [(c, r) for c in range(chosen) for r in range(rejected)]
    else:
        found = [(c, coin.randrange(rejected)) for c in range(chosen)]
    if len(found) > most:
        coin.shuffle(found)
        first = {c: (c, r) for c, r in found}
        covering = set(first.values())
        found = [*first.values(), *(both for both in found if both not in covering)][:most]
    return sorted(found)


def _pair_case(
    options: PairOptions, sieve: _Sieve, counts: Mapping[str, int], tally: _Tally
) -> tuple[list[Pair], list[Dropped]]:
    """The pairs of one problem, and what fell out of it. Counts both."""
    case, sieve.counts = sieve.case, counts
    chosen = sieve.chosen()
    rejected, fell_back = sieve.rejected()
    sides = len(chosen), len(rejected) if options.needs_rejected else 1
    seed = derive_seed(options.seed, "pair", case.problem.id)
    indices = pair_indices(options.pairing, *sides, options.per_problem, seed)
    sieve.drop_unpaired(chosen, "chosen", {c for c, _ in indices})
    sieve.drop_unpaired(rejected, "rejected", {r for _, r in indices})
    if not indices:
        reason = "prompt_too_long" if sieve.room < 1 else "no_rejected" if chosen else "no_chosen"
        sieve.dropped.append(Dropped(case.problem.id, "", "problem", reason))
    pairs = [_make(case, chosen[c], rejected[r] if options.needs_rejected else None) for c, r in indices]
    tally.add(pairs, sieve.dropped)
    tally.kept.update(chosen=len(chosen), rejected=len(rejected))
    tally.sent_to_latest += bool(case.latest)
    tally.fell_back += fell_back
    return pairs, sieve.dropped


def _make(case: _Case, chosen: Judged, rejected: Judged | None) -> Pair:
    return Pair(
        problem_id=case.problem.id,
        prompt=case.prompt,
        chosen=chosen.text,
        rejected=rejected.text if rejected else "",
        chosen_id=chosen.trace.id,
        rejected_id=rejected.trace.id if rejected else "",
        chosen_policy=chosen.trace.policy,
        rejected_policy=rejected.trace.policy if rejected else "",
        rejected_cut=rejected is not None and rejected.cut,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


_ADVICE = {
    "wrong": "use a stronger {role} or easier problems",
    "correct": "use harder problems, or `objective: sft`, which needs no wrong traces",
    "unparseable": "ask for the answer's format in the task's prompt, or check that the verifier fits the task",
    "ambiguous": "ask for one answer in the task's prompt, or check that the verifier fits the task",
    "truncated": "raise {role}.decoding.max_new_tokens",
    "failed": "read `error` in the {role}'s traces.jsonl and `reason` in its verdicts.jsonl",
    "too_long": "raise train.max_length or pairs.max_response_tokens",
    "too_short": "lower pairs.min_response_tokens",
}


def _check(options: PairOptions, tally: _Tally) -> None:
    """Raises DataError, with the commonest reason and its remedy, if no pair was made."""
    if tally.pairs:
        return
    if tally.dropped["problem", "prompt_too_long"] == tally.problems:
        raise DataError(
            f"expected prompts shorter than train.max_length ({options.max_length} tokens), found that all "
            f"{tally.problems} are longer; raise train.max_length"
        )
    negatives = options.negatives_from
    for side, role, kind in (("chosen", "teacher", "correct teacher"), ("rejected", negatives, f"wrong {negatives}")):
        if not tally.kept[side]:
            reasons = tally.reasons(side)
            found = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no traces"
            advice = _ADVICE.get(next(iter(reasons), ""), "sample again").format(role=role)
            raise DataError(f"expected a {kind} trace that can be trained on, found none ({found}); {advice}")
    missing = ", ".join(f"{count} {reason}" for reason, count in tally.reasons("problem").items())
    raise DataError(
        f"expected a problem with both a correct teacher trace and a wrong {negatives} trace, found none among "
        f"{tally.problems} ({missing}); sample more problems or more traces a problem"
    )
