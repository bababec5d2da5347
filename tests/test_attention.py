"""Attention over packed rows against softmax(q k / sqrt(d)) v written out with a mask over the whole row."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_distill import attention
from orpo_distill.attention import MatmulAttention, Unsupported, group_attention
from orpo_distill.groups import Row
from orpo_distill.packing import Batch, collate
from orpo_distill.records import Message, Pair

PAIR = Pair("p", (Message("user", "q"),), "a", "b", "c", "r", "teacher", "student-0")
KERNELS = {"matmul": 0.0, "sdpa": 1e-12}  # dropout of next to nothing takes torch's own kernel on a CPU too


def batch_of(shapes: list[tuple[int, list[int]]]) -> Batch:
    """Groups given as (tokens of the prompt, tokens of each trace)."""
    rows = []
    for number, (prompt, traces) in enumerate(shapes):
        for place, length in enumerate(traces):
            trace = (place,) * length
            rows.append(Row(1, PAIR, (number,) * prompt, trace, trace))
    return collate(rows, False)


SHAPES = {
    "one": [(4, [5, 5])],
    "ragged": [(7, [30, 29, 12, 2, 1]), (1, [9, 3]), (3, [1])],
    "prompts only": [(5, [1, 1]), (2, [1])],
}


def visible(batch: Batch, window: int | None) -> Tensor:
    """(L, L): whether a token sees another, from the tokens' groups, traces and positions."""
    length = batch.input_ids.shape[1]
    group, trace = torch.empty(length, dtype=torch.long), torch.empty(length, dtype=torch.long)
    place = 0
    for bucket in batch.buckets:
        for number in range(bucket.count):
            count = int(((bucket.tokens // bucket.longest) == number).sum())
            group[place : place + count] = place if bucket.prompt.start == bucket.prompt.stop else bucket.prompt.start
            trace[place : place + count] = -1 if bucket.prompt.start == bucket.prompt.stop else place
            place += count
    position = batch.position_ids[0]
    distance = position[:, None] - position[None]
    seen = (group[:, None] == group) & ((trace[None] == -1) | (trace[:, None] == trace)) & (distance >= 0)
    return seen & (distance < window) if window else seen


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    times = query.shape[1] // key.shape[1]
    query, key, value = (side.double() for side in (query, key, value))
    key, value = (side.repeat_interleave(times, 1) for side in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def sides(batch: Batch, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value; values are wider than keys, as in some models."""
    torch.manual_seed(0)
    length = batch.input_ids.shape[1]
    shapes = ((heads, 8), (key_heads, 8), (key_heads, 6))
    return [torch.randn(1, count, length, size, dtype=dtype, requires_grad=True) for count, size in shapes]


def gradients(found: Tensor, of: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((found * torch.randn(found.shape, dtype=torch.float64)).sum(), of))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_a_mask_over_the_whole_row(kernel: str, window: int | None, shape: str) -> None:
    batch = batch_of(SHAPES[shape])
    for heads in ((4, 2), (3, 3), (6, 1)):
        given = sides(batch, *heads)
        options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "dropout": KERNELS[kernel]}
        found, _ = group_attention(nn.Module(), *given, None, packed=batch, **options)
        expected = dense(*given, visible(batch, window), 0.3)
        assert found.shape == expected.shape
        assert torch.allclose(found.double(), expected, atol=1e-5)
        for one, other in zip(gradients(found, given), gradients(expected, given), strict=True):
            assert torch.allclose(one, other, atol=2e-5)


def test_scale_is_the_usual_one_unless_given() -> None:
    batch = batch_of(SHAPES["ragged"])
    given = sides(batch)
    found, _ = group_attention(nn.Module(), *given, None, packed=batch)
    assert torch.allclose(found.double(), dense(*given, visible(batch, None), 8**-0.5), atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel: str) -> None:
    batch = batch_of(SHAPES["ragged"])
    given = sides(batch, dtype=torch.bfloat16)
    found, _ = group_attention(nn.Module(), *given, None, packed=batch, dropout=KERNELS[kernel])
    expected = dense(*given, visible(batch, None), 8**-0.5)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, atol=0.03)
    for one, other in zip(gradients(found, given), gradients(expected, given), strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(kernel: str) -> None:
    """Norms of queries and keys leave them in float32 under autocast, beside values in bfloat16."""
    batch = batch_of(SHAPES["ragged"])
    query, key, value = sides(batch)
    given = [query, key, value.detach().bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = group_attention(nn.Module(), *given, None, packed=batch, dropout=KERNELS[kernel])
        found_gradients = gradients(found, given)
    expected = dense(*given, visible(batch, None), 8**-0.5)
    assert torch.allclose(found.double(), expected, atol=0.03)
    for one, other in zip(found_gradients, gradients(expected, given), strict=True):
        assert (one - other).abs().max() < 0.03 * other.abs().max()


def test_in_one_part_and_in_many() -> None:
    """More scores than a CPU's caches hold are computed in parts; the result does not depend on them."""
    torch.manual_seed(0)
    count, asking, kept = 9, 256, 300
    assert count * asking * kept > attention.SCORES
    assert asking * kept < attention.SCORES
    query, key, value = (torch.randn(count, n, 8, requires_grad=True) for n in (asking, kept, kept))
    mask = torch.zeros(64, kept).masked_fill(torch.rand(64, kept) < 0.5, -math.inf)
    whole = MatmulAttention.apply(query, key, value, mask, 0.3)
    each = torch.cat([MatmulAttention.apply(*(s[n : n + 1] for s in (query, key, value)), mask, 0.3) for n in range(9)])
    assert torch.allclose(whole, each, atol=1e-6)
    of = [query, key, value]
    for one, other in zip(gradients(whole, of), gradients(each, of), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_dropout_drops() -> None:
    batch = batch_of(SHAPES["ragged"])
    given = sides(batch)
    plain, dropped = (
        group_attention(nn.Module(), *given, None, packed=batch, dropout=rate)[0] for rate in (1e-12, 0.5)
    )
    assert not torch.allclose(plain, dropped, atol=0.1)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_groups_do_not_have_is_refused(name: str) -> None:
    batch = batch_of(SHAPES["one"])
    with pytest.raises(Unsupported, match=name):
        group_attention(nn.Module(), *sides(batch), None, packed=batch, **{name: torch.ones(1)})


def test_masks_of_the_model_and_missing_groups_are_refused() -> None:
    batch = batch_of(SHAPES["one"])
    with pytest.raises(Unsupported, match="masks of their own"):
        group_attention(nn.Module(), *sides(batch), torch.ones(1), packed=batch)
    with pytest.raises(Unsupported):
        group_attention(nn.Module(), *sides(batch), None)
