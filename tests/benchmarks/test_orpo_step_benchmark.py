"""`benchmarks/orpo_step.py` on a tiny model: the whole command, and that both sides train on the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.step_side import Result, Spec, ours, trl
from benchmarks.workloads import WORKLOADS, problems
from orpo_distill.models import load_tokenizer
from tests.checkpoints import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_the_command_prints_what_it_promises(model: Path) -> None:
    command = [sys.executable, "benchmarks/orpo_step.py", "--quick", "--workload", "gsm8k"]
    command += ["--model", str(model), "--trl-python", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["workload"] == "gsm8k"
    assert line["speed_ratio"] == pytest.approx(line["ours_pairs_per_second"] / line["trl_pairs_per_second"], rel=0.05)
    assert line["floor_ratio"] > 1


def loss(side: str, model: Path, steps: list[list[dict[str, list[int]]]], batch: int, out: Path) -> float:
    spec = Spec(side, str(model), steps, batch, "float32")
    out.mkdir()
    result: Result = {"ours": ours, "trl": trl}[side](
        spec, AutoModelForCausalLM.from_pretrained(model), load_tokenizer(str(model)), str(out)
    )
    assert result.loss is not None
    return result.loss


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_both_sides_see_the_same_rows(model: Path, tmp_path: Path) -> None:
    step = problems("all_pairs", load_tokenizer(str(model)))[0]
    expected = loss("trl", model, [step], 8, tmp_path / "trl")
    assert loss("ours", model, [step], 8192, tmp_path / "ours") == pytest.approx(expected, abs=1e-5)
    other = [{**row, "rejected": row["rejected"][1:]} for row in step]
    assert loss("ours", model, [other], 8192, tmp_path / "other") != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_problem_is_sixteen_distinct_traces_of_one_prompt(workload: str, model: Path) -> None:
    found = problems(workload, load_tokenizer(str(model)))
    assert len(found) == 3
    for rows in found:
        assert len({tuple(row["prompt"]) for row in rows}) == 1
        for side in ("chosen", "rejected"):
            assert len({tuple(row[side]) for row in rows[:8]}) == 8
        pairs = {(tuple(row["chosen"]), tuple(row["rejected"])) for row in rows}
        assert len(pairs) == len(rows) == (64 if workload == "all_pairs" else 8)
