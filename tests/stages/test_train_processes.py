"""Training that is killed, signalled, short of disk, or spread over processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orpo_distill.models import load_model
from orpo_distill.teaching import TeacherOptions
from tests.checkpoints import save_tiny_checkpoint
from tests.training import objective, options, ragged_pairs, run_train, weights, write_pairs

DRIVER = Path(__file__).with_name("train_driver.py")


def command(what: Any, pairs: Path, out: Path, *limit: str) -> list[str]:
    out.mkdir(exist_ok=True)
    path = out.with_suffix(".json")
    path.write_text(what.model_dump_json())
    return [str(DRIVER), str(pairs), str(out), str(path), *limit]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], env=environment(), stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until there is a whole checkpoint that matches `path`."""
    for _ in range(6000):
        if any((folder / "complete.json").exists() for folder in path.parent.glob(path.name)):
            return
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with dropout, pairs, and `out` of a run that nothing disturbed: 20 rounds of 5 steps."""
    folder = tmp_path_factory.mktemp("calm")
    model = save_tiny_checkpoint(folder / "model", "gpt2")
    run_train(options(model, (1, 20, 20)), write_pairs(folder / "pairs", ragged_pairs()), folder / "out")
    return folder


def disturbed(calm: Path) -> Any:
    """The same options with a checkpoint after every step."""
    return options(calm / "model", (1, 20, 20), checkpoint_minutes=1e-9)


def test_killed_in_mid_round_goes_on_to_the_same_bytes(calm: Path, tmp_path: Path) -> None:
    out, what, pairs = tmp_path / "out", disturbed(calm), calm / "pairs"
    for pattern in ("checkpoint-*", "checkpoint-[1-9][0-9]*"):
        process = start(*command(what, pairs, out))
        wait_for(out / pattern, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "model").exists(), "the run was over before it was killed"
    (out / "checkpoint-9999").mkdir()  # what a kill while writing leaves
    run_train(what, pairs, out)
    assert weights(out) == weights(calm / "out")
    assert (out / "log.jsonl").read_bytes() == (calm / "out" / "log.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} == {"model", "checkpoint", "log.jsonl", "train.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_keeps_everything(calm: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, what, pairs = tmp_path / "out", disturbed(calm), calm / "pairs"
    process = start(*command(what, pairs, out))
    wait_for(out / "checkpoint-*", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors.decode()
    assert not (out / "model").exists()
    steps = [int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")]
    assert len((out / "log.jsonl").read_text().splitlines()) == max(steps)
    run_train(what, pairs, out)
    assert weights(out) == weights(calm / "out")


def test_full_disk_says_so_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs", ragged_pairs())
    out = tmp_path / "out"
    process = start(*command(options(model), pairs, out, "disk=30000"))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "expected to write a checkpoint in" in errors.decode() and "make room" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert not list(out.glob("checkpoint*"))
    run_train(options(model), pairs, out)


def test_too_little_memory_names_the_setting_and_the_longest_group(tmp_path: Path) -> None:
    """129 distinct traces of 201 tokens over 40,000 words in one batch, and 400 MB for all of it."""
    folder = save_tiny_checkpoint(tmp_path / "model")
    model = load_model(str(folder), "float32", "cpu")
    model.resize_token_embeddings(40_000, mean_resizing=False)
    model.save_pretrained(folder)
    rows = [
        replace(pair, chosen="c" * 200, rejected=f"{number:03}" + "r" * 197)
        for number, pair in enumerate(ragged_pairs(120)[:128])
    ]
    pairs = write_pairs(tmp_path / "pairs", rows)
    what = options(folder, pairs_per_step=128, tokens_per_batch=1_000_000)
    process = start(*command(what, pairs, tmp_path / "out", "memory=400000000"))
    _, errors = process.communicate()
    assert process.returncode == 1, errors.decode()
    assert "expected a micro-batch of 128 pairs (36210 tokens) to fit into memory" in errors.decode()
    assert "lower train.tokens_per_batch (now 1000000)" in errors.decode()
    assert "its longest row has 2" in errors.decode() and "pairs.jsonl:" in errors.decode()


@pytest.mark.slow
@pytest.mark.parametrize(("problems", "loss"), [(7, "orpo"), (1, "orpo"), (7, "gkd")])
def test_two_processes_equal_one(tmp_path: Path, problems: int, loss: str) -> None:
    """3 micro-batches a step do not divide by 2; with 1 problem the second process has nothing to do.

    With gkd each process writes its share of the student's texts, and reads all.
    """
    model = save_tiny_checkpoint(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs", ragged_pairs(problems))
    what = options(model, (1, 2, 2), objective(loss), pairs_per_step=5, tokens_per_batch=80)
    if loss == "gkd":
        teacher = TeacherOptions(model=str(save_tiny_checkpoint(tmp_path / "teacher", seed=1)))
        what = what.model_copy(update={"teacher": teacher, "objective": objective(loss, max_new_tokens=20)})
    run_train(what, pairs, tmp_path / "one")
    # Without a GPU `--multi_gpu` means two processes on the CPU; `--cpu` would start one, whatever the number.
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    process = start(*launch, *command(what, pairs, tmp_path / "two"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert (tmp_path / "two" / "checkpoint" / "rng_state_1.pth").exists(), "there was one process only"
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=1e-3, atol=1e-4), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for line, other in zip(*logs, strict=True):
        assert json.loads(other) == pytest.approx(json.loads(line), rel=1e-3, abs=1e-4)
