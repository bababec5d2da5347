"""StrategyQA: yes/no questions whose steps are implicit (Geva et al. 2021, arXiv 2101.02235).

A row of the hub's data set (splits train and test, cut from the official train set, whose test set has no answers):

    {"qid": "4b82bd6ced332e84006e", "term": "Mixed martial arts", "question": "Is Mixed martial arts totally ...?",
     "answer": false, ...}
"""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from orpo_distill.tasks.question import QuestionTask
from orpo_distill.verifiers import Verifier


class StrategyQA(QuestionTask):
    """StrategyQA, without its facts."""

    hub_id: str | None = "ChilleD/StrategyQA"
    verifier: SerializeAsAny[Verifier] = Field(default="yes_no", validate_default=True)
