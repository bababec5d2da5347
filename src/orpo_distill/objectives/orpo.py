"""ORPO: likelihood of the chosen side plus the log odds ratio against the rejected side (arXiv 2403.07691)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from orpo_distill.objectives import Loss, ScoredGroups
from orpo_distill.objectives.sft import Sft, mean_logps

if TYPE_CHECKING:
    from torch import Tensor


class Orpo(Sft):
    """Likelihood plus `weight` times the odds-ratio term. ORPO-Distill (arXiv 2509.25100) uses weight 1.

    `weight` is lambda in the papers and `beta` in TRL.
    """

    requires = frozenset({"rejected"})

    weight: float = Field(1.0, ge=0)
    min_nll: float = Field(1e-6, gt=0)  # a mean token negative log-likelihood below this counts as this, in the odds

    def __call__(self, batch: ScoredGroups) -> Loss:
        logps = mean_logps(batch)
        chosen, rejected = logps[batch.chosen], logps[batch.rejected]
        nll = self.chosen_nll(batch)
        ratio, log_odds_ratio = odds_ratio_loss(chosen, rejected, self.min_nll)
        chosen, rejected = chosen.detach(), rejected.detach()
        # Names and definitions of TRL 1.16's ORPOTrainer; its log_odds_ratio is the log-sigmoid, log_odds_chosen the
        # log odds ratio itself.
        metrics = {
            "nll_loss": nll.detach(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "rewards/chosen": self.weight * chosen,
            "rewards/rejected": self.weight * rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": self.weight * (chosen - rejected),
            "log_odds_ratio": -ratio.detach(),
            "log_odds_chosen": log_odds_ratio.detach(),
            "clamped": (-chosen < self.min_nll).to(chosen.dtype) + (-rejected < self.min_nll).to(chosen.dtype),
        }
        return Loss(nll + self.weight_of(batch) * ratio, metrics)

    def weight_of(self, batch: ScoredGroups) -> Tensor | float:
        """The weight of every pair's odds-ratio term."""
        return self.weight


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor, min_nll: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid of the log odds ratio, and the log odds ratio, both (B,). Equations 6 and 7 of arXiv 2403.07691.

    `chosen_logps` and `rejected_logps` (B,) are mean token log-probabilities, at most 0, in nats.
    """
    from torch.nn.functional import softplus

    log_odds_ratio = log_odds(chosen_logps, min_nll) - log_odds(rejected_logps, min_nll)
    return softplus(-log_odds_ratio), log_odds_ratio


def log_odds(logps: Tensor, min_nll: float) -> Tensor:
    """log(p / (1 - p)) for p = exp(logps), finite with finite gradients. Any shape.

    With x = -logps this is -(x + log(1 - exp(-x))): one branch, because the usual `torch.where` form of log1mexp gives
    NaN gradients close to p = 1. There x is held at `min_nll`.
    """
    import torch

    x = (-logps).clamp(min=min_nll)
    return -(x + torch.log(-torch.expm1(-x)))
