"""The real command line, from YAML to the exported student; killed for real; and every user's mistake as one message.

Samplers are `scripted` (a component that ships), the trained student is a tiny random checkpoint.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import save_tiny_checkpoint

COMMAND = [sys.executable, "-c", "from orpo_distill.cli import main; main()"]
STABLE = ("problems.jsonl", "traces.jsonl", "verdicts.jsonl", "pairs.jsonl", "model.safetensors")


def cli(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, env=environment, timeout=300
    )


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment(folder: Path, **changes: object) -> Path:
    """An experiment of 12 train, 2 validation and 4 test problems; the student is wrong on every third sample."""
    rows = [{"id": f"p{i}", "question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(18)]
    write_lines(folder / "data" / "train.jsonl", rows[:12])
    write_lines(folder / "data" / "validation.jsonl", rows[12:14])
    write_lines(folder / "data" / "test.jsonl", rows[14:])
    write_lines(
        folder / "teacher.jsonl",
        [
            {
                "id": row["id"],
                "texts": [
                    f"Twice, so {row['answer']}. The answer is {row['answer']}.",
                    f"I add {row['id']} to itself. The answer is {row['answer']}.",
                ],
            }
            for row in rows
        ],
    )
    write_lines(
        folder / "student.jsonl",
        [
            {"id": row["id"], "texts": [f"The answer is {row['answer']}.", "I guess. The answer is 1.", "No idea."]}
            for row in rows
        ],
    )
    student = folder / "tiny"
    if not student.exists():
        save_tiny_checkpoint(student)
    config = {
        "name": "demo",
        "task": {"type": "jsonl", "path": str(folder / "data"), "verifier": "number", "prompt": "{question}"},
        "teacher": {
            "model": "script",
            "samples": 2,
            "sampler": {"type": "scripted", "path": str(folder / "teacher.jsonl")},
        },
        "student": {
            "model": str(student),
            "samples": 3,
            "sampler": {"type": "scripted", "path": str(folder / "student.jsonl")},
        },
        "rounds": 2,
        "evaluate": {"teacher": True, "sft": True},
        "train": {"pairs_per_step": 4, "learning_rate": 1e-3, "max_length": 256, "logging_steps": 1},
        "runs": str(folder / "runs"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def stable_files(run: Path) -> dict[str, bytes]:
    """What must not depend on kills: byte for byte, with the `results` of the report."""
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.name in STABLE and "superseded" not in path.parts and "checkpoint" not in str(path.relative_to(run))
    }
    report = json.loads((run / "report" / "report.json").read_bytes())
    return files | {"results": json.dumps(report["results"]).encode()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    done = cli("run", experiment(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_one_command_gives_student_report_and_table(finished: Path) -> None:
    run = finished / "runs" / "demo"
    report = json.loads((run / "report" / "report.json").read_bytes())
    students = [(f"student-{i}", split, n) for i in range(3) for split, n in (("test", 4), ("validation", 2))]
    expected = [*students, ("teacher", "test", 4), ("sft", "test", 4), ("sft", "validation", 2)]
    assert [(row["policy"], row["split"], row["n"]) for row in report["results"]] == expected
    assert {row["policy"]: row["correct"] for row in report["results"]}["teacher"] == 4
    assert report["headline"]["policy"] == "student-2"
    names = {path.name for path in (run / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert "student-2" in (run / "report" / "report.md").read_text()


def test_the_final_student_is_an_ordinary_checkpoint(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "runs" / "demo" / "student"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("What", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()


def test_the_second_run_does_nothing(finished: Path) -> None:
    run = finished / "runs" / "demo"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    again = cli("run", finished / "experiment.yaml")
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")} == before
    assert "..." not in again.stderr


def test_status_lists_every_stage_as_finished(finished: Path) -> None:
    done = cli("status", finished / "runs" / "demo")
    lines = done.stdout.splitlines()
    assert len(lines) > 10
    assert all("finished" in line for line in lines[1:])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_at_random_moments_the_result_is_the_same(finished: Path, tmp_path: Path, seed: int) -> None:
    """kill -9 some time into each of several starts, then to the end: byte-identical to the uninterrupted run."""
    path = experiment(tmp_path)
    moment = random.Random(seed)
    reached = []
    for _ in range(3):
        with subprocess.Popen(
            [*COMMAND, "run", str(path)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process:
            time.sleep(moment.uniform(0.5, 9))
            process.kill()
        reached.append(len(list((tmp_path / "runs").rglob("manifest.json"))))
    assert any(reached), "no kill hit the run at work"
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    assert stable_files(tmp_path / "runs" / "demo") == stable_files(finished / "runs" / "demo")


# Dies by SIGKILL the moment Python is about to do `event` on a path that ends in `suffix` (PEP 578).
DYING = """
import os, sys
event, suffix = sys.argv.pop(1), sys.argv.pop(1)
def die(name, arguments):
    if name == event and any(str(argument).endswith(suffix) for argument in arguments[:2]):
        os.kill(os.getpid(), 9)
