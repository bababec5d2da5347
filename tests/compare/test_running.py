"""The real command on scripted texts and a tiny student: sharing, resuming after a kill, what cannot be run."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orpo_distill.compare.cells import Wanted, design_of
from orpo_distill.compare.running import _end, compare
from orpo_distill.errors import RunError
from orpo_distill.loading import load_config
from orpo_distill.runs import RunFolder
from tests.test_end_to_end import COMMAND, cli, experiment, write_lines

METHODS = "zero-shot,single-cot,orpo-zero,orpo-off,orpo-mixed"
ASKED = ("--methods", METHODS, "--seeds", 2, "--learning-rates", "1e-3,2e-3")


def figures(folder: Path) -> dict:
    """`compare.json` without what a clock or a folder's name decides."""
    content = json.loads((folder / "runs" / "demo-compare" / "compare.json").read_bytes())
    for cell in content["cells"]:
        del cell["seconds"]
    return {key: value for key, value in content.items() if key != "command"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    done = cli("compare", experiment(folder), *ASKED)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


def test_every_method_seed_and_budget_is_a_cell(finished: Path) -> None:
    found = figures(finished)
    cells = [(cell["method"], cell["seed"], cell["budget"]) for cell in found["cells"]]
    trained = METHODS.split(",")[1:]
    expected = [(name, seed, budget) for name in trained for seed in (0, 1) for budget in ("epochs", "tokens")]
    assert sorted(cells[1:]) == sorted(expected)
    assert cells[0] == ("zero-shot", None, None)
    assert all(cell["n"] == 4 for cell in found["cells"])
    page = (finished / "runs" / "demo-compare" / "report.html").read_text()
    assert "orpo-mixed" in page
    names = {(row["a"], row["b"], row["family"]) for row in found["contrasts"]}
    assert ("orpo-mixed", "orpo-off", "primary") in names
    assert ("single-cot", "zero-shot", "exploratory") in names
    assert len({row["learning_rate"] for row in found["search"] if row["method"] == "single-cot"}) == 2


def test_traces_are_made_once(finished: Path) -> None:
    said = (finished / "said").read_text().splitlines()
    assert said.count("teacher ...") == said.count("student-0 ...") == said.count("baseline ...") == 1
    # Round 1 of mixed is that of off, and the search's runs with the chosen rate are those of the first seed.
    folder = finished / "runs" / "demo-compare"
    mixed, off = (folder / f"orpo-{name}-epochs-s0" / "round-1" / "train" for name in ("mixed", "off"))
    assert mixed.samefile(off)
    assert len(list((folder / "shared").glob("teacher-*"))) == 2  # traces and verdicts


def test_search_leaves_test_problems_alone(finished: Path) -> None:
    searches = list((finished / "runs" / "demo-compare").glob("search-*"))
    assert len(searches) == 8
    for search in searches:
        (results,) = search.glob("round-2/evaluate/results.json")
        assert {row["split"] for row in json.loads(results.read_bytes())} == {"validation"}


def test_zero_weight_trains_on_the_same_rows_in_the_same_order(finished: Path) -> None:
    folder = finished / "runs" / "demo-compare"
    zero, off = (folder / f"orpo-{name}-epochs-s1" for name in ("zero", "off"))
    assert (zero / "round-1" / "pairs").samefile(off / "round-1" / "pairs")
    logs = [(run / "round-1/train/log.jsonl").read_text().splitlines() for run in (zero, off)]
    steps = [[json.loads(line)["tokens"] for line in log] for log in logs]
    assert steps[0] == steps[1]


def test_equal_tokens_are_equal_within_a_step(finished: Path) -> None:
    cells = {(c["method"], c["budget"]): c for c in figures(finished)["cells"] if c["seed"] == 0}
    target = cells["orpo-off", "epochs"]["trained_tokens"]
    for method in METHODS.split(",")[1:]:
        cell = cells[method, "tokens"]
        a_round = cell["trained_tokens"] / cell["steps"] * 2  # 2 rounds
        assert abs(cell["trained_tokens"] - target) <= max(a_round, 0.05 * target), method
    assert cells["single-cot", "tokens"]["steps"] > cells["single-cot", "epochs"]["steps"]


def test_each_run_is_a_plain_run_folder(finished: Path) -> None:
    run = finished / "runs" / "demo-compare" / "orpo-mixed-epochs-s1"
    status = cli("status", run)
    assert status.returncode == 0, status.stderr
    states = {line.split()[0]: line.split()[1] for line in status.stdout.splitlines()[1:]}
    assert states.pop("student") == "not"  # nobody asked for the model
    assert set(states.values()) == {"finished"}
    assert {"teacher", "round-2/train"} <= json.loads((run / "times.json").read_bytes()).keys()
    done = cli("run", run / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert (run / "student" / "model.safetensors").exists()


def test_the_second_time_nothing_runs(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("manifest.json")}
    again = cli("compare", finished / "experiment.yaml", *ASKED)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("manifest.json")} == before


@pytest.mark.slow
def test_killed_and_in_two_processes_it_comes_to_the_same(finished: Path, tmp_path: Path) -> None:
    path = experiment(tmp_path)
    command = [*COMMAND, "compare", str(path), *map(str, ASKED), "--jobs", "2"]
    for end in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 120
            made = len(list(tmp_path.rglob("manifest.json")))
            while len(list(tmp_path.rglob("manifest.json"))) < made + 6 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(end)
            process.communicate(timeout=60)
    time.sleep(1)  # workers of the killed one look for it five times a second
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 at a time; each says what it does in" in done.stderr
    assert figures(tmp_path) == figures(finished)


def test_no_worker_outlives_the_lock() -> None:
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    _end([worker])
    assert worker.exitcode == -signal.SIGTERM


def test_what_the_data_cannot_give_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """The scripted teacher is always right, so there are no negatives of the teacher."""
    asked = ("--methods", "orpo-teacher-negatives,orpo-off", "--seeds", 1, "--learning-rates", "1e-3")
    done = cli("compare", experiment(tmp_path), *asked, "--budgets", "epochs", "--name", "small")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "runs" / "small" / "compare.json").read_bytes())
    assert {cell["method"] for cell in content["cells"]} == {"zero-shot", "orpo-off"}
    assert any("orpo-teacher-negatives" in note and "expected a wrong" in note for note in content["notes"])


