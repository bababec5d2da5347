"""The scale benchmark, on a few problems: it must not rot."""

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import save_tiny_checkpoint

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def lines(tokenizer: Path, part: str) -> list[dict[str, float | str]]:
    options = ["--problems", "31", "--tokenizer", str(tokenizer), "--part", part]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_pairs_and_samples(tmp_path: Path) -> None:
    pairs, samples = lines(save_tiny_checkpoint(tmp_path / "model"), "large")
    assert (pairs["part"], pairs["traces"]) == ("pair", 2 * 8 * 31)
    assert 31 < pairs["pairs"] <= 8 * 31
    assert (samples["part"], samples["traces"]) == ("sample", 8 * 31)
    assert min(pairs["peak_bytes"], samples["peak_bytes"]) > 10**7


def test_verifiers(tmp_path: Path) -> None:
    found = lines(tmp_path, "verify")
    assert [line["verifier"] for line in found] == ["number", "choice", "yes_no"]
    for line in found:
        assert line["traces"] == 8 * 6
        assert line["verifier_traces_per_second"] > 0 and line["stage_traces_per_second"] > 0
