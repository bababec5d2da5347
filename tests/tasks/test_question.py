"""What every question-answering task does: read splits, ask, and refuse bad data."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_distill.errors import ConfigError, DataError
from orpo_distill.loading import parse_config
from orpo_distill.records import Message, Problem
from orpo_distill.tasks import Task
from orpo_distill.tasks.jsonl import Jsonl
from orpo_distill.tasks.question import Example, default_prompt, file_split, fill
from orpo_distill.tasks.strategyqa import StrategyQA
from orpo_distill.verifiers.choice import Choice
from orpo_distill.verifiers.exact import Exact
from orpo_distill.verifiers.math import Math
from orpo_distill.verifiers.number import Number
from orpo_distill.verifiers.yes_no import YesNo


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder: Path, **options: Any) -> Jsonl:
    return Jsonl.model_validate({"path": folder, "verifier": "number", **options})


ROW = {"id": "a", "question": "1 + 1?", "answer": "2"}


def test_a_folder_has_the_splits_of_its_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    write(tmp_path / "dev.jsonl", {"question": "2 + 2?", "answer": 4})
    (tmp_path / "README.md").touch()
    task = make(tmp_path)
    assert task.splits() == ("dev", "train")
    assert task.load("train") == [Problem("a", "1 + 1?", "2")]
    with pytest.raises(DataError, match=r"expected a split 'test' in .*, found dev, train"):
        task.load("test")


def test_one_file_is_split_by_a_hash_of_the_id(tmp_path: Path) -> None:
    """80/10/10 of 2,000: the counts are binomial with standard deviations of 18 and 13; within 4 of them."""
    path = write(tmp_path / "all.jsonl", *({**ROW, "id": str(number)} for number in range(2000)))
    task = make(path)
    found = {split: [problem.id for problem in task.load(split)] for split in task.splits()}
    assert sorted(chain(*found.values()), key=int) == [str(number) for number in range(2000)]
    assert all(ids == sorted(ids, key=int) for ids in found.values())
    counts = {split: len(ids) for split, ids in found.items()}
    assert abs(counts["train"] - 1600) < 72 and abs(counts["validation"] - 200) < 54 and abs(counts["test"] - 200) < 54
    with pytest.raises(DataError, match="found train, validation, test"):
        task.load("dev")


def test_the_split_of_an_id_never_changes() -> None:
    """A problem must not wander from test into train between versions: the hash is spelled out here."""
    for name in (f"p{number}" for number in range(50)):
        digest = hashlib.sha256(f'["split", "{name}"]'.encode()).hexdigest()
        bucket = (int(digest[:16], 16) >> 1) % 10
        assert file_split(name) == [*["train"] * 8, "validation", "test"][bucket]


def test_a_missing_id_is_a_hash_of_the_question(tmp_path: Path) -> None:
    """The same everywhere; an exact repeat gets a number, so that it can be dropped with a count later."""
    row = {"question": "1 + 1?", "answer": "2"}
    path = write(tmp_path / "train.jsonl", row, {**row, "question": "2 + 2?"}, row)
    write(tmp_path / "test.jsonl", row)
    ids = [problem.id for problem in make(path.parent).load("train")]
    assert len(set(ids)) == 3 and ids[2] == f"{ids[0]}-2"
    assert make(path.parent).load("test")[0].id == ids[0]


@pytest.mark.parametrize(
    ("rows", "verifier", "message"),
    [
        ([ROW, {**ROW, "question": "other"}], "number", r"jsonl:2: expected a new id, found 'a', which .*jsonl:1 has"),
        ([ROW, {"id": "b", "question": "q"}], "number", r"jsonl:2: expected a gold answer"),
        ([{**ROW, "answer": "two"}], "number", r"train\.jsonl:1: "),
        ([{**ROW, "answer": "perhaps"}], "yes_no", r"train\.jsonl:1: "),
        ([{**ROW, "answer": "A"}], "choice", r"train\.jsonl:1: "),
        ([{**ROW, "choices": ["x", "y"], "answer": "C"}], "choice", r"train\.jsonl:1: expected an answer among the"),
    ],
)
def test_bad_data_is_one_message_with_the_line(
    tmp_path: Path, rows: list[dict[str, Any]], verifier: str, message: str
) -> None:
    write(tmp_path / "train.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        make(tmp_path, verifier=verifier).load("train")


def test_a_task_reads_the_hub_where_it_has_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub's data set: `load_dataset` takes either."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub/train.jsonl", {"qid": "1", "question": "Is it?", "answer": False})
    write(tmp_path / "hub/test.jsonl", {"qid": "2", "question": "Was it?", "answer": True})
    task = StrategyQA(hub_id=str(tmp_path / "hub"))
    assert task.splits() == ("train", "test")
    assert task.load("test") == [Problem("2", "Was it?", "yes")]
    with pytest.raises(DataError, match=r"expected a split 'validation' in .*, found train, test"):
        task.load("validation")


def test_the_quickstarts_prompt_is_the_question_alone(tmp_path: Path) -> None:
    task = make(tmp_path, prompt="{question}")
    assert task.messages(Problem("a", "What is {x}?", "1")) == (Message("user", "What is {x}?"),)


def test_system_and_few_shot_turns_come_first(tmp_path: Path) -> None:
    example = Example(question="Which?", choices=("oak", "fig"), response="Figs. The answer is (B).")
    task = make(tmp_path, verifier="choice", prompt="{question}\n{choices}", system="Be brief.", examples=[example])
    assert task.messages(Problem("a", "What?", "A", ("x", "y", "z"))) == (
        Message("system", "Be brief."),
        Message("user", "Which?\n(A) oak\n(B) fig"),
        Message("assistant", "Figs. The answer is (B)."),
        Message("user", "What?\n(A) x\n(B) y\n(C) z"),
    )


@pytest.mark.parametrize(
    ("verifier", "ending"),
    [
        (Number(), "The answer is 18."),
        (Choice(), "The answer is (B)."),
        (YesNo(), "The answer is yes."),
        (Math(), r"The answer is \boxed{18}."),
        (Exact(), "The answer is Paris."),
    ],
)
def test_the_default_prompt_asks_for_what_the_verifier_reads(tmp_path: Path, verifier: Any, ending: str) -> None:
    task = make(tmp_path, verifier=verifier)
    assert task.prompt == default_prompt(verifier)
    [message] = task.messages(Problem("a", "Q?", "1"))
    assert message.content.startswith("Q?\n\nThink step by step") and message.content.endswith(f'"{ending}"')


@given(st.text(), st.lists(st.text(), max_size=3))
def test_braces_in_questions_and_choices_are_just_text(question: str, choices: list[str]) -> None:
    lines = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=False))
    assert fill("a {b} {question}|{choices} {", question, choices) == f"a {{b}} {question}|{lines} {{"


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("{question}\n{choices}\n\nThink.", "Q\n\nThink."),
        ("{choices}\n{question}", "Q"),
        ("{question}\n{choices}", "Q"),
        ("{question} {choices}", "Q "),
    ],
)
def test_a_line_for_choices_goes_where_there_are_none(prompt: str, filled: str) -> None:
    assert fill(prompt, "Q", ()) == filled


def test_options_are_checked_before_any_work(tmp_path: Path) -> None:
    for options, message in (
        ({"path": None}, "expected `path`"),
        ({"prompt": "Solve it."}, "{question}"),
        ({"promt": "x"}, "promt"),
        ({"verifier": "numbr"}, "did you mean 'number'"),
    ):
        with pytest.raises(ValidationError, match=message):
            make(tmp_path, **options)
    with pytest.raises(ValidationError, match="verifier"):
        Jsonl.model_validate({"path": tmp_path})


def test_a_wrong_verifier_is_one_message_in_a_config() -> None:
    """The default prompt depends on the verifier; that it cannot be made is no mistake of its own."""
    task = {"type": "jsonl", "path": "x", "verifier": "numbr"}
    with pytest.raises(ConfigError) as raised:
        parse_config({"name": "a", "task": task, "teacher": {"model": "t"}, "student": {"model": "s"}})
    [problem] = raised.value.problems
    assert problem.startswith("task.verifier: ") and problem.endswith("did you mean 'number'?")


def test_a_task_survives_its_own_spec(tmp_path: Path) -> None:
    """What a stage's process gets is the dumped spec."""
    task = make(tmp_path, verifier="yes_no", examples=[{"question": "q", "response": "r"}])
    assert Task.model_validate(task.model_dump(mode="json")) == task
