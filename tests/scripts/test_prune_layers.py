"""Layers are chosen by what they do, and what is written is the model that passes them by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from orpo_distill.models import load_model, load_tokenizer
from scripts.prune_layers import block_distances, hidden_states, main
from tests.checkpoints import save_tiny_checkpoint

WINDOWS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {},
    "qwen3": {},
    "gpt_neox": {},
    "gemma3": {"layer_types": WINDOWS},
    "gemma3_tied": {"layer_types": WINDOWS},
}
TEXT = "a text that is longer than the window of eight tokens"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A trace, a problem, and a row with neither."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": TEXT}, {"question": "Is it?", "answer": "no"}, {"label": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(checkpoint: Path, out: Path, texts: Path, *more: object) -> int:
    return main([str(checkpoint), str(out), "--texts", str(texts), *map(str, more)])


def dropped(said: str) -> list[int]:
    first, last = re.search(r"dropping layers (\d+) to (\d+)", said).groups()
    return list(range(int(first), int(last) + 1))


def logits_passing_by(folder: Path, numbers: list[int]) -> torch.Tensor:
    """Of `TEXT`, with these layers' forward passes doing nothing."""
    model, ids = load_model(str(folder)), load_tokenizer(str(folder))(TEXT, return_tensors="pt")["input_ids"]
    layers = next(part for part in model.base_model.children() if isinstance(part, torch.nn.ModuleList))
    for number in numbers:
        layers[number].forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_distances_are_angles_in_half_turns() -> None:
    """States at 0, 90, 120 and 300 degrees, of any length: one layer turns by 90, 30, 180; two by 120 and 150."""
    polar = torch.tensor([[1.0, 0], [9, 90], [2, 120], [1, 300]])
    angles = polar[:, 1] * torch.pi / 180
    states = polar[:, None, :1] * torch.stack([angles.cos(), angles.sin()], dim=1)[:, None]
    assert block_distances(states, 1)[:, 0].tolist() == pytest.approx([90 / 180, 30 / 180, 180 / 180], abs=1e-3)
    assert block_distances(states, 2)[:, 0].tolist() == pytest.approx([120 / 180, 150 / 180], abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_the_model_that_passes_the_block_by(
    tmp_path: Path, texts: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save_tiny_checkpoint(tmp_path / "whole", family, num_hidden_layers=5, **FAMILIES[family])
    assert run(whole, tmp_path / "out", texts, "--share", 0.4) == 0
    block = dropped(capsys.readouterr().err)
    found = logits_passing_by(tmp_path / "out", [])
    assert len(block) == 2
    assert torch.equal(found, logits_passing_by(whole, block))
    assert not torch.allclose(found, logits_passing_by(whole, []), atol=0.1)
    config, before = AutoConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(whole)
    assert config.num_hidden_layers == 3
    assert (config.dtype, config.tie_word_embeddings) == (before.dtype, before.tie_word_embeddings)
    if "layer_types" in FAMILIES[family]:
        assert config.layer_types == [kind for number, kind in enumerate(WINDOWS) if number not in block]
    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == load_tokenizer(str(whole)).get_vocab()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_that_the_model_shows(tmp_path: Path, family: str) -> None:
    """transformers gives the inputs of all layers too; its last state is one norm further."""
    folder = str(save_tiny_checkpoint(tmp_path, family, num_hidden_layers=5, **FAMILIES[family]))
    model, ids = load_model(folder), load_tokenizer(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        shown = model(ids, output_hidden_states=True).hidden_states
    states = hidden_states(model, ids)
    assert states.shape == (6, ids.shape[1], 16)
    assert torch.equal(states[:5], torch.cat(shown[:5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_that_does_nothing_goes(
    tmp_path: Path, texts: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third and the fourth layer add next to nothing. The number type on disk stays what it was."""
    whole = save_tiny_checkpoint(tmp_path / "whole", num_hidden_layers=5)
    model = load_model(str(whole))
    for layer in model.model.layers[2:4]:
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.down_proj.weight.data *= 1e-3
    model.to(dtype).save_pretrained(whole)
    assert run(whole, tmp_path / "out", texts, "--share", 0.4) == 0
    assert dropped(capsys.readouterr().err) == [2, 3]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert torch.equal(logits_passing_by(tmp_path / "out", []), logits_passing_by(whole, [2, 3]))


@pytest.mark.parametrize("share", [0, 0.05, 0.99, 1.5])
def test_a_share_that_drops_no_layer_or_all(
    tmp_path: Path, texts: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save_tiny_checkpoint(tmp_path / "whole")
    assert run(whole, tmp_path / "new" / "out", texts, "--share", share) == 2
    assert f"expected a --share that drops at least 1 of 2 layers and leaves at least 1, found {share:g}; try 0.50" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()


def test_layers_that_depend_on_their_number(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 may divide a layer's attention scores by its number: those behind the block would change."""
    whole = save_tiny_checkpoint(tmp_path / "whole", "gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    model = load_model(str(whole))
    for part in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
        part.weight.data *= 1e-3
    model.save_pretrained(whole)
    assert run(whole, tmp_path / "out", texts, "--share", 0.34) == 1
    assert "its layers depend on their numbers, so it cannot be pruned" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_mistakes_are_one_message(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = save_tiny_checkpoint(tmp_path / "whole")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"answer": "no"}\n')
    for arguments, code, message in (
        ((tmp_path / "nowhere", tmp_path / "out", texts), 1, "found nothing at"),
        ((whole, whole, texts), 1, "expected nothing at"),
        ((whole, tmp_path / "out", empty), 1, "expected rows with a field text or question"),
        ((whole, tmp_path / "out", tmp_path / "none.jsonl"), 1, "found no such file"),
        ((whole, empty / "out", texts, "--share", 0.5), 1, "make room or mend it"),
        ((whole, tmp_path / "out", texts, "--length", 1), 1, "expected a text of two tokens or more"),
        ((whole, tmp_path / "out", texts, "--length", 0), 2, "expected --limit and --length above 0"),
    ):
        assert run(*arguments) == code
        said = capsys.readouterr().err
        assert "error: expected" in said and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
