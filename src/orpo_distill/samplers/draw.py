"""Draw the next token of many rows at once, each from its own stream of random numbers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from orpo_distill.samplers import Decoding

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST_CANDIDATES = 256  # how many of the likeliest tokens top-p looks at before it takes more
BLOCK = 256  # tokens whose probabilities are added up before the search looks into one of the sums
ELEMENTS = {"cpu": 1 << 20}  # of a (rows, vocabulary) part that is worked on at once: a part stays in a CPU's cache
MOST_ELEMENTS = 1 << 25  # elsewhere: bounds the memory


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Number `steps[i]` of the stream with seed `seeds[i]`, in [0, 1). Both (N,).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which can jump to any step: nothing has to be kept for a row.
    """
    with np.errstate(over="ignore"):
        z = seeds + (steps + np.uint64(1)) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    numbers: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def draw(logits: Tensor, chance: Tensor, decoding: Decoding) -> Tensor:
    """The next token of every row (N,) from `logits` (N, V) and `chance` (N,) float64 in [0, 1).

    The token is where the cumulative probability, in the vocabulary's order, first exceeds `chance`: rounding of size
    e in the logits changes a token with a probability of about e. Temperature 0 takes the likeliest token. A row whose
    logits are no numbers gets -1.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    block = max(1, ELEMENTS.get(logits.device.type, MOST_ELEMENTS) // logits.shape[1])
    starts = range(0, len(logits), block)
    return torch.cat([_draw(logits[at : at + block].float(), chance[at : at + block], decoding) for at in starts])


def _draw(logits: Tensor, chance: Tensor, decoding: Decoding) -> Tensor:
    """Sums of blocks first, then a search inside the block where the chance falls."""
    weights = kept(logits, decoding)
    blocks = pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)
    target = (chance * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    last = inside[:, -1:]  # rounding must not lead past it
    rest = torch.minimum(target - before, torch.nextafter(last, torch.zeros_like(last)))
    tokens = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return torch.where(target.isnan(), -1, tokens)[:, 0]


def kept(logits: Tensor, decoding: Decoding) -> Tensor:
    """Probabilities (N, V) under temperature, then top-k, then top-p; 0 for what those leave out. Need not sum to 1.

    Tokens as likely as the last one kept are kept too.
    """
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[1]:
        least = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if decoding.top_p < 1:
        probabilities = probabilities.masked_fill(probabilities < _nucleus(probabilities, decoding.top_p), 0.0)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """(N, 1): the least probability in the smallest set of likeliest tokens that holds `top_p` together.

    Looks at a few hundred likeliest tokens first and at more only where they do not reach `top_p`.
    """
    vocabulary = probabilities.shape[1]
    candidates = min(FIRST_CANDIDATES, vocabulary)
    while True:
        top = probabilities.topk(candidates).values
        before = top.cumsum(-1) - top
        if candidates == vocabulary or bool((before[:, -1] + top[:, -1] >= top_p).all()):
            break
        candidates = min(candidates * 16, vocabulary)
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return top.gather(1, last)
