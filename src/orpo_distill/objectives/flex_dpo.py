"""Flex-DPO: DPO with a weight for each side (3D-properties, arXiv 2406.07327).

DPO's gradient pushes the rejected side down faster than it lifts the chosen one, the more so the less likely the
rejected one already is. A smaller weight on the rejected side slows that down. The form is inferred from reviews of the
paper, whose full text could not be read; they place the best rejected weight near 0.08 beside a fixed chosen one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from orpo_distill.objectives import Loss, ScoredGroups
from orpo_distill.objectives.dpo import AgainstReference, log_ratios, rewards

if TYPE_CHECKING:
    from torch import Tensor


class FlexDpo(AgainstReference):
    """DPO with `beta_chosen` and `beta_rejected`; with both equal it is `dpo`."""

    beta_chosen: float = Field(0.1, gt=0)
    beta_rejected: float = Field(0.08, ge=0)

    def __call__(self, batch: ScoredGroups) -> Loss:
        chosen, rejected = log_ratios(batch, batch.reference)
        loss = flex_dpo_loss(chosen, rejected, self.beta_chosen, self.beta_rejected)
        return self.with_nll(batch, loss, rewards(chosen, rejected, self.beta_chosen, self.beta_rejected))


def flex_dpo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta_chosen: float, beta_rejected: float) -> Tensor:
    """-log sigmoid(beta_chosen * chosen - beta_rejected * rejected), (B,). Ratios (B,) as in `dpo_loss`."""
    from torch.nn.functional import softplus

    return softplus(-(beta_chosen * chosen_ratios - beta_rejected * rejected_ratios))
