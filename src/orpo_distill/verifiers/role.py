"""Nobody can say what is right: a text counts as what its author's role makes of it."""

from __future__ import annotations

from typing import ClassVar

from orpo_distill.records import TEACHER, FinishReason, Outcome, Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier


class Role(Verifier):
    """For open-ended tasks: a whole text of the teacher counts as correct, one of a student as wrong.

    So pairs are by role: the teacher's text preferred, the student's rejected. A text that was cut stands on neither
    side, nor does an empty one.
    """

    isolated: ClassVar[bool] = False
    open_ended: ClassVar[bool] = True

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace by who wrote it."""
        if trace.finish_reason is FinishReason.LENGTH:
            return Verdict(trace.id, Outcome.TRUNCATED, None, "the text was cut")
        if not trace.text.strip():
            return Verdict(trace.id, Outcome.UNPARSEABLE, None, "the text is empty")
        outcome = Outcome.CORRECT if trace.policy == TEACHER else Outcome.WRONG
        return Verdict(trace.id, outcome, None, f"by role: written by {trace.policy or 'no teacher'}")
