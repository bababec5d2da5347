"""Pair: verified traces become training rows.

Chosen: the teacher's correct, whole traces. Rejected: traces that state a wrong answer, from the latest or the initial
student as the coin of `mixing` says (or the teacher's own). Each side is filtered by length in the student's tokens,
then by diversity; what is left is paired. Every problem and trace that falls out is a line of `dropped.jsonl`.

All files are in the order of the problems, so they are joined as streams: memory holds one block of problems.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, SerializeAsAny

from orpo_distill.config import PairsSection
from orpo_distill.errors import DataError
from orpo_distill.groups import token_counts
from orpo_distill.judged import Judged, JudgedTraces
from orpo_distill.mixing import Phi, latest_share, phi_in_force
from orpo_distill.progress import progress
from orpo_distill.records import (
    Pair,
    Problem,
    atomic_file,
    derive_seed,
    read_jsonl,
    to_json,
)
from orpo_distill.stages.sieve import SIDES, Case, Dropped, Sieve
from orpo_distill.statistics import share
from orpo_distill.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 256  # problems whose texts are tokenised together


class PairOptions(PairsSection):
    """The section `pairs` with phi at its value for one round, and what else making that round's pairs takes."""

    phi: Phi | None  # type: ignore[assignment]  # None: as the stage inputs["phi"] has found
    task: SerializeAsAny[Task]
    round: PositiveInt
    seed: int
    samples: PositiveInt  # the student's K
    tokenizer: str  # the student's model
    trust_remote_code: bool = False
    max_length: PositiveInt  # tokens of prompt, response and end of sequence together
    needs_rejected: bool = True  # False: a row for every chosen trace, no negatives are read


@dataclass
class Tally:
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
            "pairs_per_problem": share(self.pairs, self.paired_problems),
            "used": {side: self.used[side] for side in SIDES},
            "dropped": {side: self.reasons(side) for side in ("problem", *SIDES)},
            "rejected_policies": {policy: n / self.pairs for policy, n in sorted(self.policies.items())},
            "sent_to_latest": self.sent_to_latest,
            "fell_back": self.fell_back,
            "fell_back_share": share(self.fell_back, self.sent_to_latest),
        }


def pair(options: PairOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `pairs.jsonl` (problem order, then chosen and rejected sample index) and `dropped.jsonl`.

    Inputs: `problems`, `teacher`, `teacher-verdicts`; `initial` and `latest`, each with its verdicts, where negatives
    come from them. Raises DataError if the files do not belong together, or leave nothing to train on.
    """
    tally = Tally()
    problems = inputs["problems"] / "problems.jsonl"
    with problems.open("rb") as lines:
        total = sum(1 for _ in lines)
    if not total:
        raise DataError(f"expected problems in {problems}, found none; check the task's train split")
    tokenizer = _load_tokenizer(options)
    phi = phi_in_force(options.phi, inputs)
    cases = _cases(options, phi, inputs)
    with (
        atomic_file(out / "pairs.jsonl") as pair_file,
        atomic_file(out / "dropped.jsonl") as dropped_file,
        progress("pairs", total) as advance,
    ):
        while block := list(islice(cases, BLOCK)):
            rooms = [options.max_length - tokens - 1 for tokens in _prompt_tokens(tokenizer, block)]  # 1: its end
            sieves = [Sieve(options, case, room) for case, room in zip(block, rooms, strict=True)]
            counts = token_counts(tokenizer, (text for sieve in sieves for text in sieve.uncounted()))
            for sieve in sieves:
                pairs, dropped = _pair_case(options, sieve, counts, tally)
                pair_file.writelines((to_json(row) + "\n").encode() for row in pairs)
                dropped_file.writelines((to_json(row) + "\n").encode() for row in dropped)
            advance(len(block))
    _check(options, tally)
    return tally.metrics() | ({"phi": phi} if "initial" in inputs else {})


def _load_tokenizer(options: PairOptions) -> PreTrainedTokenizerBase:
    from orpo_distill.models import load_tokenizer

    return load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, block: Sequence[Case]) -> list[int]:
    from orpo_distill.samplers.prompts import encode_prompts

    return [len(tokens) for tokens in encode_prompts(tokenizer, [case.prompt for case in block])]


def _cases(options: PairOptions, phi: float, inputs: Mapping[str, Path]) -> Iterator[Case]:
    streams = {
        name: JudgedTraces(inputs[name], inputs[f"{name}-verdicts"])
        for name in ("teacher", "initial", "latest")
        if name in inputs
    }
    for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem):
        sampled = {name: stream.take(problem.id) for name, stream in streams.items()}
        prompt = options.task.messages(problem)
        if options.traces is not None:
            sampled["teacher"] = [each for each in sampled["teacher"] if each.trace.sample_index < options.traces]
        case = Case(problem, prompt, sampled["teacher"], (), (), ())
        yield _with_negatives(options, phi, case, sampled)
    for stream in streams.values():
        stream.finish()


def _with_negatives(options: PairOptions, phi: float, case: Case, sampled: Mapping[str, Sequence[Judged]]) -> Case:
    if not options.needs_rejected:
        return case
    problem_id, samples = case.problem.id, options.samples
    if options.negatives_from == "teacher":
        match = _indices(sampled, "initial", problem_id, range(samples)) if options.matched else None
        return replace(case, others=sampled["teacher"], match=match)
    first = 0
    if options.round > 1:
        first = latest_share(phi, options.phi_unit, options.seed, options.round, problem_id, samples)
    stand_in = first if options.on_empty == "initial" else 0
    return replace(
        case,
        latest=_indices(sampled, "latest", problem_id, range(first)),
        others=_indices(sampled, "initial", problem_id, range(first, samples)),
        stand_ins=_indices(sampled, "initial", problem_id, range(stand_in)),
        match=sampled["teacher"] if options.matched else None,
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
    options: PairOptions, sieve: Sieve, counts: Mapping[str, int], tally: Tally
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


def _make(case: Case, chosen: Judged, rejected: Judged | None) -> Pair:
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
_EMPTY = "see why its texts are empty: look at the {role}'s chat template and decoding.stop"


def _check(options: PairOptions, tally: Tally) -> None:
    """Raises DataError, with the commonest reason and its remedy, if no pair was made."""
    if tally.pairs:
        return
    if tally.dropped["problem", "prompt_too_long"] == tally.problems:
        raise DataError(
            f"expected prompts shorter than train.max_length ({options.max_length} tokens), found that all "
            f"{tally.problems} are longer; raise train.max_length"
        )
    negatives, by_role = options.negatives_from, options.task.open_ended
    advices = {**_ADVICE, "unparseable": _EMPTY} if by_role else _ADVICE
    right, wrong = ("teacher", negatives) if by_role else ("correct teacher", f"wrong {negatives}")
    for side, role, kind in (("chosen", "teacher", right), ("rejected", negatives, wrong)):
        if not tally.kept[side]:
            reasons = tally.reasons(side)
            found = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no traces"
            advice = advices.get(next(iter(reasons), ""), "sample again").format(role=role)
            raise DataError(f"expected a {kind} trace that can be trained on, found none ({found}); {advice}")
    missing = ", ".join(f"{count} {reason}" for reason, count in tally.reasons("problem").items())
    raise DataError(
        f"expected a problem with both a {right} trace and a {wrong} trace, found none among "
        f"{tally.problems} ({missing}); sample more problems or more traces a problem"
    )
