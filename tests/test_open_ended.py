"""Open-ended tasks through the whole pipeline: no gold answers, a scripted judge, a tiny student that really trains."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_distill.billing import forecast
from orpo_distill.compare.cells import Wanted, design_of
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, DataError, ModelError, RunError
from orpo_distill.experiment import run, status
from orpo_distill.exporting import export_rows
from orpo_distill.loading import load_config
from orpo_distill.page import run_page, runs_page
from orpo_distill.plan import plan
from orpo_distill.preview import plan_table, rendered
from orpo_distill.records import Pair, read_jsonl
from orpo_distill.runs import flat_options, read_manifest
from orpo_distill.samplers import Decoding, Sampler
from orpo_distill.stages.evaluate import evaluate_model
from tests.checkpoints import save_tiny_checkpoint
from tests.page.reading import Seen
from tests.test_end_to_end import COMMAND, cli, experiment, stable_files, write_lines

LETTERS = "abcdefgh ?"
FAIR = ["[[A]]", "[[B]]"]  # prefers what stands first in a comparison, in both orders


def judge(replies: dict[str, list[str]] | None = None, **settings: Any) -> dict[str, Any]:
    """A scripted judge: p0 and v0 and t0 go the other way, p1 is a tie, all else is for the first of the two."""
    own = {"p0": FAIR[::-1], "t0": FAIR[::-1], "p1": ["[[C]]", "[[C]]"]} if replies is None else replies
    return {"model": "script", "sampler": {"type": "scripted", "replies": own, "default": FAIR}, **settings}


def open_ended(folder: Path, **changes: Any) -> Path:
    """8 train, 2 validation and 4 test problems without answers; the student is a tiny model of ten letters."""
    for split, letter, count in (("train", "p", 8), ("validation", "v", 2), ("test", "t", 4)):
        rows = [{"id": f"{letter}{i}", "question": f"{letter} {LETTERS[i]} fed a bee?"} for i in range(count)]
        write_lines(folder / "data" / f"{split}.jsonl", rows)
    student = folder / "tiny"
    if not student.exists():
        save_tiny_checkpoint(student, vocab=LETTERS)
    texts = ["a bee had a bad cafe", "fed a deaf bee", "a cab faced a deaf cage"]
    decoding = {"temperature": 1.5, "max_new_tokens": 24}
    config = {
        "name": "open",
        "task": {"type": "jsonl", "path": str(folder / "data"), "verifier": "role"},
        "teacher": {"model": "script", "samples": 3, "sampler": {"type": "scripted", "default": texts}},
        "student": {"model": str(student), "samples": 4, "decoding": decoding},
        "rounds": 2,
        "pairs": {"per_problem": 2},
        "judge": judge(),
        "evaluate": {"teacher": True, "decoding": {"temperature": 0, "max_new_tokens": 24}},
        "mechanisms": {"problems": 2},
        "train": {"pairs_per_step": 4, "learning_rate": 3e-2, "max_length": 128, "logging_steps": 1},
        "runs": str(folder / "runs"),
    }
    path = folder / "open.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def config_of(folder: Path, **changes: Any) -> Config:
    return load_config(open_ended(folder, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end."""
    return run(config_of(tmp_path_factory.mktemp("open")))


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report/report.json").read_bytes())
    return content


def test_the_judge_decides_who_is_chosen(finished: Path) -> None:
    metrics = read_manifest(finished / "round-1/pairs").metrics
    pairs = list(read_jsonl(finished / "round-1/pairs/pairs.jsonl", Pair))
    by_problem = {pair.problem_id: pair.chosen_policy for pair in pairs}
    assert by_problem.pop("p0", "student-0") == "student-0" and "p1" not in by_problem
    assert by_problem and set(by_problem.values()) == {"teacher"}
    assert metrics["candidates"] > metrics["pairs"] == len(pairs)
    assert metrics["dropped"]["problem"]["undecided"] == 1


def test_the_headline_is_the_win_rate_against_the_initial_student(finished: Path) -> None:
    report = report_of(finished)
    assert report["headline"]["policy"] == "student-2" and report["headline"]["against"] == "student-0"
    rows = {(row["policy"], row["against"], row["split"]): row for row in report["win_rates"]}
    students = ("student-1", "student-2")
    expected = {("student-0", "teacher", "test"), *((one, "teacher", "test") for one in students)}
    expected |= {(one, "student-0", split) for one in students for split in ("test", "validation")}
    assert rows.keys() == expected
    against_teacher = rows["student-2", "teacher", "test"]
    assert (against_teacher["won"], against_teacher["lost"], against_teacher["win_rate"]) == (3, 1, 0.75)
    assert "comparisons" not in report and all(row["accuracy"] is None for row in report["results"])
    text = (finished / "report/report.md").read_text()
    assert "student-2 wins" in text and "## Win rates on test" in text and "ccuracy" not in text


