"""The mechanisms stage on real small runs: golden values, and every setting that lacks something."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from orpo_distill.config import Config
from orpo_distill.experiment import run
from orpo_distill.likelihood import Response, mean_logps
from orpo_distill.loading import load_config
from orpo_distill.negatives import Comparison, Negative, Rules
from orpo_distill.plan import plan
from orpo_distill.records import Problem, Trace, read_jsonl
from orpo_distill.stages.mechanism_tables import tables, warnings
from tests.test_end_to_end import experiment, write_lines

TITLES = [
    "Negatives by round",
    "Diversity of the negatives",
    "Diversity of what was trained on",
    "Likelihood of the negatives",
    "Log-probabilities in training",
    "Length and form of the texts",
]


def config_of(folder: Path, *overrides: str, **changes: Any) -> Config:
    """12 problems, of each 2 right and 2 wrong traces of the teacher; the student of `test_curriculum`, 4 samples."""
    base: dict[str, Any] = {
        "pairs": {"phi": 1.0, "rouge_l_max": 1.0},
        "student": {
            "model": str(folder / "tiny"),
            "samples": 4,
            "sampler": {"type": "tests.test_curriculum:Improving"},
        },
        "evaluate": {},
        "mechanisms": {"problems": 5},
    }
    path = experiment(folder, **(base | changes))
    texts = ["So {}. The answer is {}.", "I add. The answer is {}.", "Too quick. The answer is 3.", "The answer is 5."]
    rows = [{"id": f"p{i}", "texts": [text.replace("{}", str(2 * i)) for text in texts]} for i in range(18)]
    write_lines(folder / "teacher.jsonl", rows)
    return load_config(path, ["teacher.samples=4", *overrides])


def measured(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs" / "demo" / "mechanisms" / "mechanisms.json").read_bytes())
    assert [table["title"] for table in content["tables"]] == TITLES
    for table in content["tables"]:
        assert table["note"]
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            assert all(isinstance(cell, str) for cell in row)
    return content


def filled(content: dict[str, Any]) -> set[str]:
    return {table["title"] for table in content["tables"] if table["rows"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mechanisms")
    run(config_of(folder, "evaluate.sft=true"))
    return folder


def test_every_table_is_filled(finished: Path) -> None:
    assert filled(measured(finished)) == set(TITLES)


def test_yield_beside_the_initial_students_on_the_same_samples(finished: Path) -> None:
    """The initial student is always wrong, student-1 every other time; phi is 1, so that all 48 samples are its."""
    rows = {(row["round"], row["policy"]): row for row in measured(finished)["measures"]["negatives"]}
    assert {key: (row["samples"], row["wrong"], row["correct"]) for key, row in rows.items()} == {
        (1, "teacher"): (48, 0.5, 0.5),
        (1, "student-0"): (48, 1.0, 0.0),
        (2, "student-1"): (48, 0.5, 0.5),
        (2, "student-0"): (48, 1.0, 0.0),
    }
    assert rows[2, "student-0"]["same_as"] == "student-1"
    latest = rows[2, "student-1"]
    assert (latest["phi"], latest["sent_to_latest"], latest["fell_back"], latest["dried_up"]) == (1.0, 12, 0, 0)


def test_diversity_of_two_negatives_each_on_the_same_problems(finished: Path) -> None:
    """Student texts "Try I after R. The answer is 1." have 8 words, of which two differ in one: LCS 7, F1 0.875.

    Their 7 bigrams each: 5 shared, so 9 of 14 distinct. Answers 1 and 1: 1 of 2. The teacher's wrong texts "Too quick.
    The answer is 3." and "The answer is 5." have 6 and 4 words with LCS 3: F1 0.6; 5 + 3 bigrams, 2 shared: 6 of 8;
    answers 3 and 5.
    """
    rows = {(row["source"], row["measure"]): row for row in measured(finished)["measures"]["diversity"]}
    initial = {"rouge_l": 0.875, "distinct_2": 9 / 14, "unique_answers": 0.5, "words": 8.0}
    teacher = {"rouge_l": 0.6, "distinct_2": 0.75, "unique_answers": 1.0, "words": 5.0}
    for source, expected in (("teacher", teacher), ("student-1", initial)):
        for measure, value in expected.items():
            row = rows[source, measure]
            assert row["problems"] == 12
            assert row["traces"] == 2
            assert row["first"] == pytest.approx(value, abs=1e-6)
            assert row["second"] == pytest.approx(initial[measure], abs=1e-6)
            assert row["low"] == pytest.approx(row["high"])  # all problems alike
    # Round 2 is trained on student-1's 0 and 2, round 1 on the initial student's 0 and 1: as diverse.
    kept = measured(finished)["measures"]["trained_on"]
    assert {(row["source"], row["measure"]): row["difference"] for row in kept}["round 2", "rouge_l"] == 0.0


def test_likelihood_under_the_student_that_each_round_begins_with(finished: Path) -> None:
    rows = measured(finished)["measures"]["likelihood"]
    assert [(row["round"], row["student"], row["source"], row["problems"]) for row in rows] == [
        (1, "student-0", "teacher", 5),
        (2, "student-1", "teacher", 5),
        (2, "student-1", "student-1", 5),
    ]
    assert all(row["first"] < 0 and row["second"] < 0 for row in rows)
    assert rows[0]["first"] != rows[1]["first"]  # another model, the same texts
    assert rows[1]["second"] == rows[2]["second"]  # the same problems, the same initial negatives
    assert rows[0]["low"] is None  # five problems bear no interval


def test_likelihood_is_that_of_the_texts(finished: Path) -> None:
    """Recomputed for all 12 problems from the traces."""
    config = load_config(
        finished / "experiment.yaml", ["teacher.samples=4", "mechanisms.problems=100", "evaluate.sft=true"]
    )
    run(config)
    folder = finished / "runs" / "demo"
    asked = {
        problem.id: config.task.messages(problem) for problem in read_jsonl(folder / "problems/problems.jsonl", Problem)
    }
    responses = [
        Response(asked[trace.problem_id], trace.text, False)
        for trace in read_jsonl(folder / "round-2/student/traces.jsonl", Trace)
        if trace.sample_index in (0, 2)
    ]
    expected = fmean(mean_logps(str(folder / "round-1/train/model"), responses, config.train, "").values())
    row = measured(finished)["measures"]["likelihood"][2]
    assert (row["source"], row["problems"]) == ("student-1", 12)
    assert row["first"] == pytest.approx(expected, abs=1e-5)
    assert row["low"] <= row["difference"] <= row["high"]
    run(load_config(finished / "experiment.yaml", ["teacher.samples=4", "evaluate.sft=true"]))  # as it was


def test_the_course_of_training_is_the_logs(finished: Path) -> None:
    measures = measured(finished)["measures"]
    rows = {(row["control"], row["round"]): row for row in measures["training"]}
    assert set(rows) == {(False, 1), (False, 2), (False, None), (True, 1), (True, 2), (True, None)}
    log = [
        json.loads(line)
        for number in (1, 2)
        for line in (finished / f"runs/demo/round-{number}/train/log.jsonl").read_text().splitlines()
    ]
    assert rows[False, None]["steps"] == len(log)
    tenth = len(log) // 10
    assert tenth > 1
    first = fmean(line["logps/chosen"] for line in log[:tenth])
    margin = fmean(line["logps/chosen"] - line["logps/rejected"] for line in log[-tenth:])
    assert rows[False, None]["chosen"][0] == pytest.approx(first, abs=1e-5)
    assert rows[False, None]["margin"][1] == pytest.approx(margin, abs=1e-5)
    assert rows[True, 1]["rejected"] is None
    assert measures["curve"]["step"] == [line["step"] for line in log]


def test_lengths_of_answers_and_samples(finished: Path) -> None:
    """ "Try 0 after 0. The answer is 1." is 8 words, and so says the sampler of its tokens."""
    rows = {(row["where"], row["policy"], row["same_as"]): row for row in measured(finished)["measures"]["texts"]}
    test = [rows["test", policy, None] for policy in ("student-0", "student-1", "student-2", "sft")]
    assert [(row["texts"], row["words"], row["tokens"], row["parsed"]) for row in test] == [(4, 8.0, 8.0, 1.0)] * 4
    assert rows["sampled for round 2", "student-0", "student-1"]["texts"] == 48
    assert rows["sampled for round 1", "teacher", None]["words"] == pytest.approx(5.5)  # 6, 6, 6 and 4


def test_the_same_bytes_again_and_no_other_stage_is_touched(finished: Path) -> None:
    path = finished / "runs" / "demo" / "mechanisms" / "mechanisms.json"
    before = path.read_bytes()
    model = finished / "runs" / "demo" / "round-2" / "train" / "manifest.json"
    trained = model.stat().st_mtime_ns
    run(load_config(finished / "experiment.yaml", ["teacher.samples=4", "evaluate.sft=true"]), redo=["mechanisms"])
    assert path.read_bytes() == before
    assert model.stat().st_mtime_ns == trained


def test_the_report_shows_tables_and_warnings(finished: Path) -> None:
    folder = finished / "runs" / "demo" / "report"
    text = (folder / "report.md").read_text()
    content = measured(finished)
    for title in TITLES:
        assert f"## {title}\n" in text
    assert json.loads((folder / "report.json").read_bytes())["mechanisms"] == content
    assert text.count("**Warning.**") == len(content["warnings"])


NEGATIVES, TRAINING = set(TITLES[:4]), set(TITLES[4:])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective=sft"], {TITLES[0]} | TRAINING),
        (["pairs.negatives_from=teacher"], {TITLES[0]} | TRAINING),
        (["rounds=1"], NEGATIVES - {TITLES[2]} | TRAINING),
        (["pairs.phi=0"], NEGATIVES - {TITLES[2]} | TRAINING),
        (["train.lora={r: 4, alpha: 8}"], NEGATIVES | TRAINING),
        (["mechanisms.problems=0"], NEGATIVES - {TITLES[3]} | TRAINING),
        (["mechanisms.traces=3"], {TITLES[0]} | TRAINING),  # nobody but the initial student has three
        (["pairs.phi=0.01"], NEGATIVES - {TITLES[2]} | TRAINING),  # no problem falls to the latest student
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",  # sets have another order in every process
)
def test_what_a_run_does_not_have_is_left_out_with_the_reason(
    tmp_path: Path, overrides: list[str], expected: set[str]
) -> None:
    run(config_of(tmp_path, *overrides))
    content = measured(tmp_path)
    assert filled(content) == expected
    for table in content["tables"]:
        assert ("Left out" in table["note"]) == (not table["rows"])


def test_a_recorded_teacher(tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    config = config_of(tmp_path, f"teacher.sampler={{type: recorded, path: {path}}}")
    lines = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    write_lines(path, [{"id": line["id"], "traces": [{"text": text} for text in line["texts"]]} for line in lines])
    run(config)
    rows = measured(tmp_path)["measures"]["texts"]
    teacher = next(row for row in rows if row["policy"] == "teacher")
    assert (teacher["texts"], teacher["words"], teacher["tokens"]) == (48, pytest.approx(5.5), None)


def test_it_can_be_left_out(tmp_path: Path) -> None:
    stages = plan(config_of(tmp_path, "mechanisms.enabled=false"))
    assert "mechanisms" not in [stage.name for stage in stages]
    assert "mechanisms" not in next(stage for stage in stages if stage.name == "report").inputs


EMPTY: dict[str, Any] = {
    "negatives": [],
    "diversity": [],
    "trained_on": [],
    "likelihood": [],
    "training": [],
    "curve": {},
    "texts": [],
}


def course(number: int | None, falls: bool, control: bool = False) -> dict[str, Any]:
    values = {"chosen": [-0.5, -0.8], "rejected": [-0.6, -1.6], "margin": [0.1, 0.8]}
    return {"control": control, "round": number, "steps": 40, **values, "chosen_falls": falls}


def test_a_falling_chosen_side_is_named_once() -> None:
    whole = [course(1, True), course(2, False), course(None, True)]
    (warning,) = warnings(EMPTY | {"training": whole})
    assert warning.startswith("chosen falls while the margin grows: over the training")
    assert "-0.500 to -0.800" in warning and "0.100 to 0.800" in warning
    (warning,) = warnings(EMPTY | {"training": [course(1, False), course(2, True), course(None, False)]})
    assert "in round 2" in warning
    assert warnings(EMPTY | {"training": [course(1, True, control=True)]}) == []


def test_negatives_that_dry_up_and_answers_that_are_cut_are_named() -> None:
    latest = {"round": 3, "policy": "student-2", "problems": 10, "dried_up": 6, "sent_to_latest": 10}
    assert (
        "negatives dry up: in round 3 student-2 gave no usable negative for 6 of 10"
        in warnings(EMPTY | {"negatives": [latest]})[0]
    )
    assert warnings(EMPTY | {"negatives": [latest | {"dried_up": 5}]}) == []
    texts = [
        {"where": "test", "policy": policy, "truncated": share}
        for policy, share in (("student-0", 0.05), ("student-1", 0.14), ("student-2", 0.5), ("teacher", 0.9))
    ]
    (warning,) = warnings(EMPTY | {"texts": texts})
    assert warning.startswith("answers are cut: 50.0% of student-2's test answers, 5.0% of student-0's")


def test_empty_measures_give_tables_that_say_why() -> None:
    for table in tables(EMPTY):
        assert table["rows"] == []
        assert table["note"]


@pytest.mark.slow
def test_300_problems_of_8_traces_take_seconds(tmp_path: Path) -> None:
    """The quickstart's size without its models: everything but the likelihoods."""
    comparison = Comparison(Rules(8, 100, 0))
    words = ["first", "then", "add", "so", "that", "gives", "and", "again"]
    started = time.monotonic()
    for i in range(300):
        side = [Negative(" ".join(words[(i * k + j) % 8] for j in range(60)), str(k), False) for k in range(1, 9)]
        for _ in range(4):
            comparison.add(Problem(f"p{i}", "?", "1"), side, side[::-1])
    assert time.monotonic() - started < 10