sys.addaudithook(die)
from orpo_distill.cli import main
main()
"""


@pytest.mark.parametrize(
    ("event", "suffix"),
    [
        ("os.rename", "teacher/traces.jsonl"),
        ("os.remove", "student-0/traces.partial.jsonl"),
        pytest.param("os.rename", "teacher-verdicts/manifest.json", marks=pytest.mark.slow),
        pytest.param("os.rename", "round-1/pairs/pairs.jsonl", marks=pytest.mark.slow),
        ("open", "optimizer.pt"),
        ("os.rename", "round-1/train/model"),
        pytest.param("os.rename", "round-2/train/train.json", marks=pytest.mark.slow),
        pytest.param("os.rename", "report/report.json", marks=pytest.mark.slow),
    ],
)
def test_killed_between_write_and_rename_the_result_is_the_same(
    finished: Path, tmp_path: Path, event: str, suffix: str
) -> None:
    path = experiment(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", DYING, event, suffix, "run", str(path)],
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    assert stable_files(tmp_path / "runs" / "demo") == stable_files(finished / "runs" / "demo")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_everything_and_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    path = experiment(tmp_path)
    command = [*COMMAND, "run", str(path), slow_teacher(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "runs" / "demo" / "teacher" / "traces.partial.jsonl"
        wait_for_line(partial)
        process.send_signal(number)
        started = time.monotonic()
        assert process.wait(timeout=30) == code
        assert time.monotonic() - started < 30
        assert process.stderr is not None
        errors = process.stderr.read()
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    kept = partial.read_bytes()
    assert cli("run", path, "--until", "teacher").returncode == 0
    assert kept.count(b"\n") < 24
    first = (tmp_path / "runs" / "demo" / "teacher" / "traces.jsonl").read_bytes()
    assert set(kept.splitlines()) <= set(first.splitlines())


def slow_teacher(folder: Path) -> str:
    return f"teacher.sampler={{type: scripted, path: {folder / 'teacher.jsonl'}, delay: 0.3}}"


def wait_for_line(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_survives_the_one_that_the_user_started(tmp_path: Path, number: int) -> None:
    path = experiment(tmp_path, launch={"sample": {"processes": 2}})
    with subprocess.Popen([*COMMAND, "run", str(path), slow_teacher(tmp_path)], stderr=subprocess.DEVNULL) as process:
        partial = tmp_path / "runs" / "demo" / "teacher" / "traces.partial-1.jsonl"
        wait_for_line(partial)
        process.send_signal(number)
        process.wait(timeout=30)
    time.sleep(1.5)
    before = partial.read_bytes()
    time.sleep(1)
    assert partial.read_bytes() == before


def test_a_process_that_fails_gives_its_message(tmp_path: Path) -> None:
    path = experiment(tmp_path, launch={"sample": {"processes": 2}})
    done = cli("run", path, "teacher.sampler={type: scripted, path: nowhere.jsonl}")
    assert done.returncode == 1
    assert "nowhere.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_sampling_in_two_processes_gives_the_same_traces(finished: Path, tmp_path: Path) -> None:
    path = experiment(tmp_path, launch={"sample": {"processes": 2}})
    for stage in ("teacher-verdicts", "baseline"):
        done = cli("run", path, "--until", stage)
        assert done.returncode == 0, done.stderr
    for name in ("teacher/traces.jsonl", "teacher-verdicts/verdicts.jsonl", "baseline/results.json"):
        assert (tmp_path / "runs/demo" / name).read_bytes() == (finished / "runs/demo" / name).read_bytes()


@pytest.mark.slow
def test_training_under_accelerate_in_two_processes(finished: Path, tmp_path: Path) -> None:
    """The same losses as in one process, up to rounding; and two processes there were."""
    path = experiment(tmp_path, launch={"train": {"launcher": "accelerate", "processes": 2}})
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (folder / "runs/demo/round-2/train/log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, finished)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (tmp_path / "runs/demo/round-2/train/checkpoint/rng_state_1.pth").exists()


def test_lora_adapters_go_through_the_rounds_and_are_merged_at_the_end(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    done = cli("run", path, "train.lora={r: 4, alpha: 8}")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo"
    assert (run / "round-2" / "train" / "model" / "adapter_config.json").exists()
    names = {path.name for path in (run / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names


def test_a_later_round_is_trained_again_although_its_start_was_deleted(tmp_path: Path) -> None:
    """`train.keep: last` removed round 1's optimizer state; redoing round 2 trains round 1 again, to the same bytes."""
    path = experiment(tmp_path, evaluate={})
    assert cli("run", path).returncode == 0
    run = tmp_path / "runs" / "demo"
    weights = run / "round-2" / "train" / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert not (run / "round-1" / "train" / "checkpoint").exists()
    again = cli("run", path, "--redo", "round-2/train")
    assert again.returncode == 0, again.stderr
    assert weights.read_bytes() == before
    changed = cli("run", path, "train.learning_rate=1e-4", "--redo", "round-1/train")
    assert changed.returncode == 0, changed.stderr
    assert weights.read_bytes() != before


