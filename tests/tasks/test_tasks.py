"""Every task's verifier accepts each gold answer and rejects a wrong one: here on rows as the data sets have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.records import Outcome, Problem, Trace
from orpo_distill.tasks import Task

SHARED = Path(__file__).parents[2] / "../shared/data"
FOLDERS = {"medqa": "medqa_usmle"}  # others are named as the task

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24.\n48+24 = 72.\n#### 72"},
        {"question": "How much profit?", "answer": "It is $70,000.\n#### 70,000"},
        {"question": "What change?", "answer": "#### -3"},
    ],
    "arc_challenge": [
        {"id": "1", "question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"id": "2", "question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    "arc_easy": [
        {"id": "1", "question": "q", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
    ],
    "openbookqa": [
        {"id": "7", "question_stem": "q", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "B"},
    ],
    "strategyqa": [
        {"qid": "1", "question": "Is it?", "answer": True},
        {"qid": "2", "question": "Was it?", "answer": False},
    ],
    "medqa": [
        {"question": "q", "answer": "y", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer_idx": "C"},
    ],
}


def wrong(problem: Problem) -> str:
    if problem.choices:
        return "A" if problem.answer != "A" else "B"
    return {"yes": "no", "no": "yes"}.get(problem.answer) or str(float(problem.answer) + 1)


def outcome(task: Task, problem: Problem, answer: str) -> Outcome:
    stated = f"({answer})" if problem.choices else answer
    trace = Trace("t", problem.id, "teacher", 0, f"Let us think about it. The answer is {stated}.")
    return task.judge()(problem, trace).outcome


def assert_proven(task: Task, problems: list[Problem]) -> None:
    bad = [p.id for p in problems if outcome(task, p, p.answer) is not Outcome.CORRECT]
    assert not bad, f"gold answers refused: {bad[:5]} of {len(problems)}"
    bad = [p.id for p in problems if outcome(task, p, wrong(p)) is not Outcome.WRONG]
    assert not bad, f"wrong answers accepted: {bad[:5]} of {len(problems)}"


@pytest.mark.parametrize("name", ROWS)
def test_the_verifier_accepts_gold_and_rejects_wrong(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    task = Task.model_validate({"type": name, "path": str(tmp_path)})
    problems = task.load("train")
    assert len(problems) == len(ROWS[name])
    assert_proven(task, problems)


def test_every_task_of_the_table_has_rows_here() -> None:
    """`jsonl` has no data set of its own: test_question.py."""
    assert {*ROWS, "jsonl"} == set(Task.types)


@pytest.mark.parametrize("name", ROWS)
def test_every_task_needs_no_options(name: str) -> None:
    assert Task.model_validate(name).model_dump()["hub_id"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_verifier_accepts_gold_and_rejects_wrong_on_the_whole_data_set(name: str) -> None:
    task = Task.model_validate({"type": name, "path": str(SHARED / FOLDERS.get(name, name))})
    for split in task.splits():
        problems = task.load(split)
        assert len(problems) >= 299
        assert_proven(task, problems)