def test_the_page_the_card_and_the_status_speak_of_win_rates(finished: Path) -> None:
    seen = Seen((finished / "report/report.html").read_text())
    assert seen.row("student-2", "teacher", "4", "75.0%")
    assert "student-2 wins" in seen.text and "This task has no right answers." in seen.text
    assert "Accuracy" not in seen.text and "Traces by outcome" not in seen.text
    assert seen.row("round-2/judged") and seen.row("the judge could not tell in any of its pairs")
    assert "student-2 wins" in (finished / "student/README.md").read_text()
    states = {name: (state, result) for name, state, result in status(finished)}
    assert {state for state, _ in states.values()} == {"finished"}
    assert states["round-2/judged"][1].endswith("75.0% of 4 on test, against teacher")
    assert "candidates" in states["round-1/pairs"][1]
    both = Seen(runs_page([finished, finished]))
    assert both.row("open (2): student-2", "teacher")
    assert "No evaluated student" not in both.text and "Paired comparison" not in both.text


def test_mechanisms_leave_out_what_there_is_not(finished: Path) -> None:
    measures = report_of(finished)["mechanisms"]["measures"]
    assert {row["parsed"] for row in measures["texts"]} == {None}
    assert "unique_answers" not in {row["measure"] for row in measures["diversity"]}


def test_round_2_asks_only_what_is_new(finished: Path) -> None:
    ids = [
        {line["prompt_id"] for line in map(json.loads, (finished / name).read_text().splitlines())}
        for name in ("round-1/pairs/traces.jsonl", "round-2/pairs/traces.jsonl")
    ]
    assert ids[0] & ids[1] and ids[1] - ids[0]
    (table,) = [
        table for table in report_of(finished)["mechanisms"]["tables"] if table["title"].startswith("Negatives")
    ]
    assert "by role" in table["note"]


def test_again_nothing_is_done_and_pairs_are_exported(finished: Path, tmp_path: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")}
    run(load_config(finished.parents[1] / "open.yaml"))
    written = {path for path in stamps if path.stat().st_mtime_ns != stamps[path]}
    assert {path.name for path in written} <= {"environment.json"}
    words = export_rows(finished, "trl", tmp_path / "pairs.jsonl")
    assert words.startswith(f"wrote {read_manifest(finished / 'round-2/pairs').metrics['pairs']} rows of round 2")


def test_another_judge_is_an_error_that_names_it(finished: Path) -> None:
    changed = load_config(finished.parents[1] / "open.yaml", ["judge.rubric=Be kind."])
    with pytest.raises(RunError, match=r"(?s)judge\.rubric: .*add --redo round-1/pairs"):
        run(changed)


def test_a_judge_that_is_not_there_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    config = config_of(tmp_path, judge={"model": str(tmp_path / "gone"), "sampler": "hf"})
    with pytest.raises(ModelError, match=r"found nothing at .*gone"):
        run(config)
    assert not (config.run_dir / "problems").exists()


def test_a_teacher_whose_texts_are_all_empty_is_not_told_to_be_right(tmp_path: Path) -> None:
    silent = {"model": "script", "samples": 2, "sampler": {"type": "scripted", "default": ["", " "]}}
    with pytest.raises(DataError, match=r"expected a teacher trace that .* \(16 unparseable\); see why its texts"):
        run(config_of(tmp_path, teacher=silent))


@pytest.mark.slow
def test_killed_in_the_judges_stages_it_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    path = open_ended(tmp_path, judge={**judge(), "sampler": {**judge()["sampler"], "delay": 0.02}})
    for stage in ("round-1/pairs", "round-2/pairs", "round-2/judged"):
        with subprocess.Popen([*COMMAND, "run", str(path)], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(line.startswith(f"{stage} ...") for line in process.stderr)
            partial = tmp_path / "runs/open" / stage / "traces.partial.jsonl"
            while not partial.exists():
                assert process.poll() is None
            process.kill()
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    assert stable_files(tmp_path / "runs/open") == stable_files(finished)
    for name in ("round-1/pairs/judgements.jsonl", "round-2/judged/win-rates.json"):
        assert (tmp_path / "runs/open" / name).read_bytes() == (finished / name).read_bytes()


def test_pairs_by_role_need_no_judge(tmp_path: Path) -> None:
    folder = run(config_of(tmp_path, judge=None), until="round-1/pairs")
    assert not (folder / "round-1/candidates").exists()
    pairs = list(read_jsonl(folder / "round-1/pairs/pairs.jsonl", Pair))
    assert {(pair.chosen_policy, pair.rejected_policy) for pair in pairs} == {("teacher", "student-0")}


@pytest.mark.slow
def test_without_a_judge_the_report_says_that_nothing_is_measured(tmp_path: Path) -> None:
    folder = run(config_of(tmp_path, judge=None, rounds=1, evaluate={"decoding": {"max_new_tokens": 8}}))
    assert report_of(folder)["headline"] == {"policy": "student-1", "split": "test", "n": 4}
    assert "not measured: no gold answers, and no judge" in (folder / "report/report.md").read_text()
    assert all("first shown" not in (folder / name).read_text() for name in ("report/report.md", "student/README.md"))
    assert "No answers were judged yet." in run_page(folder)


def test_a_judge_that_always_takes_the_first_stops_the_run_with_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the order decides: the judge's two answers disagree in 100%"):
        run(config_of(tmp_path, judge=judge({}) | {"sampler": {"type": "scripted", "default": ["[[A]]"]}}))


def test_a_judge_that_only_measures_leaves_pairs_by_role(tmp_path: Path) -> None:
    names = [stage.name for stage in plan(config_of(tmp_path, judge=judge(pairs=False)))]
    assert "round-1/candidates" not in names and "round-2/judged" in names
    likes = [stage.name for stage in plan(config_of(tmp_path, objective="sft"))]
    assert "round-1/candidates" not in likes  # there is no rejected side to compare


def test_without_a_judge_the_plan_is_what_it_was(tmp_path: Path) -> None:
    """No stage and no option that a finished run was not asked for."""
    stages = plan(load_config(experiment(tmp_path)))
    assert not [stage.name for stage in stages if "judge" in stage.name or "candidates" in stage.name]
    assert not [key for stage in stages for key in flat_options(stage) if "judge" in key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pairs": {"negatives_from": "teacher"}},
            "expected a task with gold answers for pairs.negatives_from: teacher",
        ),
        ({"pairs": {"matched": True, "phi": 0.0}}, "expected a task with gold answers for pairs.matched: true"),
        (
            {"pairs": {"phi": "adaptive"}, "rounds": 3},
            "expected a task with gold answers for pairs.phi: {adaptive: yield}",
        ),
        ({"extrapolate": {}}, "expected a task with gold answers for extrapolate"),
        ({"judge": {"model": "m", "prompt": "{question}"}}, "expected a prompt with {first}, {second} in it"),
        ({"judge": {"sampler": "hf"}}, "judge.model: expected a value, found none"),
    ],
)
def test_what_cannot_be_is_said_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        config_of(tmp_path, **changes)


def test_gold_answers_need_no_judge(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected task\.verifier: role beside judge, found number"):
        load_config(experiment(tmp_path, judge=judge()))


def test_what_counts_right_answers_refuses_an_open_ended_task(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="expected tasks with gold answers, found an open-ended one in open"):
        design_of([config], Wanted("orpo-off"))
    sampler = Sampler.model_validate({"type": "scripted", "default": ["x"]})
    with pytest.raises(ConfigError, match="expected a task with gold answers, found an open-ended one"):
        evaluate_model("m", config.task, sampler, Decoding(), "test", None)


def test_check_knows_the_judges_stages_and_its_missing_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sizes = dict(plan_table(config)[0])
    assert sizes["round-1/pairs"] == "at most 16 pairs judged, each in both orders"
    assert sizes["baseline"] == "4 answers on test and 2 answers on validation"
    assert sizes["round-1/judged"] == "8 pairs of answers judged, each in both orders"
    assert "The answer is" not in rendered(config, 1)
    with pytest.raises(ConfigError, match=r"judge\.model: expected"):
        plan_table(config_of(tmp_path, judge={"model": str(tmp_path / "gone/away")}))


def test_the_bill_has_the_judges_calls(tmp_path: Path) -> None:
    """8 problems x 2 pairs x 2 orders; 4 test problems against two and 2 validation ones against one, in 2 orders."""
    api = {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "price": {"prompt": 10, "completion": 100}}
    api["budget"] = {"calls": 100}
    paid = {"model": "m", "sampler": api, "prompt": "{question}{first}{second}", "decoding": {"max_new_tokens": 7}}
    config = config_of(tmp_path, judge=paid).model_copy(update={"ledger": tmp_path / "ledger.sqlite"})
    bill = {name: (expected, most) for name, expected, most in forecast(config)[1:]}
    assert bill["round-1/pairs: samples"] == ("32 of 32 (0 in the run, 0 in the ledger)", "32 calls")
    longest, texts = len("p a fed a bee?"), config.teacher.decoding.max_new_tokens + 24
    tokens = 32 * (longest + 256 + 16 + texts)
    assert bill["round-1/pairs: prompt tokens"][1] == f"{tokens} (texts at their limits)"
    assert bill["round-1/pairs: completion tokens"] == ("not measured: run --pilot N", f"{32 * 7}")
    assert float(bill["round-1/pairs: money"][1]) == pytest.approx((tokens * 10 + 32 * 7 * 100) / 1e6, abs=1e-4)
    assert bill["round-2/judged: samples"][1] == "20 calls"
    assert bill["baseline-judged: samples"][1] == "8 calls"
    assert bill["round-2/judged: budget"][0] == "WARNING: not enough, the stage will stop before its end"
