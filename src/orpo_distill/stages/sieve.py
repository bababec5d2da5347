"""Sieve: which of a problem's traces may stand on either side of a pair, and why the others may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orpo_distill.config import PairsSection
from orpo_distill.diversity import diverse
from orpo_distill.groups import most_tokens
from orpo_distill.judged import Judged
from orpo_distill.records import Message, Outcome, Problem

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A trace that no pair uses, or a problem that gives no pair (then `trace_id` is empty)."""

    problem_id: str
    trace_id: str
    side: Literal["chosen", "rejected", "problem"]
    reason: str


@dataclass(frozen=True, slots=True)
class Case:
    """One problem with the traces that may stand on either side."""

    problem: Problem
    prompt: tuple[Message, ...]
    chosen: Sequence[Judged]
    latest: Sequence[Judged]  # what the coin gave to the latest student
    others: Sequence[Judged]  # the rest of the rejected side's pool
    stand_ins: Sequence[Judged]  # join the pool if no trace of `latest` is usable
    match: Sequence[Judged] | None = None  # there are no more rejected traces than usable ones among these


def _fault(sample: Judged, side: Side) -> str:
    """Why a trace cannot stand on its side whatever its length; "" if it can."""
    if sample.outcome is not (Outcome.CORRECT if side == "chosen" else Outcome.WRONG):
        return sample.outcome.value
    return "truncated" if side == "chosen" and sample.cut else ""


class Sieve:
    """Filters the traces of one case, for whose responses `room` tokens are left, and remembers what fell through."""

    def __init__(self, options: PairsSection, case: Case, room: int) -> None:
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
        pool = (*case.latest, *case.others, *case.stand_ins, *(case.match or ()))
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
        kept = self.diverse([*latest, *self.usable(pool, "rejected")], "rejected")
        if self.case.match is not None:
            most = self._matching()
            kept = self.keep(kept, "rejected", ("" if index < most else "unmatched" for index in range(len(kept))))
        return kept, fell_back

    def _matching(self) -> int:
        """How many traces of the source that is only matched could have been rejected ones."""
        found = self.case.match or ()
        usable = [sample.text for sample in found if not (_fault(sample, "rejected") or self._length_fault(sample))]
        return diverse(usable, self._options.rouge_l_max).count("")

    def _length_fault(self, sample: Judged) -> str:
        tokens = self.counts.get(sample.text, 1)  # one that was not counted fits
        if tokens < self._options.min_response_tokens:
            return "too_short"
        return "too_long" if tokens > self.longest else ""
