"""MiniLLM: the reverse KL divergence of whole texts, on texts that the student writes in the step (arXiv 2306.08543).

Against the paper: returns are divided by the number of tokens that they sum over, not by one less. The likelihood of
the chosen traces (`nll_weight`) stands where it has a loss on pre-training text. A text serves one optimizer step, not
four epochs, so that the ratio which is clipped is the importance weight alone: without a share of the teacher it is 1.
The single-step part has no importance weight, which is 1 on average there. The authors' code differs from their
formulas, and from us: rewards are doubled (a scale of 0.5) and cut at 100, returns include the token's own reward, are
discounted (0.95 by default) and whitened over the batch. TRL's MiniLLMTrainer (gone in 1.16) has neither the mixed
sampling nor the weights, and its mask lets padding in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from orpo_distill.objectives import Loss, ScoredGroups, Writing, needed
from orpo_distill.objectives.gkd import divergence_from
from orpo_distill.objectives.sft import Sft

if TYPE_CHECKING:
    from torch import Tensor


class MiniLlm(Sft):
    """Reverse KL by policy gradient, with the paper's settings. Needs a local teacher with the student's vocabulary.

    `teacher_share` is alpha: each token is drawn from alpha * teacher + (1 - alpha) * student. `length_norm` takes the
    mean of the rewards after a token, not their sum; `clip: null` clips nothing. The loss of a text is the sum over its
    tokens, divided by the mean length of the step's texts: that leaves the gradient's direction as it is.
    """

    requires = frozenset({"teacher_distribution"})

    teacher_share: float = Field(0.2, ge=0, lt=1)
    length_norm: bool = True
    clip: float | None = Field(0.2, gt=0)
    nll_weight: float = Field(0.0, ge=0)
    max_new_tokens: PositiveInt = 256

    @property
    def scores_prompt(self) -> bool:
        return self.nll_weight > 0 and super().scores_prompt

    @property
    def writing(self) -> Writing:
        return Writing(self.max_new_tokens, teacher_share=self.teacher_share, keeps_chosen=self.nll_weight > 0)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence_from(student, teacher)

    def __call__(self, batch: ScoredGroups) -> Loss:
        seen, rollout, texts = needed(batch.compared), needed(batch.rollout), len(batch.tokens)
        by_token = minillm_loss(
            seen.logp,
            seen.teacher_logp,
            seen.divergence,
            seen.trace,
            teacher_share=self.teacher_share,
            clip=self.clip,
            length_norm=self.length_norm,
        )
        loss = seen.by_trace(by_token, texts)[rollout] / batch.mean_rollout_tokens
        tokens = batch.tokens[rollout]
        means = {"reverse_kl": seen.divergence, "logps/rollout": seen.logp, "teacher_logps/rollout": seen.teacher_logp}
        metrics = {name: seen.by_trace(values.detach(), texts)[rollout] / tokens for name, values in means.items()}
        if self.nll_weight:
            nll = self.chosen_nll(batch)
            loss, metrics["nll_loss"] = loss + self.nll_weight * nll, nll.detach()
        return Loss(loss, metrics)


def minillm_loss(
    logps: Tensor,
    teacher_logps: Tensor,
    divergence: Tensor,
    owner: Tensor,
    teacher_share: float = 0.0,
    clip: float | None = None,
    length_norm: bool = False,
) -> Tensor:
    """What each token adds to a loss whose gradient is MiniLLM's, (M,). Its value means nothing.

    The M tokens of all texts stand one text after the other, `owner` (M,) says whose each is. `logps` and
    `teacher_logps` (M,) are log q and log p of the tokens in nats, `divergence` (M,) is KL(q, p) of the distributions
    that they were picked from.

    Equations 3 to 6: the single-step part is `divergence`; the long part weighs the gradient of log q(y_t) by
    R_{t+1}, the sum of log p - log q over the later tokens of the text, or with `length_norm` its mean. Tokens drawn
    from a p + (1 - a) q, where a is `teacher_share`, have the importance weight q / (a p + (1 - a) q), each by itself.
    `clip` is PPO's (arXiv 1707.06347, equation 7), with that weight as the ratio.
    """
    import torch

    q = logps.detach()
    later, count = later_tokens(teacher_logps - q, owner)
    returns = later / count.clamp(min=1) if length_norm else later
    drawn_from = q
    if teacher_share:
        drawn_from = torch.logaddexp(teacher_logps + math.log(teacher_share), q + math.log1p(-teacher_share))
    ratio = (logps - drawn_from).exp()
    gain = ratio * returns
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * returns)
    return divergence - gain


def later_tokens(values: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """For each of M tokens the sum of `values` (M,) over the later tokens of its text, and how many they are, (M,)."""
    import torch

    place = torch.arange(len(owner), device=owner.device)
    last = torch.searchsorted(owner, owner, right=True) - 1  # of the text
    sums = values.double().cumsum(0)
    return (sums[last] - sums).to(values.dtype), last - place
