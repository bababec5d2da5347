"""ExPO: arithmetic on state dicts, whatever the weights are stored and tied as; and which alpha is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orpo_distill.errors import DataError, ModelError
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.stages.extrapolate import ChooseOptions, ExtrapolateOptions, choose, extrapolate
from tests.checkpoints import save_tiny_checkpoint


def stage(folder: Path, seed: int, architecture: str) -> Path:
    """A train stage's folder with a model of its own."""
    save_tiny_checkpoint(folder / "model", architecture, seed=seed)
    return folder


def moved(options: ExtrapolateOptions, out: Path, **inputs: Path) -> dict[str, Any]:
    out.mkdir()
    return extrapolate(options, inputs, out)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt_neox", "gemma3_tied"])
def test_it_is_arithmetic_on_the_state_dicts(architecture: str, tmp_path: Path) -> None:
    first = save_tiny_checkpoint(tmp_path / "first", architecture)
    trained = stage(tmp_path / "trained", 1, architecture)
    options = ExtrapolateOptions(alpha=0.3, initial=str(first), dtype="float32")
    metrics = moved(options, tmp_path / "out", model=trained)
    before, after, found = (
        load_model(str(folder), "float32", "cpu").state_dict()
        for folder in (first, trained / "model", tmp_path / "out/model")
    )
    assert found.keys() == after.keys()
    for name in found:
        assert torch.allclose(found[name], before[name] + 1.3 * (after[name] - before[name]), atol=1e-6), name
    files = [load_file(folder / "model.safetensors").keys() for folder in (trained / "model", tmp_path / "out/model")]
    assert files[0] == files[1]  # what is tied is written once
    assert metrics["rms_trained"] > 0
    assert load_tokenizer(str(tmp_path / "out/model")).get_vocab() == load_tokenizer(str(first)).get_vocab()


def test_half_precision_is_left_only_at_the_end(tmp_path: Path) -> None:
    """The origin is rounded as training rounded it, so that what did not move stays where it is."""
    first = save_tiny_checkpoint(tmp_path / "first")
    trained = stage(tmp_path / "trained", 0, "llama")
    half = {name: weight.bfloat16() for name, weight in load_file(first / "model.safetensors").items()}
    save_file(half, trained / "model/model.safetensors", metadata={"format": "pt"})
    options = ExtrapolateOptions(alpha=0.5, initial=str(first), dtype="bfloat16")
    assert moved(options, tmp_path / "out", model=trained)["rms_trained"] == 0
    found = load_file(tmp_path / "out/model/model.safetensors")
    assert all(torch.equal(found[name], half[name]) for name in half)


def test_the_warm_up_may_be_the_origin(tmp_path: Path) -> None:
    warm, trained = stage(tmp_path / "warm", 2, "llama"), stage(tmp_path / "trained", 2, "llama")
    options = ExtrapolateOptions(alpha=0.5, initial=str(tmp_path / "nothing here"), dtype="float32")
    assert moved(options, tmp_path / "out", model=trained, origin=warm)["rms_trained"] == 0


def test_another_model_is_refused(tmp_path: Path) -> None:
    trained = stage(tmp_path / "trained", 0, "llama")
    other = save_tiny_checkpoint(tmp_path / "other", vocab="abc")
    options = ExtrapolateOptions(alpha=0.5, initial=str(other), dtype="float32")
    with pytest.raises(ModelError, match=r"expected the same weights before and after training, found that .* differs"):
        moved(options, tmp_path / "out", model=trained)


def evaluated(folder: Path, correct: int, split: str = "validation") -> Path:
    folder.mkdir()
    row = {"policy": "x", "split": split, "n": 10, "correct": correct, "accuracy": correct / 10}
    (folder / "results.json").write_text(json.dumps([row, row | {"split": "test", "correct": 10 - correct}]))
    return folder


@pytest.mark.parametrize(("right", "best"), [((3, 5, 4), 0.1), ((5, 5, 5), 0.0), ((1, 2, 3), 0.5)])
def test_most_right_on_validation_and_the_least_of_equal_ones(
    right: tuple[int, ...], best: float, tmp_path: Path
) -> None:
    alphas = (0.0, 0.1, 0.5)
    inputs = {}
    for alpha, correct in zip(alphas, right, strict=True):
        (tmp_path / f"m{alpha:g}/model").mkdir(parents=True)
        (tmp_path / f"m{alpha:g}/model/config.json").write_text(f"{alpha:g}")
        inputs |= {f"model:{alpha:g}": tmp_path / f"m{alpha:g}"}
        inputs |= {f"evaluate:{alpha:g}": evaluated(tmp_path / f"e{alpha:g}", correct)}
    (tmp_path / "out").mkdir()
    options = ChooseOptions(alpha=alphas, policies=("a", "b", "c"))
    found = choose(options, inputs, tmp_path / "out")
    assert found["alpha"] == best and [row["correct"] for row in found["tried"]] == list(right)
    assert (tmp_path / "out/model/config.json").read_text() == f"{best:g}"
    assert json.loads((tmp_path / "out/choice.json").read_text()) == found


def test_without_validation_there_is_no_choice(tmp_path: Path) -> None:
    inputs = {"evaluate:0": evaluated(tmp_path / "e", 3, "test"), "model:0": tmp_path}
    with pytest.raises(DataError, match=r"expected validation problems to choose extrapolate\.alpha on, found none"):
        choose(ChooseOptions(alpha=(0.0,), policies=("a",)), inputs, tmp_path)