def test_a_run_in_use_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    """Nor is anything made that follows from all runs of its seed; free again, it comes to what it would have."""
    design = design_of(
        [load_config(experiment(tmp_path))], Wanted("orpo-off,orpo-mixed", seeds=1, learning_rates="1e-3")
    )
    with RunFolder(design.folder / "orpo-mixed-epochs-s0").lock():
        with pytest.raises(RunError, match=r"to be free, found others at work in orpo-mixed-epochs-s0; wait"):
            compare(design)
        content = json.loads((design.folder / "compare.json").read_bytes())
    assert [cell["method"] for cell in content["cells"]] == ["zero-shot", "orpo-off"]
    assert any(note.startswith("orpo-mixed-epochs-s0 could not be run") for note in content["notes"])
    compare(design)
    content = json.loads((design.folder / "compare.json").read_bytes())
    assert len(content["cells"]) == 1 + 2 * 2


def test_learning_rates_are_compared_when_all_are_there(tmp_path: Path) -> None:
    path = experiment(tmp_path, rounds=1)
    design = design_of([load_config(path)], Wanted("orpo-off", seeds=1, learning_rates="1e-3,2e-3", budgets="epochs"))
    with (
        RunFolder(design.folder / "search-orpo-off-lr0.001-s0").lock(),
        pytest.raises(RunError, match=r"others at work in search-orpo-off-lr0\.001-s0"),
    ):
        compare(design)
    assert not list(design.folder.glob("orpo-off-*"))


