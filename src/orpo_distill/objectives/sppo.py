"""SPPO with hard preferences: each side's log-ratio is regressed to a target of its own (arXiv 2405.00675).

Equation 4.7 with the probability of winning set to 1 for the chosen side and 0 for the rejected one: in distillation
the verifier has decided. TRL calls it `sppo_hard` and sums the two squares, as we do; the authors' code takes their
mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from orpo_distill.objectives import Loss, ScoredGroups
from orpo_distill.objectives.dpo import AgainstReference, log_ratios, rewards

if TYPE_CHECKING:
    from torch import Tensor


class Sppo(AgainstReference):
    """Squared distance of both log-ratios to plus and minus 1 / (2 beta).

    Self-play: the reference is the student that each round starts from. The authors use beta 0.001 (targets of 500
    nats) with a learning rate of 5e-7.
    """

    beta: float = Field(0.001, gt=0)
    reference: Literal["start", "latest"] = "latest"

    def __call__(self, batch: ScoredGroups) -> Loss:
        chosen, rejected = log_ratios(batch, batch.reference)
        return self.with_nll(batch, sppo_loss(chosen, rejected, self.beta), rewards(chosen, rejected, self.beta))


def sppo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2, (B,). Ratios (B,) as in `dpo_loss`."""
    target = 0.5 / beta
    return (chosen_ratios - target) ** 2 + (rejected_ratios + target) ** 2
