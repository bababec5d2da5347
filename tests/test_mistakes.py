"""Every mistake a user can make is one message (expected, found, do), a non-zero exit code, and no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_end_to_end import cli, experiment, write_lines


def one_message(done, *words: str, code: int = 1) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    message = done.stderr.partition("error:")[2]
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("trian.max_length=3", 2, ["trian: unknown key; did you mean 'train'?"]),
        ("task.path=nowhere", 1, ["nowhere"]),
        ("student.model=./nowhere", 1, ["nowhere"]),
        ("train.max_length=3", 1, ["max_length"]),
        ("problems.test=tset", 1, ["tset", "test"]),
    ],
)
def test_settings_that_lead_nowhere(tmp_path: Path, override: str, code: int, words: list[str]) -> None:
    one_message(cli("run", experiment(tmp_path), override), *words, code=code)


def test_a_pilot_has_its_own_end(tmp_path: Path) -> None:
    done = cli("run", experiment(tmp_path), "--until", "teacher", "--pilot", 2)
    one_message(done, "expected --until or --pilot, found both", code=2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", ["train.jsonl:2"]),
        ('{"id": "x", "question": "Q?"}', ["train.jsonl:2", "answer"]),
        ('{"id": "p0", "question": "Q?", "answer": "1"}', ["p0"]),
        ('{"id": "x", "question": "Q?", "answer": "many"}', ["train.jsonl:2", "many"]),
        ('{"id": "x", "question": "", "answer": "1"}', ["train.jsonl:2", "question"]),
    ],
)
def test_malformed_problems_name_the_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = experiment(tmp_path)
    train = tmp_path / "data" / "train.jsonl"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    one_message(cli("run", path), *words)
    assert not (tmp_path / "runs/demo/problems/problems.jsonl").exists()


def test_an_empty_data_set(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    (tmp_path / "data" / "train.jsonl").write_text("")
    one_message(cli("run", path), "train")


def test_an_answer_letter_outside_the_choices(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    rows = [{"id": "a", "question": "Which?", "choices": ["oak", "plum"], "answer": "C"}]
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    one_message(cli("run", path, "task.verifier=choice"), "train.jsonl:1")


def test_no_correct_teacher_trace(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    write_lines(tmp_path / "teacher.jsonl", [{"id": f"p{i}", "texts": ["The answer is 77."]} for i in range(18)])
    one_message(cli("run", path), "expected", "correct", "teacher")


def test_no_wrong_student_trace(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    texts = [{"id": f"p{i}", "texts": [f"The answer is {2 * i}."]} for i in range(18)]
    write_lines(tmp_path / "student.jsonl", texts)
    one_message(cli("run", path), "wrong")


def test_every_trace_truncated(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    cut = {"text": "Let me think about", "finish_reason": "length"}
    write_lines(tmp_path / "teacher.jsonl", [{"id": f"p{i}", "texts": [cut]} for i in range(18)])
    one_message(cli("run", path), "max_new_tokens")


def test_a_corrupt_checkpoint(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    one_message(cli("run", path), str(tmp_path / "tiny"))


def test_a_corrupt_manifest_and_its_remedy(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    assert cli("run", path, "--until", "teacher").returncode == 0
    (tmp_path / "runs/demo/teacher/manifest.json").write_text("{")
    one_message(cli("run", path, "--until", "teacher"), "manifest.json", "--redo")
    assert cli("run", path, "--until", "teacher", "--redo", "teacher").returncode == 0


def test_a_loss_that_is_not_finite_names_the_row(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = experiment(tmp_path)
    weights = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "norm" in name)
    tensors[name][:] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    one_message(cli("run", path), "finite loss", "pairs.jsonl:")


def test_a_second_process_on_the_same_run(tmp_path: Path) -> None:
    from orpo_distill.runs import RunFolder

    path = experiment(tmp_path)
    with RunFolder(tmp_path / "runs" / "demo").lock():
        one_message(cli("run", path), "in use by process")


def test_a_run_folder_that_is_none(tmp_path: Path) -> None:
    one_message(cli("status", tmp_path), "run folder")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x"}', "found: no answer"),
        ('{"answer": "1"}', "found: no text"),
        ('{"text": 3, "answer": "1"}', "found: text '3', which is no text"),
        ("[1]", "found: list '[1]'"),
    ],
)
def test_lines_that_verify_cannot_read(line: str, words: str) -> None:
    done = cli("verify", "--verifier", "number", stdin=line + "\n")
    one_message(done, "line 1: expected JSON with text and answer", words)


def test_a_setting_without_a_value_and_a_task_without_a_verifier(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    words = "expected a value behind teacher.prefix=, found none; write teacher.prefix=null"
    one_message(cli("check", path, "teacher.prefix="), words, code=2)
    done = cli("eval", tmp_path / "tiny", "--task", "jsonl", "--path", tmp_path / "data")
    words = "--task: verifier: expected one of choice, exact, math, number, role, yes_no or module:Class, found none; "
    words += "add it: "
    one_message(done, words + "--task '{type: jsonl, verifier: ...}'", code=2)


def test_check_names_the_settings_whose_checkpoints_are_missing(tmp_path: Path) -> None:
    done = cli("check", experiment(tmp_path), "student.model=./no", "teacher={model: ./neither}", "task.path=nowhere")
    one_message(done, "teacher.model: expected", "student.model: expected", "task: expected a data set", code=2)


def test_check_prints_the_bill_before_it_asks_for_the_key(tmp_path: Path) -> None:
    teacher = "{model: m, sampler: {type: openai, base_url: 'http://127.0.0.1:9/v1', api_key_env: NO_SUCH_KEY}}"
    done = cli("check", experiment(tmp_path), f"teacher={teacher}", "--ledger", tmp_path / "none.sqlite")
    one_message(done, "api_key_env: expected the environment variable NO_SUCH_KEY to be set", code=2)
    assert "teacher: samples" in done.stdout and "round-1/train" in done.stdout


def test_a_ledger_before_the_first_purchase(tmp_path: Path) -> None:
    done = cli("ledger", "--ledger", tmp_path / "none.sqlite")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"nothing bought yet: there is no ledger at {tmp_path / 'none.sqlite'}")
    (tmp_path / "text.sqlite").write_text("Dear diary, " * 400)
    done = cli("ledger", "--ledger", tmp_path / "text.sqlite")
    one_message(
        done, "file is not a database", "this is no ledger and stays as it is: name another file (--ledger PATH)"
    )
    assert "make room" not in done.stderr


@pytest.mark.parametrize("limit", [700, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (5_000, 100_000))])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """No file may grow beyond `limit` bytes: the system refuses the write, as it does on a full disk."""
    path = experiment(tmp_path)
    script = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from orpo_distill.cli import main\nmain()"
    )
    command = [sys.executable, "-c", script, "run", str(path)]
    one_message(subprocess.run(command, capture_output=True, text=True), "make room", "run the same command")
    assert cli("run", path).returncode == 0
