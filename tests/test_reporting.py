"""`orpo-distill report` on real folders: where the page goes, and every mistake as one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.page.folders import FolderOfARun, whole_run
from tests.page.reading import Seen
from tests.page.test_comparison import CONTENT

COMMAND = [sys.executable, "-c", "from orpo_distill.cli import main; main()", "report"]


def report(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)


def test_one_run_several_and_a_comparison(tmp_path: Path) -> None:
    first, second = (whole_run(tmp_path / name).path for name in ("first", "second"))
    done = report("first", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "first/report/report.html"), done.stderr
    assert "student-2 answers 66.7%" in (first / "report" / "report.html").read_text()
    done = report(first, second, "--out", "both/page.html", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "both/page.html"), done.stderr
    assert "2 runs side by side" in (tmp_path / "both" / "page.html").read_text()
    folder = tmp_path / "compared"
    folder.mkdir()
    (folder / "compare.json").write_text(json.dumps(CONTENT))
    done = report(folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 primary contrasts differ" in (folder / "report.html").read_text()


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo").path
    for name in ("one.html", "two.html"):
        assert report(run, "--out", name, cwd=tmp_path).returncode == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_run_that_has_begun_says_what_is_to_come(tmp_path: Path) -> None:
    data = {"type": "jsonl", "path": str(tmp_path / "data"), "verifier": "number", "prompt": "{question}"}
    models = {
        role: {"model": "m", "sampler": {"type": "scripted", "path": "texts.jsonl"}} for role in ("teacher", "student")
    }
    run = FolderOfARun(tmp_path / "demo", task=data, runs=str(tmp_path), **models)
    done = report(run.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = Seen((run.path / "report" / "report.html").read_text()).text
    assert "This run is not finished. Yet to come: teacher, teacher-verdicts, student-0," in text
    assert "round-2/evaluate" in text


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo").path
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "compare.json").write_text("{")
    for arguments, code, said in [
        (["nowhere"], 1, "expected a run folder"),
        (["compared"], 1, "compare.json"),
        (["compared", "demo"], 2, "one comparison alone"),
        (["demo", "--out", "demo/config.yaml/x.html"], 1, "config.yaml"),
    ]:
        done = report(*arguments, cwd=tmp_path)
        assert done.returncode == code
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    (run / "student-0" / "traces.jsonl").write_text("spoilt\n")
    done = report("demo", cwd=tmp_path)
    assert done.returncode == 1
    assert "student-0/traces.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr
