"""What the package ships beside its code: problems, three checkpoints and a config for each student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_distill.cli import QUICKSTART, _config
from orpo_distill.loading import parse_yaml
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.prompts import encode_prompts
from orpo_distill.stages.evaluate import evaluate_model
from orpo_distill.tasks.jsonl import Jsonl
from tests.test_end_to_end import cli

TEACHER, STUDENT, SIBLING = (str(QUICKSTART / name) for name in ("teacher", "student", "sibling"))
TASK = Jsonl(path=QUICKSTART / "problems", verifier="number", prompt="{question}")


def test_all_of_it_is_less_than_ten_megabytes() -> None:
    files = [path for path in QUICKSTART.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {"teacher", "student", "sibling"}
    assert sum(path.stat().st_size for path in files) < 10_000_000


def test_the_sibling_reads_and_writes_as_the_teacher_does() -> None:
    """Same words, same ids, same prompts, and as many logits; the first student has none of that in common."""
    teacher, student, sibling = (load_tokenizer(folder) for folder in (TEACHER, STUDENT, SIBLING))
    assert sibling.get_vocab() == teacher.get_vocab() != student.get_vocab()
    assert sibling.special_tokens_map == teacher.special_tokens_map
    prompts = [TASK.messages(problem) for problem in TASK.load("test")]
    assert encode_prompts(sibling, prompts) == encode_prompts(teacher, prompts) != encode_prompts(student, prompts)
    models = [load_model(folder) for folder in (TEACHER, SIBLING)]
    assert {len(model.get_output_embeddings().weight) for model in models} == {len(teacher)}
    assert {model.config.model_type for model in models} == {"qwen3", "llama"}


def test_the_sibling_has_something_to_learn() -> None:
    """It states an answer to every problem, and is right about a quarter of the time (n = 100: from 14 to 40)."""
    decoding = Decoding(temperature=0, max_new_tokens=96)
    found = evaluate_model(SIBLING, TASK, HF(), decoding, "test", 100)
    assert found["parsed"] == 1
    assert 0.14 <= found["accuracy"] <= 0.40


def test_its_folders_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is no YAML: what follows " #" is no comment."""
    odd = Path("/a #b: c/quickstart")
    monkeypatch.setattr("orpo_distill.cli.QUICKSTART", odd)
    monkeypatch.setattr(
        "orpo_distill.cli.load_config", lambda path, overrides: [parse_yaml(o.partition("=")[2]) for o in overrides]
    )
    found: Any = _config("quickstart", [])
    assert found == ["quickstart", *(str(odd / name) for name in ("problems", "teacher", "student"))]


def test_both_students_have_a_config_that_needs_no_file() -> None:
    plan = cli("compare", "quickstart", "quickstart-sibling", "--plan", "--methods", "orpo-off", "--seeds", 1)
    assert plan.returncode == 0, plan.stderr
    shown = cli("check", "quickstart-sibling", "--show", 1)
    assert shown.returncode == 0, shown.stderr
    _, teacher, student = shown.stdout.split("--- training row")[0].split("--- ")
    assert teacher.partition("\n")[2] == student.partition("\n")[2]
