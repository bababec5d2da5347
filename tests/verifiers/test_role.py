"""By role: the teacher's whole texts are preferred, the students' are not, and nothing is said of what they hold."""

import pytest

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.role import Role


@pytest.mark.parametrize(
    ("policy", "text", "finish_reason", "outcome"),
    [
        ("teacher", "Dear Ada, ...", FinishReason.STOP, Outcome.CORRECT),
        ("student-0", "Dear Ada, ...", FinishReason.STOP, Outcome.WRONG),
        ("student-3", "Dear Ada, ...", FinishReason.STOP, Outcome.WRONG),
        ("teacher", "Dear A", FinishReason.LENGTH, Outcome.TRUNCATED),
        ("student-0", "Dear A", FinishReason.LENGTH, Outcome.TRUNCATED),
        ("teacher", " \n", FinishReason.STOP, Outcome.UNPARSEABLE),
    ],
)
def test_who_wrote_it_decides(policy: str, text: str, finish_reason: FinishReason, outcome: Outcome) -> None:
    problem = Problem("p", "Write to Ada.", "")
    verdict = Role()(problem, Trace("t", "p", policy, 0, text, finish_reason))
    assert (verdict.trace_id, verdict.outcome, verdict.answer) == ("t", outcome, None)


def test_only_role_is_for_open_ended_tasks() -> None:
    assert [name for name in Verifier.types if Verifier.model_validate(name).open_ended] == ["role"]
