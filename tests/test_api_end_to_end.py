"""The real command line with a teacher behind an API: a language model on llama.cpp's server, and nasty servers.

The student of the first run is the quickstart's, sampled and trained for real; that of the others is a script.
"""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

import orpo_distill
from orpo_distill.records import FinishReason, Trace, read_jsonl
from tests.checkpoints import save_tiny_checkpoint
from tests.servers import faulty_server
from tests.servers.answers import NASTY
from tests.servers.llama import MODEL, llama_server

COMMAND = [sys.executable, "-c", "from orpo_distill.cli import main; main()"]
STUDENT = Path(orpo_distill.__file__).parent / "quickstart" / "student"
KEY = "sk-secret-0123456789"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
SHOWN = """Question: What is 5 + 2?
Answer: 5 + 2 = 7. The answer is 7.
Question: What is 3 + 6?
Answer: 3 + 6 = 9. The answer is 9."""


def cli(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**CLEAN, "COLUMNS": "200", **variables}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


def query(ledger: Path, text: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(ledger)) as connection:
        return connection.execute(text).fetchall()


def easy(number: int) -> dict[str, str]:
    """A sum, from 1 + 1 to 3 + 4."""
    one, two = number // 4 + 1, number % 4 + 1
    return {"id": f"p{number}", "question": f"What is {one} + {two}?", "answer": str(one + two)}


def write(folder: Path, teacher: dict[str, Any], student: dict[str, Any], prompt: str, **more: Any) -> Path:
    """A config of one round: 8 problems to train on, 4 to test on."""
    rows = [easy(number) for number in range(12)]
    data = folder / "data"
    data.mkdir()
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = {
        "name": "demo",
        "task": {"type": "jsonl", "path": str(data), "verifier": "number", "prompt": prompt},
        "teacher": teacher,
        "student": student,
        "rounds": 1,
        "pairs": {"rouge_l_max": 1.0},
        "train": {"learning_rate": 1e-3, "pairs_per_step": 4, "max_length": 512},
        "evaluate": {"decoding": {"temperature": 0, "max_new_tokens": 40}, "teacher": True},
        "runs": str(folder / "runs"),
        "ledger": str(folder / "ledger.sqlite"),
        **more,
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_language_model_behind_a_server_teaches_the_quickstarts_student(tmp_path: Path) -> None:
    with llama_server(slots=8, context=256, threads=1, api_key=KEY) as address:
        teacher = {
            "model": MODEL,
            "samples": 8,
            "decoding": {"temperature": 0.5, "max_new_tokens": 24, "stop": ["\n"]},
            "prefix": SHOWN,
            "sampler": {
                "type": "openai",
                "base_url": address,
                "api_key_env": "LLAMA_KEY",
                "concurrency": 2,
                "price": {"prompt": 1, "completion": 10},
                "budget": {"money": 0.1},
            },
        }
        student = {"model": str(STUDENT), "samples": 4, "decoding": {"temperature": 1.0, "max_new_tokens": 60}}
        path = write(tmp_path, teacher, student, "Question: {question}\nAnswer:")
        first = cli("run", path, LLAMA_KEY=KEY)
        assert first.returncode == 0, first.stderr
        ledger, run = tmp_path / "ledger.sqlite", tmp_path / "runs" / "demo"
        before = query(ledger, "SELECT * FROM attempts ORDER BY id"), query(ledger, "SELECT * FROM accounts")
        second = cli("run", path, LLAMA_KEY=KEY)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "..." not in second.stderr
    assert before == (query(ledger, "SELECT * FROM attempts ORDER BY id"), query(ledger, "SELECT * FROM accounts"))
    report = json.loads((run / "report" / "report.json").read_bytes())
    assert report["stages"]["round-1/pairs"]["metrics"]["pairs"] >= 1
    assert {row["policy"] for row in report["results"]} == {"student-0", "student-1", "teacher"}
    traces = list(read_jsonl(run / "teacher" / "traces.jsonl", Trace))
    assert len(traces) == 64 and {trace.error for trace in traces} == {""}
    assert len({trace.text for trace in traces}) > 16
    assert report["stages"]["teacher-verdicts"]["metrics"]["correct"] >= 4
    check_books(ledger)


def check_books(ledger: Path) -> None:
    """8 prompts of 8 samples, and 4 of one (the evaluation): 12 requests.

    llama.cpp's server counts the first of several texts alone: such a bill is not believed, and stays at its maximum.
    """
    attempts = query(ledger, "SELECT state, json_array_length(indices), prompt + completion, most_tokens FROM attempts")
    assert sorted(count for state, count, _, _ in attempts if state != "void") == [1] * 4 + [8] * 8
    doubtful = [count for state, count, _, _ in attempts if state == "unknown"]
    assert set(doubtful) == {8} and len(doubtful) >= 4
    tokens = sum(most if state == "unknown" else said for state, _, said, most in attempts)
    assert query(ledger, "SELECT account, tokens, calls FROM accounts") == [("demo", tokens, 12)]


def scripted(folder: Path) -> dict[str, Any]:
    """A student that is always wrong."""
    texts = {"default": ["The answer is 0.", "I say that the answer is 99."]}
    return {"model": str(save_tiny_checkpoint(folder / "tiny")), "samples": 2, "sampler": {"type": "scripted"} | texts}


def test_nothing_nasty_and_no_key_gets_through(tmp_path: Path) -> None:
    """The server needs the key, repeats it in its errors, refuses one problem, and writes what terminals obey."""
    refused = easy(3)["question"]
    with faulty_server(
        api_key=KEY, echo=True, nasty=True, refuse_text=refused, fault_rate=0.2, faults=["500"]
    ) as server:
        sampler = {"type": "openai", "base_url": server.base_url, "api_key_env": "MY_KEY"}
        teacher = {"model": "faulty", "samples": 3, "decoding": {"max_new_tokens": 90}, "sampler": sampler}
        path = write(tmp_path, teacher, scripted(tmp_path), "{question}")
        done = cli("run", path, MY_KEY=KEY)
        assert done.returncode == 0, done.stderr
        assert server.stats()["statuses"].keys() >= {"200", "400"}
    run = tmp_path / "runs" / "demo"
    lines = (run / "teacher" / "traces.jsonl").read_bytes().splitlines(keepends=True)
    traces = list(read_jsonl(run / "teacher" / "traces.jsonl", Trace))
    assert len(lines) == len(traces) == 24
    good = [trace for trace in traces if trace.finish_reason is FinishReason.STOP]
    assert len(good) == 21 and all(trace.text.startswith(NASTY.replace("\ud800", "?")) for trace in good)
    assert {trace.problem_id for trace in traces if trace not in good} == {"p3"}
    assert "of 24 samples failed, the first: HTTP 400: You sent" in done.stderr
    for said in (done.stdout, done.stderr, (run / "report" / "report.md").read_text()):
        assert all(letter.isprintable() or letter == "\n" for letter in said)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "report.json", "ledger.sqlite"} <= {path.name for path in kept}
    errors = [error for (error,) in query(tmp_path / "ledger.sqlite", "SELECT error FROM attempts WHERE error != ''")]
    assert errors and all("[key]" in error for error in errors)
    assert [str(path) for path, content in kept.items() if KEY[:12].encode() in content] == []
    assert KEY[:12] not in done.stdout + done.stderr


