"""DPO: the margin of the log-ratios to a reference (arXiv 2305.18290), with likelihood beside it if wanted.

With the teacher's text chosen and the student's rejected this is dDPO (Zephyr, arXiv 2310.16944), whose reference is a
student that was fine-tuned on the teacher's text first: `warmup`. Without that its authors saw training collapse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from orpo_distill.objectives import GivenScores, Loss, ScoredGroups, needed
from orpo_distill.objectives.sft import Sft, mean_logps

if TYPE_CHECKING:
    from torch import Tensor


class AgainstReference(Sft):
    """Base of losses on log-ratios to a reference, with `nll_weight` times the chosen side's likelihood added.

    `reference: start` is the student that round 1 starts from (after `warmup`, if there is one); `latest` the one that
    each round starts from. The likelihood term is that of 3D-properties (arXiv 2406.07327), which found that it keeps
    the chosen side's probability from falling.
    """

    requires = frozenset({"rejected", "reference_scores"})

    nll_weight: float = Field(0.0, ge=0)
    reference: Literal["start", "latest"] = "start"

    @property
    def reference_policy(self) -> Literal["start", "latest"]:
        return self.reference

    @property
    def scores_prompt(self) -> bool:
        return self.nll_weight > 0 and super().scores_prompt

    def with_nll(self, batch: ScoredGroups, loss: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
        """The loss (B,) with the likelihood term, and the metrics with what every objective of two sides logs.

        `logps/chosen` and `logps/rejected` are means a token, as ORPO logs them; TRL's DPO trainer logs sums.
        """
        logps = mean_logps(batch).detach()
        nll = self.chosen_nll(batch)
        common = {
            "nll_loss": nll.detach(),
            "logps/chosen": logps[batch.chosen],
            "logps/rejected": logps[batch.rejected],
        }
        if self.nll_weight:
            loss = loss + self.nll_weight * nll
        return Loss(loss, {**common, **metrics})


class Dpo(AgainstReference):
    """The log-sigmoid of `beta` times the margin. Zephyr's recipe has beta 0.01 and a learning rate of 5e-7."""

    beta: float = Field(0.1, gt=0)

    def __call__(self, batch: ScoredGroups) -> Loss:
        chosen, rejected = log_ratios(batch, batch.reference)
        return self.with_nll(batch, dpo_loss(chosen, rejected, self.beta), rewards(chosen, rejected, self.beta))


def dpo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected)), (B,). Equation 7 of arXiv 2305.18290.

    `chosen_ratios` and `rejected_ratios` (B,) are log pi(y|x) - log pi_ref(y|x), summed over the text, in nats.
    """
    from torch.nn.functional import softplus

    return softplus(-beta * (chosen_ratios - rejected_ratios))


def log_ratios(batch: ScoredGroups, given: GivenScores | None) -> tuple[Tensor, Tensor]:
    """log pi(y|x) - log pi_given(y|x) of the chosen and of the rejected sides, (B,) each, in nats a text."""
    ratios = batch.logp_sum - needed(given).logp_sum
    return ratios[batch.chosen], ratios[batch.rejected]


def rewards(
    chosen: Tensor, rejected: Tensor, beta_chosen: float, beta_rejected: float | None = None
) -> dict[str, Tensor]:
    """TRL's metrics of DPO: implicit rewards (beta times log-ratio), how often the chosen one's is higher, its lead."""
    chosen = beta_chosen * chosen.detach()
    rejected = (beta_chosen if beta_rejected is None else beta_rejected) * rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
    }
