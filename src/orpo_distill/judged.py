"""Traces beside their verdicts, read as a stream, one problem after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason, Outcome, Trace, Verdict, read_jsonl


@dataclass(frozen=True, slots=True)
class Judged:
    """A trace with what its verifier found, and its text without surrounding space."""

    trace: Trace
    outcome: Outcome
    text: str
    answer: str | None = None  # that the verifier read

    @property
    def cut(self) -> bool:
        """Whether the text was cut at max_new_tokens."""
        return self.trace.finish_reason is FinishReason.LENGTH


class JudgedTraces:
    """A folder's `traces.jsonl` and another's `verdicts.jsonl`, both in the order of the problems."""

    def __init__(self, traces: Path, verdicts: Path) -> None:
        self._path = traces / "traces.jsonl"
        self._stream = _joined(self._path, verdicts / "verdicts.jsonl")
        self._next = next(self._stream, None)

    def take(self, problem_id: str) -> list[Judged]:
        """The traces of the next problem, in the file's order; none if the next ones belong to another problem.

        Raises DataError if a trace has no verdict.
        """
        taken = []
        while self._next is not None and self._next.trace.problem_id == problem_id:
            taken.append(self._next)
            self._next = next(self._stream, None)
        return taken

    def finish(self) -> None:
        """Raises DataError if traces are left: their problem is unknown, or not where the problems' order puts it."""
        if self._next is not None:
            trace = self._next.trace
            raise DataError(
                f"{self._path}: expected traces of the problems in problems.jsonl, in their order, found trace "
                f"{trace.id} of problem {trace.problem_id!r}; sample and verify again"
            )


def _joined(traces: Path, verdicts: Path) -> Iterator[Judged]:
    judgements = read_jsonl(verdicts, Verdict)
    for trace in read_jsonl(traces, Trace):
        verdict = next(judgements, None)
        if verdict is None or verdict.trace_id != trace.id:
            found = f"that of {verdict.trace_id}" if verdict else "none"
            raise DataError(f"{verdicts}: expected the verdict of trace {trace.id}, found {found}; verify again")
        yield Judged(trace, verdict.outcome, trace.text.strip(), verdict.answer)
    if (verdict := next(judgements, None)) is not None:
        raise DataError(f"{verdicts}: expected one verdict a trace, found one more of {verdict.trace_id}; verify again")