def test_a_wrong_key_is_one_message_without_the_key(tmp_path: Path) -> None:
    with faulty_server(api_key="another", echo=True) as server:
        sampler = {"type": "openai", "base_url": server.base_url, "api_key_env": "MY_KEY"}
        path = write(tmp_path, {"model": "faulty", "sampler": sampler}, scripted(tmp_path), "{question}")
        done = cli("run", path, "--until", "teacher", MY_KEY=KEY)
        missing = cli("run", path, "--until", "teacher")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: expected {server.base_url} to answer, found: HTTP 401: You sent ")
    assert "Incorrect API key" in last or "…" in last
    assert "[key]" in last and KEY[:12] not in done.stderr and "Traceback" not in done.stderr
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1] == (
        "error: sampler.api_key_env: expected the environment variable MY_KEY to be set, found that it is not; "
        "export MY_KEY=..."
    )


def test_every_command_that_may_pay_takes_a_ledger(tmp_path: Path) -> None:
    """What `eval` bought stands there, under an account of its own, and a second time nothing is bought."""
    ledger = tmp_path / "mine.sqlite"
    with faulty_server(right=1) as server:
        teacher = {"model": "faulty", "samples": 2, "sampler": {"type": "openai", "base_url": server.base_url}}
        path = write(tmp_path, teacher, scripted(tmp_path), "{question}")
        asked = f"{{type: jsonl, path: {tmp_path / 'data'}, verifier: number, prompt: '{{question}}'}}"
        sampler = f"{{type: openai, base_url: '{server.base_url}'}}"
        for _ in range(2):
            done = cli("eval", "faulty", "--task", asked, "--sampler", sampler, "--ledger", ledger)
            assert done.returncode == 0 and json.loads(done.stdout)["correct"] == 4, done.stderr
            assert server.stats()["requests"] == 4
        assert query(ledger, "SELECT account, calls FROM accounts") == [("eval", 4)]
        mine = tmp_path / "mine.jsonl"
        mine.write_text(json.dumps({"id": "p0", "text": "mine"}) + "\n")
        assert "imported 1 texts" in cli("import", path, mine, "--ledger", ledger).stdout
        run = tmp_path / "runs" / "demo"
        done = cli("export", run, "--form", "batch", "--out", tmp_path / "out.jsonl", "--ledger", ledger)
        assert "for 15 missing teacher texts" in done.stdout, done.stderr
        assert "--ledger" in cli("quickstart", "--help").stdout
