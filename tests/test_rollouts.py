"""Texts that the student writes inside a train stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.groups import Row
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives import Writing
from orpo_distill.packing import collate
from orpo_distill.records import Pair
from orpo_distill.rollouts import Rollout, Writer, rollout_seeds
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.decode import Job, Rules, decode
from orpo_distill.scoring import prepare
from tests.checkpoints import CONTEXT, EOS, save_tiny_checkpoint

PROMPTS = [(1, 4, 5), (1, 6, 6, 4), (1, 4, 5), (1, 5)]
SEEDS = [11, 12, 13, 14]


def row(problem: str, prompt: tuple[int, ...] = PROMPTS[0]) -> Row:
    pair = Pair(problem, (), "", "", "", "", "", "")
    return Row(1, pair, prompt, (4, 5, 2), (6, 2))


def loaded(folder: Path, architecture: str = "llama", seed: int = 0) -> tuple[Any, Any]:
    save_tiny_checkpoint(folder, architecture, vocab="abc", seed=seed)
    return load_model(str(folder), "float32", "cpu"), load_tokenizer(str(folder))


def drawn(model: Any, limit: int = 20) -> list[Rollout]:
    """What the sampler's own loop draws."""
    jobs = [Job(place, prompt, seed, limit) for place, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))]
    found = {one.index: one for one in decode(model, jobs, Rules(Decoding(temperature=1), ends=(2,)), 8)}
    ended = [found[place] for place in range(len(jobs))]
    return [Rollout((*one.tokens, *((2,) if one.stopped else ())), not one.stopped) for one in ended]


def test_rollouts_are_what_the_sampler_draws_with_their_end_token(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path)
    found = Writer(model, tokenizer, Writing(5))(PROMPTS, SEEDS)
    assert found == drawn(model, 5)
    assert {one.cut for one in found} == {False, True}
    assert tokenizer.eos_token == EOS
    assert all((one.tokens[-1] == 2) == (not one.cut) and 2 not in one.tokens[:-1] for one in found)
    assert all(len(one.tokens) == 5 for one in found if one.cut)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_a_model_in_training_writes_the_same_and_goes_on_as_before(tmp_path: Path, architecture: str) -> None:
    """Prepared for packed batches, in training mode with dropout; mamba neither packs nor shares a cache."""
    model, tokenizer = loaded(tmp_path, architecture)
    expected = Writer(model, tokenizer, Writing(20))(PROMPTS, SEEDS)
    writer = Writer(model, tokenizer, Writing(20))
    prepare(model, [row("a")])
    batch = collate([row("a"), row("b", PROMPTS[1])], False)
    before = model(packed=batch)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    settings, state = model.generation_config, torch.get_rng_state()
    assert writer(PROMPTS, SEEDS) == expected
    assert model.training and model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert torch.equal(model(packed=batch), before)
    model.train()
    model(packed=batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_rows_that_only_pad_the_embeddings_are_never_drawn(tmp_path: Path, architecture: str) -> None:
    """A teacher that lacks them could not read the text."""
    model, tokenizer = loaded(tmp_path, architecture)
    model.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    found = Writer(model, tokenizer, Writing(20, temperature=5.0))(PROMPTS, SEEDS)
    assert max(max(one.tokens) for one in found) < len(tokenizer)
    assert architecture == "mamba" or any(max(one.tokens) >= len(tokenizer) for one in drawn(model))  # it would be


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_adapters_write_as_the_model_that_they_make(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded(tmp_path)
    plain = Writer(model, tokenizer, Writing(20))(PROMPTS, SEEDS)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    writer = Writer(adapted, tokenizer, Writing(20))
    prepare(adapted, [row("a")])
    found = writer(PROMPTS, SEEDS)
    assert found != plain
    assert found == drawn(adapted.merge_and_unload())


def test_the_teacher_writes_along_where_it_has_a_share(tmp_path: Path) -> None:
    """Nearly alone at 0.999999, not at all at 0."""
    model, tokenizer = loaded(tmp_path / "student")
    teacher, _ = loaded(tmp_path / "teacher", "qwen3", seed=3)
    of_teacher, own = drawn(teacher), drawn(model)
    assert Writer(model, tokenizer, Writing(20, teacher_share=0.999999), teacher)(PROMPTS, SEEDS) == of_teacher
    assert Writer(model, tokenizer, Writing(20), teacher)(PROMPTS, SEEDS) == own != of_teacher


def test_the_context_of_either_model_ends_a_rollout(tmp_path: Path) -> None:
    """The student's prompt leaves five tokens; the teacher reads three more before it."""
    model, tokenizer = loaded(tmp_path / "student")
    teacher, _ = loaded(tmp_path / "teacher", seed=3)
    prompt, seeds = (1, *[4, 5] * ((CONTEXT - 6) // 2)), range(8)
    alone = Writer(model, tokenizer, Writing(20))([prompt] * 8, seeds)
    assert max(len(one.tokens) for one in alone) == CONTEXT - len(prompt) == 5
    taught = Writer(model, tokenizer, Writing(20), teacher)([prompt] * 8, seeds, [(6, 6, 6, *prompt)] * 8)
    assert [one.tokens for one in taught] == [one.tokens[:2] for one in alone]


def test_no_prompts_no_rollouts(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path)
    assert Writer(model, tokenizer, Writing(20))([], []) == []


def test_a_cache_of_its_own_cannot_be_shared_with_a_teacher(tmp_path: Path) -> None:
    student, tokenizer = loaded(tmp_path / "student")
    teacher, _ = loaded(tmp_path / "teacher", "mamba")
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(ConfigError, match=r"found MambaForCausalLM; set objective\.teacher_share: 0"):
            Writer(pair[0], tokenizer, Writing(20, teacher_share=0.2), pair[1])


def test_a_teacher_whose_numbers_overflow_is_not_taken_for_one_with_a_cache_of_its_own(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path / "student")
    teacher, _ = loaded(tmp_path / "teacher", "gpt_neox")
    with torch.no_grad():
        teacher.get_output_embeddings().weight.fill_(torch.inf)
    writer = Writer(model, tokenizer, Writing(5, teacher_share=0.2), teacher)
    with pytest.raises(ModelError, match="from LlamaForCausalLM and GPTNeoXForCausalLM, found NaN; load"):
        writer(PROMPTS, SEEDS)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_broken_weights_are_one_message(tmp_path: Path, architecture: str) -> None:
    model, tokenizer = loaded(tmp_path, architecture)
    writer = Writer(model, tokenizer, Writing(20))
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"expected probabilities of the next token from .*, found NaN"):
        writer(PROMPTS, SEEDS)


def test_seeds_are_of_the_run_the_step_the_problem_and_the_row_among_its_rows() -> None:
    rows = [row("a"), row("b"), row("a")]
    seeds = rollout_seeds(rows, 3, 0)
    assert len(set(seeds)) == 3
    assert rollout_seeds([rows[1], rows[0], rows[2]], 3, 0) == [seeds[1], seeds[0], seeds[2]]
    assert not {*seeds} & {*rollout_seeds(rows, 3, 1), *rollout_seeds(rows, 4, 0)}
