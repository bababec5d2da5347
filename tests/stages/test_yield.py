"""What the progress line says of the yield, on a real terminal; and where it says nothing."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from orpo_distill.records import Outcome, Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from tests.samplers import paid
from tests.servers import faulty_server
from tests.test_end_to_end import COMMAND, experiment

ROOT = Path(__file__).parents[2]


def on_a_terminal(*arguments: object) -> str:
    """Run the command with stderr on a terminal of 200 columns; what it showed, without control sequences."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    with subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b"".join(_read(ours))
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0, text
    return text


def _read(terminal: int) -> list[bytes]:
    found = []
    try:
        while part := os.read(terminal, 65536):
            found.append(part)
    except OSError:  # the other side is closed
        pass
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """What a run shows up to its first pairs, and the teacher's traces."""
    folder = tmp_path_factory.mktemp("run")
    text = on_a_terminal("run", experiment(folder), "--until", "round-1/pairs")
    return text, (folder / "runs/demo/teacher/traces.jsonl").read_bytes()


def test_the_yield_is_shown_while_teacher_and_student_are_sampled(shown: tuple[str, bytes]) -> None:
    """The teacher is always right; the student is right, wrong and silent in turn."""
    teacher, student = (
        re.findall(rf"sample {name} .*yield (.*?usable)", shown[0])[-1] for name in ("teacher", "student-0")
    )
    assert teacher == "100% (24 of 24 usable"
    assert student == "33% (12 of 36 usable"


def test_it_stands_beside_what_a_purchase_has_come_to(tmp_path: Path) -> None:
    with faulty_server() as server:
        config = paid.experiment(tmp_path, server, problems=10, samples=2)
        text = on_a_terminal("run", config, "--until", "teacher")
    assert re.search(r"20/20 .*yield \d+% \(\d+ of 20 usable\), \d+ calls \(\d+/min\), \d+ tokens, \S+ spent", text)


class Telltale(Verifier):
    """Leaves a file where it is called."""

    isolated: ClassVar[bool] = True
    path: Path

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        self.path.touch()
        return Verdict(trace.id, Outcome.WRONG, "1", "")


def test_a_verifier_that_may_hang_is_left_to_its_stage(tmp_path: Path, shown: tuple[str, bytes]) -> None:
    """`math` or one of a user's own. The traces are those beside any other verifier."""
    assert Verifier.model_validate("math").isolated
    path, called = experiment(tmp_path), tmp_path / "called"
    config = yaml.safe_load(path.read_text())
    config["task"]["verifier"] = {"type": f"{__name__}:Telltale", "path": str(called)}
    path.write_text(yaml.safe_dump(config))
    text = on_a_terminal("run", path, "--until", "teacher")
    assert "24/24" in text and "yield" not in text
    assert not called.exists()
    assert (tmp_path / "runs/demo/teacher/traces.jsonl").read_bytes() == shown[1]
