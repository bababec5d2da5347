import json
from pathlib import Path

import pytest

from orpo_distill.checkpoints import is_whole, newest, publish, seal, step_of, sweep
from orpo_distill.errors import RunError


def checkpoint(out: Path, step: int, sealed: bool = True) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_text(f"{name} {step}")
    if sealed:
        seal(folder)
    return folder


def test_whole_only_when_sealed_and_unharmed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1, sealed=False)
    assert not is_whole(folder)
    seal(folder)
    assert is_whole(folder)
    (folder / "optimizer.pt").write_text("cut")
    assert not is_whole(folder)
    seal(folder)
    (folder / "optimizer.pt").unlink()
    assert not is_whole(folder)


def test_newest_counts_steps_and_ignores_what_is_not_whole(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    checkpoint(tmp_path, 9)
    latest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sealed=False)
    assert newest(tmp_path) == latest


def test_sweep_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 12, sealed=False)
    sweep(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-11"}
    sweep(tmp_path / "nowhere", keep=2)


@pytest.mark.parametrize("interrupted", [False, True])
def test_publish_makes_a_model_folder(tmp_path: Path, interrupted: bool) -> None:
    """Killed in the middle, it can be called again on what it left."""
    checkpoint(tmp_path, 3)
    if interrupted:
        (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint")
        (tmp_path / "model.tmp").mkdir()
        (tmp_path / "model.tmp" / "config.json").write_text("half")
    found = newest(tmp_path)
    assert found is not None
    publish(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "model"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    assert (tmp_path / "model" / "config.json").read_text() == "config.json 3"
    assert is_whole(tmp_path / "checkpoint") and step_of(tmp_path / "checkpoint") == 3


@pytest.mark.parametrize("content", ["", "{}", '{"global_step": "x"}', "[]"])
def test_unreadable_state_is_an_error(tmp_path: Path, content: str) -> None:
    folder = checkpoint(tmp_path, 3)
    (folder / "trainer_state.json").write_text(content)
    with pytest.raises(RunError, match=r"expected a whole checkpoint in .*checkpoint-3, found"):
        step_of(folder)
