"""The coverage of intervals, on a few tables: the benchmark must not rot."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"


def test_each_method_is_measured() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--tables", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["seeds"] for line in lines] == [0.0, 0.005, 0.01, 0.02, 0.05]
    widths = [line["crossed"]["half_width"] for line in lines]
    assert widths == sorted(widths)
    assert all(0.7 <= line["crossed"]["coverage"] <= 1 for line in lines)
