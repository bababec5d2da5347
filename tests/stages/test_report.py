"""Comparisons, headline, tables: golden values from two hand-made evaluations."""

import json
from pathlib import Path

import pytest

from orpo_distill.page.paired import compare
from orpo_distill.records import Answer, Outcome, write_jsonl
from orpo_distill.runs import Asked, Manifest, RunFolder
from orpo_distill.stages.export import ExportOptions, model_card
from orpo_distill.stages.report import ReportOptions, report


def evaluation(run: RunFolder, name: str, policy: str, right: str) -> Path:
    """Answers to problems 0, 1, ...: `+` is right, `-` is wrong, `?` states nothing."""
    folder = run.of(name)
    run.write_asked(name, Asked("m:f", {}, {}))
    outcomes = {"+": Outcome.CORRECT, "-": Outcome.WRONG, "?": Outcome.UNPARSEABLE}
    write_jsonl(folder / "answers.jsonl", [Answer(f"p{i}", "test", "1", "1", outcomes[c]) for i, c in enumerate(right)])
    n, correct = len(right), right.count("+")
    row = {
        "policy": policy,
        "split": "test",
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "low": 0.0,
        "high": 1.0,
    }
    row |= {"parsed": 1 - right.count("?") / n, "truncated": 0.0, "majority": 1.0}
    (folder / "results.json").write_text(json.dumps([row]))
    run.write_manifest(name, Manifest(Asked("m:f", {}, {}), "", {}))
    return folder


def test_compare_counts_who_alone_is_right(tmp_path: Path) -> None:
    """Both right 1, only the first 1, only the second 4, neither 2 (n = 8): the difference is (4 - 1) / 8.

    McNemar, exact: 5 discordant problems, 1 against 4: p = 2 (1 + 5) / 2^5 = 0.375.
    """
    run = RunFolder(tmp_path)
    first = evaluation(run, "baseline", "student-0", "++---?--")
    second = evaluation(run, "round-1/evaluate", "student-1", "+-++++-?")
    (row,) = compare(first, second, "student-0", "student-1")
    assert (row["n"], row["only_a"], row["only_b"]) == (8, 1, 4)
    assert row["difference"] == pytest.approx(0.375)
    assert row["p"] == pytest.approx(0.375)
    assert row["low"] < 0.375 < row["high"]
    assert compare(second, first, "student-1", "student-0")[0]["difference"] == pytest.approx(-0.375)


def test_the_headline_is_the_last_round_not_the_best(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    inputs = {
        "evaluate:student-0": evaluation(run, "baseline", "student-0", "----"),
        "evaluate:student-1": evaluation(run, "round-1/evaluate", "student-1", "+++-"),
        "evaluate:student-2": evaluation(run, "round-2/evaluate", "student-2", "+---"),
    }
    out = run.of("report")
    out.mkdir()
    headline = report(ReportOptions(name="demo", rounds=2), inputs, out)["headline"]
    assert (headline["policy"], headline["accuracy"], headline["difference"]) == ("student-2", 0.25, 0.25)
    text = (out / "report.md").read_text()
    assert "student-2: 25.0% on test, +25.0% against the initial student" in text
    assert "| student-1 | 4 | 75.0% |" in text


def test_scores_of_whole_texts_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    inputs = {
        "evaluate:student-0": evaluation(run, "baseline", "student-0", "-+"),
        "evaluate:student-1": evaluation(run, "round-1/evaluate", "student-1", "++"),
    }
    for name, same in (("round-1/reference-scores", True), ("round-1/teacher-scores", False)):
        run.write_asked(name, Asked("m:f", {}, {}))
        run.write_manifest(name, Manifest(Asked("m:f", {}, {}), "", {"same_tokens": same}))
        inputs[name] = run.of(name)
    out = run.of("report")
    out.mkdir()
    report(ReportOptions(name="demo", rounds=1), inputs, out)
    assert "Scores of whole texts (round-1/teacher-scores): the model" in (out / "report.md").read_text()


def test_names_cannot_break_tables_and_local_paths_do_not_leak(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    inputs = {
        "evaluate:student-0": evaluation(run, "baseline", "student-0", "-+"),
        "evaluate:student-1": evaluation(run, "round-1/evaluate", "student-1", "++"),
    }
    out = run.of("report")
    out.mkdir()
    report(ReportOptions(name="demo", rounds=1), inputs, out)
    content = json.loads((out / "report.json").read_bytes())
    content["results"][0]["policy"] = "a|b"
    options = ExportOptions(
        name="demo", teacher="/home/me/big", student="/home/me/small", task="gsm8k", objective="orpo", rounds=1
    )
    card = model_card(options, content)
    assert "a\\|b" in card
    assert "/home/me" not in card
    assert "base_model" not in card
    measured = [{**row, "split": "validation"} for row in content["results"]]
    only = model_card(
        options, {**content, "results": measured, "headline": {**content["headline"], "split": "validation"}}
    )
    assert [line for line in only.splitlines() if line.startswith("|")] == [
        line for line in card.splitlines() if line.startswith("|")
    ]
    assert "base_model: lab/small" in model_card(options.model_copy(update={"student": "lab/small"}), content)