def test_the_plan_says_what_is_shared(tmp_path: Path) -> None:
    done = cli("compare", experiment(tmp_path), *ASKED, "--plan")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["zero-shot"] == ["1", "2", "0", "2"]
    assert int(rows["all"][2]) > 0
    assert not (tmp_path / "runs").exists()


def test_matched_negatives_are_as_many_of_one_as_of_the_other(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["texts"][1] = "Wrong on purpose. The answer is 1."
    write_lines(tmp_path / "teacher.jsonl", rows)
    asked = ("--methods", "orpo-teacher-negatives", "--seeds", 1, "--learning-rates", "1e-3", "--budgets", "epochs")
    done = cli("compare", path, *asked)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "demo-compare"
    sides = {}
    for name in ("teacher", "student"):
        lines = (folder / f"orpo-{name}-negatives-epochs-s0" / "round-1/pairs/pairs.jsonl").read_text().splitlines()
        sides[name] = [json.loads(line) for line in lines]
    assert {row["rejected_policy"] for row in sides["teacher"]} == {"teacher"}
    assert {row["rejected_policy"] for row in sides["student"]} == {"student-0"}
    assert [row["problem_id"] for row in sides["teacher"]] == [row["problem_id"] for row in sides["student"]]
    assert len(sides["teacher"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "orpo-of"), "did you mean 'orpo-off'"),
        (("--methods", ""), "expected methods or a sweep"),
        (("--sweep", "pairs.phi=1"), "two different values"),
        (("--sweep", "pairs.phii=0,1"), "unknown key; did you mean 'phi'"),
        (("--learning-rates", "fast"), "--learning-rates"),
        (("--budgets", "euros"), "--budgets"),
        (("--budgets", "tokens", "--sweep", "K=1,2"), "expected epochs in --budgets beside --sweep"),
        (("problems.validation=null",), "expected validation problems"),
        (("problems.validation=dev",), "no split 'dev' with problems in the task"),
        (("--sweep", "train.learning_rate=1e-4,1e-3"), "--learning-rates"),
    ],
)
def test_mistakes_are_one_message(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("compare", experiment(tmp_path), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_validation_problems_nothing_is_trained(tmp_path: Path) -> None:
    """The default split is skipped where the task has none; learning rates cannot be chosen then."""
    path = experiment(tmp_path)
    (tmp_path / "data" / "validation.jsonl").unlink()
    done = cli("compare", path, "--methods", "orpo-off")
    assert done.returncode == 2, done.stderr
    assert "no split 'validation' with problems in the task" in done.stderr
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_comparison_in_which_nothing_can_be_run_is_an_error(tmp_path: Path) -> None:
    path = experiment(tmp_path, evaluate={"test": False})
    student = tmp_path / "student.jsonl"
    student.write_text("".join(student.read_text().splitlines(keepends=True)[:12]))  # train problems alone
    done = cli("compare", path, "--methods", "zero-shot")
    assert done.returncode == 1, done.stderr
    assert "expected a method that the data allows, found none; zero-shot:" in done.stderr
    assert "no scripted reply" in done.stderr


def test_test_problems_are_measured_whatever_the_config_says(tmp_path: Path) -> None:
    done = cli("compare", experiment(tmp_path, evaluate={"test": False}), "--methods", "zero-shot")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "runs" / "demo-compare" / "compare.json").read_bytes())
    assert [(cell["method"], cell["n"]) for cell in content["cells"]] == [("zero-shot", 4)]
    assert re.search(r"method, no training +mean.*\nzero-shot +\d", done.stdout)


def test_a_deletion_that_is_broken_off_leaves_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    from orpo_distill.compare.running import DELETED, _delete_whole

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"1")
    (tmp_path / DELETED).mkdir()  # the rest of another one
    (tmp_path / DELETED / "optimizer.pt").write_bytes(b"0")
    _delete_whole(checkpoint)
    assert list(tmp_path.iterdir()) == []
