"""ORPO whose weight follows the dispersion of MallowsPO (arXiv 2405.14953): an idea of ours, no paper's.

The contrast counts for more where the reference is sure of both texts; see `mallows_dpo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from orpo_distill.objectives import ScoredGroups, needed
from orpo_distill.objectives.mallows_dpo import dispersion
from orpo_distill.objectives.orpo import Orpo

if TYPE_CHECKING:
    from torch import Tensor


class MallowsOrpo(Orpo):
    """ORPO with `weight` times c(x) = -phi * log H; `neg_log_dispersion_mean` is phi. Needs the reference's scores."""

    requires = frozenset({"rejected", "reference_scores"})

    neg_log_dispersion_mean: float = Field(0.29, gt=0)

    def weight_of(self, batch: ScoredGroups) -> Tensor:
        entropy = needed(batch.reference).entropy
        scale = dispersion(entropy[batch.chosen], entropy[batch.rejected], self.neg_log_dispersion_mean)
        return self.weight * scale
