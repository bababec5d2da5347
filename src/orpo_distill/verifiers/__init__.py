"""Verifiers: is this answer right?

To add one, subclass `Verifier` with one method and name it in YAML as `module:Class`, or in the table below.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from orpo_distill.component import Component
from orpo_distill.records import Problem, Trace, Verdict


class Verifier(Component):
    """Compares the last answer a trace states with the problem's gold answer.

    A verifier that can hang, and any that is not in the table below, runs in killable workers (`isolated`).
    """

    family = "verifier"
    types = {
        "number": "orpo_distill.verifiers.number:Number",
        "choice": "orpo_distill.verifiers.choice:Choice",
        "yes_no": "orpo_distill.verifiers.yes_no:YesNo",
        "exact": "orpo_distill.verifiers.exact:Exact",
        "math": "orpo_distill.verifiers.math:Math",
        "role": "orpo_distill.verifiers.role:Role",
    }
    isolated: ClassVar[bool] = True
    open_ended: ClassVar[bool] = False  # True: nobody can say what is right; problems need no gold answer

    @abstractmethod
    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer of the wrong kind (a letter outside the choices)."""

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError for a gold answer of the wrong kind. Tasks call it for every problem they load."""

    def prepare(self) -> None:
        """Import what `__call__` needs. A worker does this before its time limit applies."""
