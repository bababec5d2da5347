"""ARC: grade-school science exam questions with three to five choices (Clark et al. 2018, arXiv 1803.05457).

A row of the hub's data set (splits train, validation and test); some label their choices 1 to 4:

    {"id": "Mercury_SC_415702", "question": "George wants to warm his hands ...",
     "choices": {"text": ["dry palms", "wet palms", ...], "label": ["A", "B", ...]}, "answerKey": "A"}
"""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from orpo_distill.tasks.question import QuestionTask
from orpo_distill.verifiers import Verifier


class ArcChallenge(QuestionTask):
    """ARC-Challenge: the questions that retrieval and word co-occurrence get wrong."""

    hub_id: str | None = "allenai/ai2_arc"
    hub_config: str | None = "ARC-Challenge"
    verifier: SerializeAsAny[Verifier] = Field(default="choice", validate_default=True)


class ArcEasy(QuestionTask):
    """ARC-Easy: the other questions."""

    hub_id: str | None = "allenai/ai2_arc"
    hub_config: str | None = "ARC-Easy"
    verifier: SerializeAsAny[Verifier] = Field(default="choice", validate_default=True)
