"""GSM8K: grade-school word problems with a number as the answer (Cobbe et al. 2021, arXiv 2110.14168).

A row of the hub's data set (splits train and test):

    {"question": "Natalia sold clips to 48 of her friends ...", "answer": "Natalia sold 48/2 = ... clips.\\n#### 72"}
"""

from __future__ import annotations

from pydantic import Field, SerializeAsAny

from orpo_distill.tasks.question import QuestionTask
from orpo_distill.verifiers import Verifier


class Gsm8k(QuestionTask):
    """GSM8K. The gold answer is what stands after `####`."""

    hub_id: str | None = "openai/gsm8k"
    hub_config: str | None = "main"
    verifier: SerializeAsAny[Verifier] = Field(default="number", validate_default=True)
