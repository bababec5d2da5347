"""GKD and ULD through the real command line: refused before anything is made, killed and resumed, compared."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.compare.cells import Wanted, design_of
from orpo_distill.compare.running import compare
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.experiment import run
from orpo_distill.loading import load_config
from orpo_distill.pilot import pilot, seconds_a_pair
from orpo_distill.preview import plan_table
from tests.checkpoints import save_tiny_checkpoint
from tests.test_end_to_end import COMMAND, cli, experiment

GKD = {"type": "gkd", "student_share": 0.5, "max_new_tokens": 12}
QUIET = {"evaluate": {"teacher": False}, "mechanisms": {"enabled": False}}
SHORT = {"pairs_per_step": 4, "learning_rate": 1e-3, "max_length": 256, "steps_per_round": 4}
ALL_SAVED = {**SHORT, "checkpoint_minutes": 1e-6}
OTHER = (("T", "h"), ("i", "s"), ("e", "r"))  # merges of a teacher with tokens of its own


def taught(folder: Path, merges: tuple[tuple[str, str], ...] = (), **changes: Any) -> Path:
    """An experiment whose scripted teacher has a checkpoint, with the student's tokens unless there are merges."""
    scorer = folder / ("other" if merges else "scorer")
    if not scorer.exists():
        save_tiny_checkpoint(scorer, "gpt_neox", seed=7, merges=merges)
    sampler = {"type": "scripted", "path": str(folder / "teacher.jsonl")}
    teacher = {"model": "script", "samples": 2, "sampler": sampler, "scorer": str(scorer)}
    return experiment(folder, **{"teacher": teacher, "objective": GKD, "train": SHORT, **QUIET, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_vocabulary_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = load_config(taught(tmp_path, OTHER))
    message = "expected a teacher with the student's vocabulary for gkd, found that 3 tokens differ"
    with pytest.raises(ConfigError, match=message):
        run(config)
    with pytest.raises(ConfigError, match=message):
        pilot(config, 2)
    assert [path.name for path in (tmp_path / "runs/demo").iterdir()] == [".lock"]
    with pytest.raises(ConfigError, match=message):
        plan_table(config)
    asked = Wanted("orpo-off,gkd", seeds=1, learning_rates="1e-3", name="both")
    with pytest.raises(ConfigError, match=message):
        compare(design_of([config], asked))
    assert not (tmp_path / "runs/both/shared").exists()
    assert plan_table(load_config(taught(tmp_path, OTHER, objective="uld")))[1] == []


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = load_config(taught(tmp_path), ["teacher.scorer_device=cuda:99"])
    with pytest.raises(ModelError, match="expected the device 'cuda:99'"):
        run(config)
    assert not (tmp_path / "runs/demo/problems").exists()


@pytest.mark.parametrize("name", ["gkd", "uld"])
def test_a_teacher_of_texts_alone_is_refused_at_once(name: str, tmp_path: Path) -> None:
    message = (
        f"expected a teacher that lends its whole distributions, from a local checkpoint, for {name}, found scripted"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(experiment(tmp_path, objective=name))


def test_uld_trains_across_tokenizers(tmp_path: Path) -> None:
    folder = run(load_config(taught(tmp_path, OTHER, objective="uld", rounds=1)), until="round-1/train")
    metrics = json.loads((folder / "round-1/train/train.json").read_text())
    assert metrics["teacher_tokens"] > 0 and "written_tokens" not in metrics
    log = lines(folder / "round-1/train/log.jsonl")
    assert all(0 < line["distance"] < 2 and line["tokens_a_span"] > 1 for line in log)


@pytest.mark.slow
def test_killed_between_steps_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Half of the texts are written in the step: the coins and the texts are those of the run without a kill."""
    until = "round-2/train"
    whole = run(load_config(taught(tmp_path / "whole", train=ALL_SAVED)), until)
    log = lines(whole / "round-2/train/log.jsonl")
    assert any(line["written_tokens"] for line in log) and all(line["teacher_tokens"] for line in log)
    path = taught(tmp_path / "killed", train=ALL_SAVED)
    killed = tmp_path / "killed/runs/demo"
    for checkpoint in ("round-1/train/checkpoint-2", "round-2/train/checkpoint-6"):
        process = subprocess.Popen([*COMMAND, "run", str(path), "--until", until], stderr=subprocess.DEVNULL)
        while not (killed / checkpoint).exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    run(load_config(path), until)
    for name in ("log.jsonl", "model/model.safetensors"):
        for number in (1, 2):
            files = [folder / f"round-{number}/train" / name for folder in (killed, whole)]
            assert files[0].read_bytes() == files[1].read_bytes(), files[0]


@pytest.mark.slow
def test_compared_with_the_others(tmp_path: Path) -> None:
    path = taught(tmp_path, rounds=1)
    asked = ("--methods", "diverse-cot,uld,gkd", "--seeds", 1, "--learning-rates", "1e-3", "--budgets", "epochs")
    done = cli("compare", path, *asked)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/demo-compare"
    cells = {cell["method"]: cell for cell in json.loads((folder / "compare.json").read_bytes())["cells"]}
    assert set(cells) == {"zero-shot", "diverse-cot", "uld", "gkd"}
    assert cells["gkd"]["scored_tokens"] > cells["diverse-cot"]["scored_tokens"] == 0
    assert cells["gkd"]["sampled_tokens"] > cells["uld"]["sampled_tokens"]
    assert (folder / "gkd-epochs-s0/round-1/pairs").samefile(folder / "diverse-cot-epochs-s0/round-1/pairs")


def test_a_pilot_times_the_teacher_too(tmp_path: Path) -> None:
    config = load_config(taught(tmp_path, rounds=1))
    folder = run(config, until="round-1/pairs")
    assert seconds_a_pair(config, folder / "round-1/pairs") > 0
