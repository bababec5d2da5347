"""Texts that two models write together: every token is drawn from a mixture of what both give for the next one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    """The second model, with the same tokens as the first, and its share of the mixture, between 0 and 1.

    `prompts` has each of the first model's prompts as this one reads it. Its arithmetic is that of its own number type.
    """

    model: PreTrainedModel
    share: float
    prompts: Mapping[tuple[int, ...], tuple[int, ...]]


class MixedCache:
    """What `SharedCache` is to one model: both models read every row, and the logits are those of the mixture."""

    def __init__(self, model: PreTrainedModel, partner: Partner, seats: int) -> None:
        self.own, self.other = SharedCache(model, seats), SharedCache(partner.model, seats)
        self.partner = partner
        self.last: Ints = np.zeros(0, np.int64)  # (N,) the last token of each row's prompt as the partner reads it

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, both models attend to what is held here."""
        with self.own.attention(), self.other.attention():
            yield

    def add(self, prompts: Sequence[tuple[int, ...]], sharing: Sequence[int], rows: int) -> None:
        """As `SharedCache.add`."""
        read = [self.partner.prompts[prompt] for prompt in prompts]
        self.own.add(prompts, sharing, rows)
        with self._partners_arithmetic():
            self.other.add(read, sharing, rows)
        self.last = np.concatenate([self.last, np.repeat([prompt[-1] for prompt in read], sharing)])

    def logits(self, tokens: Ints, counts: Ints) -> Tensor:
        """As `SharedCache.logits`, on the first model's device."""
        own = self.own.logits(tokens, counts)
        with self._partners_arithmetic():
            other = self.other.logits(np.where(counts == 0, self.last, tokens), counts)
        return mixed(own, other, self.partner.share)

    def keep(self, alive: NDArray[np.bool_]) -> Ints:
        """As `SharedCache.keep`."""
        self.other.keep(alive)
        order = self.own.keep(alive)
        self.last = self.last[order]
        return order

    def _partners_arithmetic(self) -> torch.autocast:
        return torch.autocast(self.partner.model.device.type, enabled=False)


def mixed(own: Tensor, other: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), (N, V) float32, of the softmax q of `own` (N, V) and p of `other`.

    A checkpoint may pad its vocabulary with logits of no token: what only one of the two has is left out.
    """
    width = min(own.shape[1], other.shape[1])
    q = own[:, :width].float().log_softmax(-1)
    p = other[:, :width].to(own.device).float().log_softmax(-1)
    return torch.logaddexp(q + math.log1p(-share), p + math.log(share))