def test_a_refused_run_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    assert cli("run", path, "--until", "teacher").returncode == 0
    config = tmp_path / "runs" / "demo" / "config.yaml"
    before = config.read_text()
    assert cli("run", path, "seed=4", "--until", "teacher").returncode == 1
    assert config.read_text() == before


def test_raised_samples_keep_what_is_there(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    assert cli("run", path, "problems.limit=5", "--until", "round-1/pairs").returncode == 0
    run = tmp_path / "runs" / "demo"
    before = (run / "student-0" / "traces.jsonl").read_text().splitlines()
    more = cli("run", path, "problems.limit=9", "student.samples=5", "--until", "round-1/pairs")
    assert more.returncode == 0, more.stderr
    after = (run / "student-0" / "traces.jsonl").read_text().splitlines()
    assert (len(before), len(after)) == (15, 45)
    assert set(before) <= set(after)


def test_a_changed_verifier_verifies_again_and_never_samples_again(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    assert cli("run", path, "--until", "round-1/pairs").returncode == 0
    traces = tmp_path / "runs" / "demo" / "teacher" / "traces.jsonl"
    before = traces.stat().st_mtime_ns
    changed = cli("run", path, "task.verifier=exact", "--until", "round-1/pairs")
    assert changed.returncode == 1
    assert "problems: task.verifier.type: 'number' -> 'exact'" in changed.stderr
    assert "  teacher:" not in changed.stderr
    redone = cli("run", path, "task.verifier=exact", "--until", "round-1/pairs", "--redo", "problems")
    assert redone.returncode == 0, redone.stderr
    assert traces.stat().st_mtime_ns == before
    assert "teacher-verdicts ..." in redone.stderr


def test_pilot_samples_a_few_and_the_run_keeps_them(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    done = cli("run", path, "--pilot", 4)
    assert done.returncode == 0, done.stderr
    assert "problems: 4 of 12" in done.stdout
    assert "with both sides: 4 (100%)" in done.stdout
    assert "for training (2 x" in done.stdout
    pilot = (tmp_path / "runs/demo/teacher/traces.jsonl").read_text().splitlines()
    assert cli("run", path, "--until", "teacher").returncode == 0
    assert set(pilot) < set((tmp_path / "runs/demo/teacher/traces.jsonl").read_text().splitlines())


def test_check_prints_the_plan_and_prompts(tmp_path: Path) -> None:
    done = cli("check", experiment(tmp_path), "--show", 1)
    assert done.returncode == 0, done.stderr
    assert "round-2/train" in done.stdout
    assert "What is" in done.stdout
    assert "[[" in done.stdout and "]]" in done.stdout


def test_verify_judges_lines(tmp_path: Path) -> None:
    cases = [
        {"text": "The answer is 18. She had 16 eggs.", "answer": "18"},
        {"text": "The answer is 17.", "answer": "18"},
        {"text": "Who knows?", "answer": "18"},
    ]
    done = cli("verify", "--verifier", "number", stdin="".join(json.dumps(case) + "\n" for case in cases))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["correct"] for line in done.stdout.splitlines()] == [True, False, None]


def test_eval_prints_json(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    config = yaml.safe_load(path.read_text())
    done = cli(
        "eval",
        tmp_path / "tiny",
        "--task",
        yaml.safe_dump(config["task"], default_flow_style=True),
        "--limit",
        3,
        "--max-new-tokens",
        5,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["n"] == 3
    assert row["low"] <= row["accuracy"] <= row["high"]


def test_the_embedded_default_in_small_and_a_second_time(tmp_path: Path) -> None:
    """`orpo-distill quickstart` with real models on both sides; the second run finds nothing to do."""
    small = [
        "problems.limit=24",
        "rounds=2",
        "train.steps_per_round=3",
        "evaluate.limit=20",
        "evaluate.validation_limit=10",
    ]
    first = cli("quickstart", f"runs={tmp_path}", *small)
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "quickstart" / "report" / "report.json").read_bytes())
    rows = {row["policy"]: row for row in report["results"] if row["split"] == "test"}
    assert set(rows) == {"student-0", "student-1", "student-2", "teacher", "sft"}
    assert rows["teacher"]["correct"] > rows["student-0"]["correct"]
    assert rows["student-0"]["parsed"] >= 0.9
    second = cli("quickstart", f"runs={tmp_path}", *small)
    assert second.returncode == 0
    assert second.stdout == first.stdout
    assert "..." not in second.stderr
