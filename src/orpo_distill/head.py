"""Log-probabilities of given tokens from hidden states, without the full logits in float32.

The output layer runs on a few hundred positions at a time. What is kept for the backward pass is its logits in the
model's own type, or nothing at all where memory is short: then the layer runs again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits computed at once
KEPT = 1 << 30  # bytes of logits that are kept for the backward pass of one micro-batch
ROWS = 64  # positions that are in float32 at once


def label_logps(
    hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None = None, recompute: bool = False
) -> Tensor:
    """Log-probability in nats (M,) float32 of each label (M,) given the hidden state (M, H) that predicts it.

    `softcap` c turns logits x into c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2). With `recompute`, and for
    more logits than KEPT, the backward pass computes the logits again.
    """
    weight: Any = head.weight
    vocabulary = weight.shape[0]
    step = max(ROWS, CHUNK // vocabulary)
    recompute = recompute or len(hidden) * vocabulary * hidden.element_size() > KEPT
    found = []
    for start in range(0, len(hidden), step):
        part = hidden[start : start + step], head, labels[start : start + step], softcap
        if recompute and torch.is_grad_enabled():
            found.append(checkpoint(_logps, *part, use_reentrant=False))
        else:
            found.append(_logps(*part))
    return torch.cat(found)


def _logps(hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None) -> Tensor:
    return pick(_capped(head(hidden), softcap), labels)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def label_scores(hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None = None) -> Tensor:
    """What `label_logps` gives and the entropy that `entropies` gives, (2, M) float32. Keeps nothing for gradients."""
    weight: Any = head.weight
    step = max(ROWS, CHUNK // weight.shape[0])
    found = []
    for start in range(0, len(hidden), step):
        logits = _capped(head(hidden[start : start + step]), softcap)
        found.append(torch.stack([pick(logits, labels[start : start + step]), entropies(logits)]))
    return torch.cat(found, dim=1)


def entropies(logits: Tensor) -> Tensor:
    """The entropy of the softmax of logits (M, V), divided by log V: (M,) float32 from 0 to 1, a few rows at a time."""
    found = []
    for part in torch.split(logits, ROWS):
        logps = part.float().log_softmax(-1)
        found.append(torch.special.entr(logps.exp()).sum(-1))
    return torch.cat(found) / math.log(logits.shape[-1])


def pick(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax of logits (M, V) at the labels (M,), float32, computed in float32 a few rows at a time."""
    found: Tensor = _Pick.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = torch.cat([part.float().logsumexp(-1) for part in torch.split(logits, ROWS)])
        ctx.save_for_backward(logits, labels, total)
        return logits.gather(1, labels[:, None])[:, 0].float() - total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """gradient * (one-hot(label) - softmax)."""
        logits, labels, total = ctx.saved_tensors
        found = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS):
            at = slice(start, start + ROWS)
            part = (logits[at] - total[at, None]).exp_().mul_(-gradient[at, None])
            found[at] = part.scatter_add_(1, labels[at, None], gradient[at, None])
        return found, None
