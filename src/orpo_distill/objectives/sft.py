"""Supervised fine-tuning: the negative log-likelihood of the chosen side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from orpo_distill.objectives import Loss, Objective, ScoredGroups

if TYPE_CHECKING:
    from torch import Tensor


class Sft(Objective):
    """Likelihood of the chosen traces. With several of them a problem this is diverse-CoT fine-tuning.

    `nll_on: full` covers the prompt too. `nll_reduction: sequence` takes the mean over each trace's tokens, so that
    every pair weighs the same; `batch_tokens` the mean over all tokens of the optimizer step. TRL's ORPO trainer uses
    full and batch_tokens.
    """

    nll_on: Literal["response", "full"] = "response"
    nll_reduction: Literal["sequence", "batch_tokens"] = "sequence"

    @property
    def scores_prompt(self) -> bool:
        return self.nll_on == "full"

    def __call__(self, batch: ScoredGroups) -> Loss:
        nll = self.chosen_nll(batch)
        logps = mean_logps(batch)[batch.chosen]
        return Loss(nll, {"nll_loss": nll.detach(), "logps/chosen": logps.detach()})

    def chosen_nll(self, batch: ScoredGroups) -> Tensor:
        """The negative log-likelihood of every pair's chosen side, (B,), in nats a token."""
        total = -(batch.logp_sum + batch.prompt_logp_sum)[batch.chosen]
        if self.nll_reduction == "batch_tokens":
            return total / batch.mean_chosen_tokens
        return total / (batch.tokens + batch.prompt_tokens)[batch.chosen]


def mean_logps(batch: ScoredGroups) -> Tensor:
    """The mean log-probability of each trace's response tokens, (N,), in nats."""
    return batch.logp_sum / batch.tokens
