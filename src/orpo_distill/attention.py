"""Attention over a packed row: a trace's tokens see their prompt and their own trace, a prompt's tokens themselves.

Traces of about the same length are padded to a block; its keys are the prompt's, then its own. Padding stands on the
right, where the causal mask hides it. Query heads that share a key head are folded into the query length, so that keys
are never repeated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from orpo_distill.packing import Batch, Bucket

NAME = "orpo_distill_groups"
SCORES = 1 << 19  # attention scores computed at once on a CPU: what its caches hold


class Unsupported(Exception):
    """The model asks for an attention that groups do not have."""


def group_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query (1, H, L, D), key and value (1, K, L, D) -> (1, L, H, D).

    Raises Unsupported for options (soft-capped scores, sinks, ready-made masks) that would be left out.
    """
    batch: Batch | None = options.get("packed")
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "cache") if options.get(name) is not None]
    if batch is None or attention_mask is not None or unknown:
        raise Unsupported(", ".join(unknown) or "its layers make masks of their own")
    heads, key_heads, size = query.shape[1], key.shape[1], value.shape[3]
    scale = options.get("scaling") or 1 / math.sqrt(query.shape[3])
    dropout = options.get("dropout") or 0.0
    queries, keys, values = (side[0].transpose(0, 1) for side in (query, key, value))  # (L, heads, D)
    outputs = []
    for number, bucket in enumerate(batch.buckets):
        shape = (bucket.count, bucket.longest, key_heads)
        asking = queries.index_select(0, bucket.padded).view(*shape, heads // key_heads, -1)  # (N, T, K, G, D)
        asking = asking.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (N, K, G * T, D)
        mask = _mask(batch, number, options.get("sliding_window"))
        sides = _keys(keys, bucket), _keys(values, bucket)  # (N, K, P + T, D)
        found = _attend(asking, *sides, mask, scale, dropout)
        found = found.view(*found.shape[:2], -1, bucket.longest, size).permute(0, 3, 1, 2, 4)  # (N, T, K, G, D)
        outputs.append(found.reshape(-1, heads, size).index_select(0, bucket.tokens))
    return torch.cat(outputs)[None], None


AttentionInterface.register(NAME, group_attention)


def _keys(side: Tensor, bucket: Bucket) -> Tensor:
    """Keys or values (L, K, D) of a bucket's traces after their prompt's: (N, K, P + T, D)."""
    prompt = side[bucket.prompt].transpose(0, 1).expand(bucket.count, -1, -1, -1)
    own = side.index_select(0, bucket.padded).view(bucket.count, bucket.longest, *side.shape[1:]).transpose(1, 2)
    return torch.cat([prompt, own], dim=2)


def _mask(batch: Batch, number: int, window: int | None) -> Tensor:
    """What is added to the scores of bucket `number`, (T, P + T) float32: 0 where a query sees a key, else -inf."""
    bucket = batch.buckets[number]
    before, longest = bucket.prompt.stop - bucket.prompt.start, bucket.longest
    if window is not None and window >= before + longest:
        window = None
    key = number, window
    if key not in batch.masks:
        device = batch.input_ids.device
        distance = torch.arange(before, before + longest, device=device)[:, None]
        distance = distance - torch.arange(before + longest, device=device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        batch.masks[key] = torch.zeros(hidden.shape, device=device).masked_fill(hidden, float("-inf"))
    return batch.masks[key]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """Query (N, K, R, D) over key and value (N, K, C, D) -> (N, K, R, D). The mask (T, C) repeats every T queries."""
    if query.device.type == "cpu" and not dropout:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (side.to(torch.get_autocast_dtype("cpu")) for side in (query, key, value))
        flat = (side.flatten(0, 1) for side in (query, key, value))
        found: Tensor = MatmulAttention.apply(*flat, mask, scale)  # type: ignore[no-untyped-call]
        return found.view(*query.shape[:3], value.shape[3])
    tiled = mask.to(query.dtype).repeat(query.shape[2] // mask.shape[0], 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=tiled, dropout_p=dropout, scale=scale)


class MatmulAttention(torch.autograd.Function):
    """Attention on a CPU by batched matrix products, with scores in float32 that the backward pass computes again.

    For blocks of a few hundred tokens it takes less than half the time of torch's own kernel (docs/performance.md).
    Query (B, R, D), key and value (B, C, D), mask (T, C) with R a multiple of T.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        """(B, R, D)."""
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        found = torch.empty(*query.shape[:2], value.shape[2], dtype=value.dtype)
        with torch.autocast("cpu", enabled=False):
            for at in _parts(query, key):
                weights = _weights(query[at], key[at], mask, scale).to(value.dtype)
                torch.bmm(weights, value[at], out=found[at])
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The gradients of query, key and value."""
        query, key, value, mask = ctx.saved_tensors
        by_query, by_key, by_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        with torch.autocast("cpu", enabled=False):
            for at in _parts(query, key):
                weights = _weights(query[at], key[at], mask, ctx.scale)
                by_weight = _product(gradient[at], value[at])
                by_score = torch._softmax_backward_data(by_weight, weights, -1, weights.dtype)
                by_score = by_score.mul_(ctx.scale).to(query.dtype)
                torch.bmm(by_score, key[at], out=by_query[at])
                torch.bmm(by_score.transpose(1, 2), query[at], out=by_key[at])
                torch.bmm(weights.to(value.dtype).transpose(1, 2), gradient[at], out=by_value[at])
        return by_query, by_key, by_value, None, None


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    """Runs of B whose scores fit into SCORES."""
    step = max(1, SCORES // (query.shape[1] * key.shape[1]))
    return [slice(start, start + step) for start in range(0, len(query), step)]


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention weights (B, R, C), float32."""
    scores = _product(query, key).mul_(scale)
    scores.view(len(scores), -1, *mask.shape).add_(mask)
    return scores.softmax(-1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """`one` (B, R, D) times `other` (B, C, D) transposed. bfloat16 factors give float32, as in torch's own kernel."""
    if one.dtype != torch.bfloat16:
        return torch.bmm(one, other.transpose(1, 2))
    backend: Any = torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"  # multiplies in bfloat16, which loses nothing here, and sums in float32
    try:
        return torch.bmm(one.float(), other.transpose(1, 2).float())
    finally:
        products.fp32_precision = before
