"""OpenBookQA: elementary science, four choices (Mihaylov et al. 2018, arXiv 1809.02789).

A row of the hub's data set (splits train, validation and test):

    {"id": "7-980", "question_stem": "The sun is responsible for",
     "choices": {"text": ["puppies learning new tricks", ...], "label": ["A", "B", "C", "D"]}, "answerKey": "D"}
"""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from orpo_distill.tasks.question import QuestionTask
from orpo_distill.verifiers import Verifier


class OpenBookQA(QuestionTask):
    """OpenBookQA, without its book of facts."""

    hub_id: str | None = "allenai/openbookqa"
    hub_config: str | None = "main"
    verifier: SerializeAsAny[Verifier] = Field(default="choice", validate_default=True)
