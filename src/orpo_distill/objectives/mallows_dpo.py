"""MallowsPO-theta: DPO whose margin counts for more on prompts with one clear answer (arXiv 2405.14953).

The dispersion of a prompt's preferences is read off the reference's own uncertainty while it reads the two texts, as in
the authors' code: c(x) = -phi * log H, H the mean of both sides' mean next-token entropy, divided by log V. Entropies
are made by the score stage, so no gradient goes through c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from orpo_distill.objectives import Loss, ScoredGroups, needed
from orpo_distill.objectives.dpo import AgainstReference, dpo_loss, log_ratios, rewards

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ENTROPY = 1e-6  # of log V: a reference that is certain of both texts, whose logarithm would be infinite


class MallowsDpo(AgainstReference):
    """DPO with `beta` scaled for each pair by the dispersion; `neg_log_dispersion_mean` is phi, 0.29 in their code."""

    beta: float = Field(0.1, gt=0)
    neg_log_dispersion_mean: float = Field(0.29, gt=0)

    def __call__(self, batch: ScoredGroups) -> Loss:
        chosen, rejected = log_ratios(batch, batch.reference)
        entropy = needed(batch.reference).entropy
        scale = dispersion(entropy[batch.chosen], entropy[batch.rejected], self.neg_log_dispersion_mean)
        loss = dpo_loss(scale * chosen, scale * rejected, self.beta)
        return self.with_nll(batch, loss, {**rewards(chosen, rejected, self.beta), "dispersion": scale})


def dispersion(chosen_entropy: Tensor, rejected_entropy: Tensor, phi: float) -> Tensor:
    """c(x) = -phi * log((chosen + rejected) / 2), (B,), 0 or more.

    The entropies (B,) are the reference's, means over each text's tokens divided by log V: from 0 to 1.
    """
    import torch

    mean = ((chosen_entropy + rejected_entropy) / 2).clamp(LEAST_ENTROPY, 1.0)
    return -phi * torch.log(mean)
