"""Contrasts of made-up answers whose verdict can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_distill.compare.cells import Asked, Cell, Design, design_of
from orpo_distill.compare.results import Result, write_comparison
from orpo_distill.errors import DataError
from orpo_distill.records import Answer, Outcome, write_jsonl
from orpo_distill.runs import Asked as AskedOf
from orpo_distill.runs import Manifest, RunFolder
from orpo_distill.statistics import wilson
from tests.compare.test_methods import config

N = 100


def designed(folder: Path, **asked: object) -> Design:
    return design_of([config(runs=str(folder), rounds=1)], Asked(**{"methods": "orpo-off,orpo-mixed", **asked}))  # type: ignore[arg-type]


def finish(cell: Cell, right: set[int], n: int = N) -> Result:
    """A cell's run folder as a finished run leaves it: problem i is right if it is in `right`."""
    folder = RunFolder(cell.config.run_dir)
    evaluation = folder.path / cell.evaluation
    evaluation.mkdir(parents=True)
    outcomes = [Outcome.CORRECT if i in right else Outcome.WRONG for i in range(n)]
    write_jsonl(evaluation / "answers.jsonl", (Answer(f"p{i}", "test", "1", "1", o) for i, o in enumerate(outcomes)))
    low, high = wilson(len(right), n)
    row = {"split": "test", "n": n, "correct": len(right), "accuracy": len(right) / n, "low": low, "high": high}
    (evaluation / "results.json").write_text(json.dumps([row | {"parsed": 1.0, "truncated": 0.0, "majority": 0.5}]))
    metrics = {"steps": 3, "tokens": 70, "completion_tokens": 11}
    for stage in ("teacher", "student-0", "round-1/train"):
        folder.write_asked(stage, AskedOf("m:f", {}, {}))
        folder.write_manifest(stage, Manifest(AskedOf("m:f", {}, {}), "", metrics))
    times = {"teacher": 2.0, "round-1/train": 3.0, "round-1/evaluate": 50.0}
    (folder.path / "times.json").write_text(json.dumps(times))
    return Result(cell)


def content(design: Design, *right: tuple[str, int, set[int]]) -> dict:
    block = design.blocks[0]
    results = [finish(design.trained(block, method, seed, 1e-3, "epochs"), those) for method, seed, those in right]
    write_comparison(design, [], results, {}, "the command")
    return json.loads((design.folder / "compare.json").read_bytes())


def test_one_seed_is_mcnemar(tmp_path: Path) -> None:
    """mixed alone solves 10 problems, off alone 2: p = 2 (1 + 12 + 66) / 2^12."""
    found = content(designed(tmp_path, seeds=1), ("orpo-off", 0, set(range(52))), ("orpo-mixed", 0, set(range(2, 62))))
    (row,) = found["contrasts"]
    assert (row["a"], row["b"], row["family"], row["n"]) == ("orpo-mixed", "orpo-off", "primary", N)
    assert row["difference"] == pytest.approx(0.08)
    assert row["p"] == row["p_holm"] == pytest.approx(2 * 79 / 4096)
    assert row["weak"]
    assert row["seeds"][0]["only_a"] == 10
    assert 0.09 < row["smallest"] < 0.12  # 12 of 100 discordant: about 2.8 sqrt(0.12 / 100), less for the last term


def test_three_seeds_are_a_weak_t_interval(tmp_path: Path) -> None:
    """Differences 2, 4 and 6 points: mean 4, standard error 2 / sqrt(3), t(2) = 4.303: 4 +- 4.97."""
    right = [("orpo-off", seed, set(range(50))) for seed in range(3)]
    right += [("orpo-mixed", seed, set(range(52 + 2 * seed))) for seed in range(3)]
    (row,) = content(designed(tmp_path), *right)["contrasts"]
    assert row["weak"]
    assert row["difference"] == pytest.approx(0.04)
    assert (row["low"], row["high"]) == pytest.approx((-0.0097, 0.0897), abs=1e-4)
    assert [each["difference"] for each in row["seeds"]] == pytest.approx([0.02, 0.04, 0.06])


def test_five_seeds_are_resampled_with_the_problems(tmp_path: Path) -> None:
    right = [("orpo-off", seed, set(range(seed, 50 + seed))) for seed in range(5)]
    right += [("orpo-mixed", seed, set(range(seed, 70 + seed))) for seed in range(5)]
    (row,) = content(designed(tmp_path, seeds=5), *right)["contrasts"]
    assert not row["weak"]
    assert "5 seeds x 100 problems" in row["interval"]
    assert row["low"] < 0.2 < row["high"]
    assert row["p"] <= 0.001


def test_cells_say_what_they_cost(tmp_path: Path) -> None:
    (cell,) = content(designed(tmp_path, seeds=1), ("orpo-off", 0, {1}))["cells"]
    expected = {"n": N, "correct": 1, "steps": 3, "trained_tokens": 70, "sampled_tokens": 22, "seconds": 5.0}
    assert expected.items() <= cell.items()
    assert (tmp_path / "demo-compare" / cell["run"]).is_dir()


def test_a_missing_partner_is_no_contrast(tmp_path: Path) -> None:
    found = content(designed(tmp_path), ("orpo-off", 0, {1}), ("orpo-mixed", 1, {1}))
    assert found["contrasts"] == []


def test_other_problems_are_refused(tmp_path: Path) -> None:
    design = designed(tmp_path, seeds=1)
    block = design.blocks[0]
    results = [
        finish(design.trained(block, method, 0, 1e-3, "epochs"), {1}, n)
        for method, n in (("orpo-off", 5), ("orpo-mixed", 6))
    ]
    with pytest.raises(DataError, match="same test problems"):
        write_comparison(design, [], results, {}, "")


def test_a_sweep_of_numbers_has_one_slope(tmp_path: Path) -> None:
    """Accuracies 0.5, 0.6, 0.7 at phi 0, 0.5, 1: 0.2 a unit, in each of two seeds; no spread, so no p-value."""
    design = designed(tmp_path, methods="", sweeps=("pairs.phi=0,0.5,1",), seeds=2)
    right = [
        (f"pairs.phi={phi}", seed, set(range(50 + 10 * place)))
        for seed in range(2)
        for place, phi in enumerate((0, 0.5, 1))
    ]
    (trend,) = content(design, *right)["trends"]
    assert trend["accuracies"] == pytest.approx([0.5, 0.6, 0.7])
    assert trend["slope"] == pytest.approx(0.2)
    assert trend["p"] is None
