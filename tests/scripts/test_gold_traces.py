"""Worked solutions of a data set become traces that the sampler `recorded` plays back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from orpo_distill.records import Message
from orpo_distill.samplers import Decoding, Request
from orpo_distill.samplers.recorded import Recorded

SCRIPT = Path(__file__).parents[2] / "scripts" / "gold_traces.py"


def make(folder: Path, *rows: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run the script on these rows; it writes folder/out/gold.jsonl."""
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPT), str(source), str(folder / "out" / "gold.jsonl")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_rationale_is_played_back_with_its_answer(tmp_path: Path) -> None:
    rows = [{"id": "a", "answer": "72", "rationale": "48/2 = <<48/2=24>>24 in May."}, {"id": "b", "answer": "1"}]
    assert make(tmp_path, *rows).returncode == 0
    sampler = Recorded(path=tmp_path / "out" / "gold.jsonl", final_line="append")
    with sampler.open("people") as generate:
        requests = [Request(name, 0, (Message("user", "?"),), seed=0) for name in "ab"]
        found = [completion.text for completion in generate(requests, Decoding())]
    assert found == ["48/2 = 24 in May.\nThe answer is 72.", ""]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for row, words in (({"id": "a", "answer": "1"}, "rows with a rationale"), ({"rationale": "x"}, "id and answer")):
        done = make(tmp_path, row)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
