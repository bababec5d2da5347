"""MedQA: questions of the US medical licensing exam, four choices (Jin et al. 2021, arXiv 2009.13081).

A row of the hub's data set (splits train and test):

    {"question": "A 23-year-old pregnant woman ...", "answer": "Nitrofurantoin", "answer_idx": "D",
     "options": {"A": "Ampicillin", "B": "Ceftriaxone", "C": "Doxycycline", "D": "Nitrofurantoin"}, ...}
"""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from orpo_distill.tasks.question import QuestionTask
from orpo_distill.verifiers import Verifier


class MedQA(QuestionTask):
    """MedQA-USMLE with four choices."""

    hub_id: str | None = "GBaker/MedQA-USMLE-4-options"
    verifier: SerializeAsAny[Verifier] = Field(default="choice", validate_default=True)
