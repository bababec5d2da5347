"""Runs side by side: who differs in what, and who is right where the other is not."""

import json
from pathlib import Path

import pytest

from orpo_distill.page import runs_page
from tests.page.folders import FolderOfARun, whole_run
from tests.page.reading import Seen


@pytest.fixture
def runs(tmp_path: Path) -> list[FolderOfARun]:
    first, second = whole_run(tmp_path / "first"), whole_run(tmp_path / "second", seed=7)
    second.evaluated("round-2/evaluate", "student-2", "-+++++")
    return [first, second]


def test_the_last_students_are_compared_on_the_same_problems(runs: list[FolderOfARun]) -> None:
    """First: t0 to t3; second: t1 to t5. Only the second 2 (t4, t5), only the first 1: +1 of 6; p = 1."""
    seen = Seen(runs_page([run.path for run in runs]))
    row = seen.row("second", "test")
    assert row[2:4] == ["6", "+16.7"]
    assert row[5:] == ["2 / 1", "1"]
    assert seen.row("first: student-2", "6", "66.7%")
    assert seen.row("second: student-2", "6", "83.3%")


def test_only_settings_that_differ_are_listed(runs: list[FolderOfARun]) -> None:
    seen = Seen(runs_page([run.path for run in runs]))
    assert seen.row("seed")[1:] == ["0", "7"]
    assert "task.type" not in seen.text


def test_problems_with_another_right_answer_are_left_out(runs: list[FolderOfARun]) -> None:
    path = runs[1].path / "round-2" / "evaluate" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["gold"] = "17"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = Seen(runs_page([run.path for run in runs]))
    assert seen.row("second", "test", "5")[5] == "2 / 0"
    assert "1 problems with the same id and another right answer were left out" in seen.text


def test_runs_with_one_name_and_runs_without_students_are_told_apart(tmp_path: Path) -> None:
    begun = FolderOfARun(tmp_path / "b" / "demo")
    seen = Seen(runs_page([whole_run(tmp_path / "a" / "demo").path, begun.path]))
    assert seen.row("demo (1): student-2")
    assert "No evaluated student yet in: demo (2)." in seen.text
    assert "No two of these runs have answered the same problems yet." in seen.text
