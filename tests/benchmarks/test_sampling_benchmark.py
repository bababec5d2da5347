"""The sampling benchmark, on a tiny model: it must not rot."""

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import save_tiny_checkpoint

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sampling.py"


def test_the_benchmark_prints_its_line(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    options = ["--quick", "--model", str(model), "--no-vllm", "--prompts", "2", "--max-new-tokens", "6"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["ratio_generate"] > 0 and line["vllm_tokens_per_second"] is None and line["ratio_vllm"] is None
    assert 0 < line["ours_mean_tokens"] <= 6 and 0 < line["generate_mean_tokens"] <= 6
