"""MiniLLM in the train stage: the step's gradient against plain passes, the divergence it lowers, kill and resume."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_distill.groups import Row
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives.minillm import MiniLlm, minillm_loss
from orpo_distill.rollouts import Writer, rollout_seeds
from orpo_distill.teaching import TeacherOptions
from tests.checkpoints import save_tiny_checkpoint
from tests.test_end_to_end import COMMAND, cli, experiment, stable_files
from tests.training import objective, options, ragged_pairs, ready_trainer, rows_of, run_train, weights, write_pairs

LETTERS = "abcdef.question x0123456\n"
EXACT = {"teacher_share": 0.0, "length_norm": False, "clip": None}
"""The options with which the gradient is that of the reverse KL of texts."""


def two_models(folder: Path) -> tuple[Path, Path]:
    """A student and a teacher of other architecture with the same tokens."""
    return (
        save_tiny_checkpoint(folder / "student", vocab=LETTERS, seed=1),
        save_tiny_checkpoint(folder / "teacher", "qwen3", vocab=LETTERS, seed=2),
    )


def scored_plainly(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities (T, V) of what comes next at each token of the row's rollout."""
    ids = torch.tensor([[*row.prompt, *row.rollout]])
    return model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    ("loss", "tokens_per_batch"), [(EXACT, 40), ({}, 40), ({}, 4096), ({"nll_weight": 0.5, "nll_on": "full"}, 40)]
)
def test_a_steps_gradient_is_that_of_plain_passes(loss: dict[str, Any], tokens_per_batch: int, tmp_path: Path) -> None:
    """Text by text with all logits, divided by the step's mean length; whatever the micro-batches."""
    student, teacher = two_models(tmp_path)
    what = objective("minillm", max_new_tokens=12, **loss)
    assert isinstance(what, MiniLlm)
    pairs = ragged_pairs(4)
    trainer = ready_trainer(student, pairs, what, tmp_path, tokens_per_batch, teacher=teacher)
    trainer.training_step(trainer.model, {})
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}

    plain, other = (load_model(str(folder), "float32", "cpu") for folder in (student, teacher))
    rows = rows_of(student, pairs, with_rejected=False)
    writer = Writer(plain, load_tokenizer(str(student)), what.writing, other)
    texts = writer([row.prompt for row in rows], rollout_seeds(rows, trainer.args.seed, 0))
    assert len({text.tokens for text in texts}) > 3 and len({len(text.tokens) for text in texts}) > 2
    total = torch.zeros(())
    for row, text in zip(rows, texts, strict=True):
        row = row.written(text.tokens, keeps_chosen=True)
        labels, owner = torch.tensor(row.rollout)[:, None], torch.zeros(len(row.rollout), dtype=torch.long)
        q, p = scored_plainly(plain, row), scored_plainly(other, row).detach()
        divergence = (q.exp() * (q - p)).sum(-1)
        of = {"teacher_share": what.teacher_share, "clip": what.clip, "length_norm": what.length_norm}
        tokens = minillm_loss(q.gather(1, labels)[:, 0], p.gather(1, labels)[:, 0], divergence, owner, **of)
        total = total + tokens.sum() / sum(len(one.tokens) for one in texts)
        ids = torch.tensor([[*row.prompt, *row.chosen]])
        nll = torch.nn.functional.cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:])
        total = total + what.nll_weight * nll / len(rows)
    total.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("loss", "rounds"), [({}, 8), pytest.param(EXACT, 16, marks=pytest.mark.slow)])
def test_the_reverse_kl_of_texts_falls(loss: dict[str, Any], rounds: int, tmp_path: Path) -> None:
    """Measured on texts that both students write with the same random numbers, in nats a text."""
    student, teacher = two_models(tmp_path)
    pairs = ragged_pairs(6)
    what = options(student, (1, rounds, rounds), objective("minillm", max_new_tokens=8, **loss), learning_rate=2e-2)
    what = what.model_copy(update={"teacher": TeacherOptions(model=str(teacher), device="cpu")})
    run_train(what, write_pairs(tmp_path / "pairs", pairs), tmp_path / "out")
    assert {"reverse_kl", "written_tokens", "logps/rollout"} <= lines(tmp_path / "out/log.jsonl")[0].keys()

    def divergence(folder: Path) -> float:
        model, other = (load_model(str(one), "float32", "cpu") for one in (folder, teacher))
        rows = rows_of(student, pairs, with_rejected=False) * 6
        write = Writer(model, load_tokenizer(str(student)), objective("minillm", max_new_tokens=8, **EXACT).writing)
        texts = write([row.prompt for row in rows], rollout_seeds(rows, 0, 0))
        total = 0.0
        for row, text in zip(rows, texts, strict=True):
            row = row.written(text.tokens, keeps_chosen=False)
            with torch.no_grad():
                q, p = (scored_plainly(one, row) for one in (model, other))
            total += (q.exp() * (q - p)).sum().item()
        return total / len(rows)

    before, after = divergence(student), divergence(tmp_path / "out/model")
    assert after < 0.6 * before


def test_two_rounds_one_after_the_other_are_one_run(tmp_path: Path) -> None:
    """Byte for byte: nothing but the checkpoint goes from one to the next."""
    student, teacher = two_models(tmp_path)
    pairs = write_pairs(tmp_path / "pairs", ragged_pairs(4))
    loss = objective("minillm", max_new_tokens=8)

    def trained(out: Path, first: int, last: int, previous: Path | None = None) -> bytes:
        what = options(student, (first, last, 2), loss, keep="all")
        what = what.model_copy(update={"teacher": TeacherOptions(model=str(teacher), device="cpu")})
        run_train(what, pairs, out, previous)
        return weights(out)

    whole = trained(tmp_path / "whole", 1, 2)
    trained(tmp_path / "first", 1, 1)
    assert trained(tmp_path / "second", 2, 2, tmp_path / "first") == whole


def whole_experiment(folder: Path) -> Path:
    """MiniLLM after a warm-up. The teacher is a checkpoint behind scripted texts."""
    scorer = folder / "scorer"
    if not scorer.exists():
        save_tiny_checkpoint(scorer, "qwen3", seed=7)
    sampler = {"type": "scripted", "path": str(folder / "teacher.jsonl")}
    return experiment(
        folder,
        teacher={"model": "script", "samples": 2, "sampler": sampler, "scorer": str(scorer), "prefix": "Be kind."},
        objective={"type": "minillm", "max_new_tokens": 16},
        warmup={"epochs": 1},
        train={"pairs_per_step": 4, "learning_rate": 1e-3, "max_length": 256, "checkpoint_minutes": 1e-6},
        evaluate={"teacher": False},
        mechanisms={"problems": 4},
    )


@pytest.mark.slow
def test_killed_while_it_trains_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    done = cli("run", whole_experiment(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    path = whole_experiment(tmp_path / "killed")
    log = tmp_path / "killed/runs/demo/round-1/train/log.jsonl"
    for steps in (1, 3):
        process = subprocess.Popen(
            [*COMMAND, "run", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}
        )
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps):
            time.sleep(0.02)
        assert process.poll() is None
        process.kill()
        process.wait()
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    found, expected = (stable_files(tmp_path / name / "runs/demo") for name in ("killed", "whole"))
    assert found == expected
    assert log.read_bytes() == (tmp_path / "whole/runs/demo/round-1/train/log.jsonl").read_bytes()
    first = lines(log)[0]
    assert first["pairs"] <= first["written_tokens"] <= 16 * first["pairs"] and first["reverse_kl"] > 0
    assert first["written_tokens"] < first["teacher_tokens"] <= 2 * first["written_tokens"]
