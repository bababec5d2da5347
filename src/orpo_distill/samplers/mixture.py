"""Texts that two models write together: every token is drawn from a mixture of what both give for the next one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from orpo_distill.samplers.cache import Ints, SharedCache


@dataclass(frozen=True, slots=True)
class Partner:
    """The second model, with the same tokens as the first, and its share of the mixture, between 0 and 1."""

    model: PreTrainedModel
    share: float


class MixedCache:
    """What `SharedCache` is to one model: both models read every row, and the logits are those of the mixture."""

    def __init__(self, model: PreTrainedModel, partner: Partner, seats: int) -> None:
        self.own, self.other = SharedCache(model, seats), SharedCache(partner.model, seats)
        self.share = partner.share

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, both models attend to what is held here."""
        with self.own.attention(), self.other.attention():
            yield

    def add(self, prompts: Sequence[tuple[int, ...]], sharing: Sequence[int], rows: int) -> None:
        """As `SharedCache.add`."""
        for cache in (self.own, self.other):
            cache.add(prompts, sharing, rows)

    def logits(self, tokens: Ints, counts: Ints) -> Tensor:
        """As `SharedCache.logits`, on the first model's device."""
        return mixed(self.own.logits(tokens, counts), self.other.logits(tokens, counts), self.share)

    def keep(self, alive: NDArray[np.bool_]) -> Ints:
        """As `SharedCache.keep`."""
        self.other.keep(alive)
        return self.own.keep(alive)


def mixed(own: Tensor, other: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), (N, V) float32, of the softmax q of `own` (N, V) and p of `other`.

    A checkpoint may pad its vocabulary with logits of no token: what only one of the two has is left out.
    """
    width = min(own.shape[1], other.shape[1])
    q = own[:, :width].float().log_softmax(-1)
    p = other[:, :width].to(own.device).float().log_softmax(-1)
    return torch.logaddexp(q + math.log1p(-share), p + math.log(share))
