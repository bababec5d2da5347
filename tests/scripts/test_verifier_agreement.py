"""The verifiers agree with recorded answers of a real model (shared/data); the script that measures it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "verifier_agreement.py"
DATA = Path(__file__).parents[2] / "../shared/data"


def table(data: Path) -> dict[tuple[str, str], tuple[int, float, float]]:
    """(data set, kind of label) -> traces, percent that agree, percent that were left undecided."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(data)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:] if "/s" not in line]
    return {(row[0], row[1]): (int(row[2]), float(row[3].rstrip("%")), float(row[5].rstrip("%"))) for row in rows}


def test_counts_on_a_small_folder(tmp_path: Path) -> None:
    """Four traces labelled B: one states B, one states A, one nothing; one without a label states nothing."""
    texts = ["The answer is (B).", "The answer is (A).", "It rains.", "It rains."]
    traces = [{"text": text, "answer": "B", "via": "stated"} for text in texts]
    traces[3] = {"text": texts[3], "answer": None, "via": None}
    for path, row in (
        (tmp_path / "toy" / "train.jsonl.gz", {"id": "1", "question": "?", "choices": ["a", "b"], "answer": "B"}),
        (tmp_path / "teacher_traces" / "toy" / "m.jsonl.gz", {"id": "1", "traces": traces}),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert table(tmp_path) == {("toy", "None"): (1, 100.0, 0.0), ("toy", "stated"): (3, 50.0, 33.3)}


@pytest.mark.slow
def test_agreement_with_recorded_answers() -> None:
    """At least 99.5% where both read an answer, and few stated answers are left undecided."""
    found = {key: value for key, value in table(DATA).items() if key[1] != "None"}
    assert len(found) == 5
    assert all(agree >= 99.5 for _, agree, _ in found.values()), found
    assert all(undecided <= 2.0 for (_, via), (_, _, undecided) in found.items() if via == "stated"), found
