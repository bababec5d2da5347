"""MiniLLM: the reverse KL divergence of whole texts, estimated on texts that the student writes (arXiv 2306.08543)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
    `teacher_logps` (M,) are log q and log p of the tokens in nats, `divergence` (M,) the reverse KL of the distributions
    that they were drawn from.

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
