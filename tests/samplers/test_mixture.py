"""Texts that two models write together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from orpo_distill.errors import ModelError
from orpo_distill.models import load_model
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.decode import Job, Rules, decode
from orpo_distill.samplers.draw import uniforms
from orpo_distill.samplers.mixture import Partner, mixed
from tests.checkpoints import save_tiny_checkpoint

PLAIN = Decoding(temperature=1)
READ = {(1, 4, 5): (1, 4, 5), (1, 6): (1, 5, 5, 4), (1, 4): (1, 4)}
"""Prompts of the first model, as the second reads them: one is longer and ends with another token."""


def two_models(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Of different architecture, with the same 7 tokens."""
    own = save_tiny_checkpoint(folder / "own", vocab="abc", seed=1)
    other = save_tiny_checkpoint(folder / "other", "qwen3", vocab="abc", seed=2)
    return load_model(str(own), device="cpu"), load_model(str(other), device="cpu")


def mixture(
    models: tuple[torch.nn.Module, torch.nn.Module], prompt: tuple[int, ...], text: tuple[int, ...], share: float
) -> torch.Tensor:
    """(T + 1, V): the mixture before each of the text's T tokens and after the last, from plain passes."""
    found = []
    for model, ids in zip(models, ((*prompt, *text), (*READ[prompt], *text)), strict=True):
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids])).logits[0, -len(text) - 1 :].double().softmax(-1))
    return share * found[1] + (1 - share) * found[0]


def test_mixed_is_the_mixture_of_both_distributions() -> None:
    """q = (0.2, 0.8) and p = (0.6, 0.4) at share 0.25 give 0.15 + 0.15 = 0.3 and 0.1 + 0.6 = 0.7."""
    q, p = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
    assert torch.allclose(mixed(q.log(), 5 + p.log(), 0.25).exp(), torch.tensor([[0.3, 0.7]]))


def test_what_only_one_vocabulary_has_is_never_drawn() -> None:
    q, p = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.3, 0.2, 0.5]])
    assert torch.allclose(mixed(q.log(), p.log(), 0.25).exp(), torch.tensor([[0.3, 0.7]]))
    assert torch.allclose(mixed(p.log(), q.log(), 0.75).exp(), torch.tensor([[0.3, 0.7]]))


def test_every_token_is_the_one_where_the_mixtures_cumulative_probability_passes_the_chance(tmp_path: Path) -> None:
    """Exact: each token's random number is known, and must fall into the token's own interval (up to rounding).

    Rows leave and join: there is room for five of twelve.
    """
    models = two_models(tmp_path)
    prompts = [(1, 4, 5), (1, 6), (1, 6)]
    jobs = [Job(number, prompts[number % 3], seed=number, limit=12) for number in range(12)]
    rules = Rules(PLAIN, ends=(2,), partner=Partner(models[1], 0.3, READ))
    lengths = set()
    for drawn in decode(models[0], jobs, rules, 5):
        prompt = jobs[drawn.index].prompt
        tokens = [*drawn.tokens, *([] if drawn.end is None else [drawn.end])]
        after = mixture(models, prompt, tuple(tokens), 0.3)[:-1].cumsum(-1)
        chances = uniforms(np.full(len(tokens), drawn.index, np.uint64), np.arange(len(tokens), dtype=np.uint64))
        for chance, token, sums in zip(chances, tokens, after, strict=True):
            assert (sums[token - 1] if token else 0) - 1e-5 <= chance <= sums[token] + 1e-5
        lengths.add(len(tokens))
    assert len(lengths) > 3


def test_two_tokens_come_as_often_as_the_mixture_says(tmp_path: Path) -> None:
    """Chi-square over all 49 texts of two tokens; independent of the order in which probabilities are added up."""
    models, count, prompt = two_models(tmp_path), 3000, (1, 6)
    jobs = [Job(number, prompt, seed=number, limit=2) for number in range(count)]
    rules = Rules(PLAIN, ends=(), partner=Partner(models[1], 0.4, READ))
    found = Counter(tuple(drawn.tokens) for drawn in decode(models[0], jobs, rules, 512))
    first = mixture(models, prompt, (), 0.4)[-1]
    expected = {(a, b): float(first[a] * mixture(models, prompt, (a,), 0.4)[-1][b]) for a in range(7) for b in range(7)}
    often = [text for text, share in expected.items() if share * count >= 5]
    rest = 1 - sum(expected[text] for text in often)
    observed = [*(found[text] for text in often), count - sum(found[text] for text in often)]
    assert len(often) > 10
    assert chisquare(observed, [count * share for share in (*(expected[text] for text in often), rest)]).pvalue > 1e-3


def test_a_teacher_that_gives_nan_is_one_message(tmp_path: Path) -> None:
    own, other = two_models(tmp_path)
    with torch.no_grad():
        other.get_output_embeddings().weight[3] = float("nan")
    rules = Rules(PLAIN, ends=(2,), partner=Partner(other, 0.3, READ))
    with pytest.raises(ModelError, match="from LlamaForCausalLM and Qwen3ForCausalLM, found NaN; load the weights in"):
        list(decode(own, [Job(0, (1, 4), 0, 5)], rules, 4))
