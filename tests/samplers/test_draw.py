"""Random numbers, and the choice of a token by them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from orpo_distill.samplers import Decoding
from orpo_distill.samplers.draw import draw, kept, uniforms


def numbers(seed: int, count: int) -> np.ndarray:
    return uniforms(np.full(count, seed, np.uint64), np.arange(count, dtype=np.uint64))


def test_uniforms_are_splitmix64() -> None:
    """The published outputs of SplitMix64 for seed 1234567; a uniform is the upper 53 bits over 2^53."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert numbers(1234567, 4).tolist() == [(value >> 11) / 2**53 for value in published]


def test_uniforms_are_uniform_and_streams_of_near_seeds_unrelated() -> None:
    """Mean 1/2 and variance 1/12 within 4 standard errors of 20,000 numbers; correlation within 4/sqrt(n)."""
    first, second = numbers(0, 20_000), numbers(1, 20_000)
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5
    assert abs(first.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 20_000**0.5
    assert first.min() >= 0 and first.max() < 1


def test_draw_takes_the_token_where_the_cumulative_probability_passes_the_chance() -> None:
    """Probabilities 0.1, 0.2, 0.3, 0.4 have the cumulative sums 0.1, 0.3, 0.6, 1."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(6, 1)
    chance = torch.tensor([0.0, 0.09, 0.11, 0.59, 0.61, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, chance, Decoding(temperature=1)).tolist() == [0, 0, 1, 2, 3, 3]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).repeat(3, 1)
    chance = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, chance, Decoding(temperature=1)).tolist() == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocabulary=st.sampled_from([1, 3, 256, 257, 1000]), share=st.floats(0, 1))
def test_the_search_in_blocks_finds_what_one_cumulative_sum_finds(seed: int, vocabulary: int, share: float) -> None:
    """Up to rounding: the chance lies between the sums before and after the token, which has a probability."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, vocabulary, generator=generator)
    out = torch.rand(4, vocabulary, generator=generator) < share
    out[:, torch.randint(vocabulary, (1,), generator=generator)] = False
    logits = logits.masked_fill(out, float("-inf"))
    chance = torch.tensor([0.0, 0.3, 0.99, 1 - 2**-53], dtype=torch.float64)
    found = draw(logits, chance, Decoding(temperature=1))[:, None]
    p = logits.double().softmax(-1)
    after = p.cumsum(-1).gather(1, found)[:, 0]
    here = p.gather(1, found)[:, 0]
    assert (here > 0).all()
    assert (after - here <= chance + 1e-6).all() and (chance <= after + 1e-6).all()


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), Decoding(temperature=0)).tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 999, 5000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
def test_filters_keep_what_transformers_keeps(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    """On 1,000 tokens, so that top-p has to look further than its first candidates for flat distributions."""
    scale = 1 + seed % 5
    logits = scale * torch.randn(3, 1000, generator=torch.Generator().manual_seed(seed))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = kept(logits, Decoding(temperature=temperature, top_k=top_k, top_p=top_p))
    found = found / found.sum(-1, keepdim=True)
    assert torch.allclose(found, expected.softmax(-1), atol=2e-4)


def test_equally_likely_tokens_at_the_limit_are_all_kept() -> None:
    found = kept(torch.zeros(1, 4), Decoding(temperature=1, top_k=2))
    assert found.tolist() == [[0.25] * 4]
