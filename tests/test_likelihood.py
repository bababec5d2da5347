"""Likelihood of texts under a checkpoint: what the model itself gives, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_distill.config import TrainSection
from orpo_distill.likelihood import Response, mean_logps
from orpo_distill.records import Message
from orpo_distill.samplers.prompts import encode_prompt, end_of_response
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint

TRAIN = TrainSection(max_length=120, tokens_per_batch=100)


def prompt(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


RESPONSES = [
    Response(prompt("one"), "The answer is 1.", False),
    Response(prompt("one"), "The answer is 1.", True),
    Response(prompt("one"), "Hm, 2", False),
    Response(prompt("another question"), "The answer is 1.", False),
    Response(prompt("another question"), "so it is <eos> and more", True),
]


def plainly(model: Any, tokenizer: Any, response: Response) -> float:
    """The mean log-probability of the response's tokens from the model's own logits, one text at a time."""
    asked = encode_prompt(tokenizer, response.prompt)
    ids = tokenizer(response.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = ids if response.cut else [*ids, end_of_response(tokenizer)]
    with torch.no_grad():
        logps = model(torch.tensor([[*asked, *ids]])).logits[0].log_softmax(-1)
    return sum(logps[len(asked) + place - 1, token].item() for place, token in enumerate(ids)) / len(ids)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])  # one shares prompts, one cannot
def test_it_is_the_models_own(tmp_path: Path, architecture: str) -> None:
    folder = str(save_tiny_checkpoint(tmp_path / "tiny", architecture, chat_template=CHAT_TEMPLATE))
    found = mean_logps(folder, RESPONSES, TRAIN, "test")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert set(found) == set(RESPONSES)
    for response, value in found.items():
        assert value == pytest.approx(plainly(model, tokenizer, response), abs=1e-4)


def test_the_size_of_a_batch_does_not_matter(tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path / "tiny"))
    found = [
        mean_logps(folder, RESPONSES, TrainSection(max_length=120, tokens_per_batch=tokens), "test")
        for tokens in (1, 40, 5000)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] == pytest.approx(found[2], abs=1e-5)


def test_what_does_not_fit_or_is_empty_is_left_out(tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path / "tiny"))
    extra = [Response(prompt("one"), "x" * 120, False), Response(prompt("one"), "", True)]
    assert set(mean_logps(folder, [*RESPONSES, *extra], TRAIN, "test")) == set(RESPONSES)
    assert mean_logps(folder, extra, TRAIN, "test") == {}
    assert mean_logps(folder, [], TRAIN, "test") == {}


def test_what_is_longer_than_the_models_context_is_left_out(tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path / "tiny", max_position_embeddings=60))
    long = Response(prompt("one"), "x" * 60, False)
    assert set(mean_logps(folder, [*RESPONSES, long], TRAIN, "test")) == set(RESPONSES)
    assert mean_logps(folder, [long], TRAIN, "test") == {}


def test_a_model_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "norm" in name)
    tensors[name][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert mean_logps(str(folder), RESPONSES, TRAIN, "test") == {}
