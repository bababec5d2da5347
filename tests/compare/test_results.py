"""Contrasts of made-up answers whose verdict can be worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orpo_distill.compare.cells import Cell, Design, Wanted, design_of
from orpo_distill.compare.results import Result, Search, _equals, evaluation_of, write_comparison
from orpo_distill.compare.running import _equal_tokens
from orpo_distill.errors import DataError
from orpo_distill.records import Answer, Outcome, Trace, write_jsonl
from orpo_distill.runs import Asked, Manifest, RunFolder
from orpo_distill.statistics import wilson
from tests.compare.test_methods import config

N = 100


def designed(folder: Path, **asked: object) -> Design:
    return design_of([config(runs=str(folder), rounds=1)], Wanted(**{"methods": "orpo-off,orpo-mixed", **asked}))  # type: ignore[arg-type]


def finish(cell: Cell, right: set[int], n: int = N) -> Result:
    """A cell's run folder as a finished run leaves it: problem i is right if it is in `right`."""
    folder = RunFolder(cell.config.run_dir)
    evaluation = evaluation_of(cell)
    evaluation.mkdir(parents=True)
    outcomes = [Outcome.CORRECT if i in right else Outcome.WRONG for i in range(n)]
    write_jsonl(evaluation / "answers.jsonl", (Answer(f"p{i}", "test", "1", "1", o) for i, o in enumerate(outcomes)))
    low, high = wilson(len(right), n)
    row = {"split": "test", "n": n, "correct": len(right), "accuracy": len(right) / n, "low": low, "high": high}
    (evaluation / "results.json").write_text(json.dumps([row | {"parsed": 1.0, "truncated": 0.0, "majority": 0.5}]))
    for stage in ("teacher", "student-0", "round-1/train"):
        counted(cell, stage)
    times = {"teacher": 2.0, "round-1/train": 3.0, "round-1/evaluate": 50.0}
    (folder.path / "times.json").write_text(json.dumps(times))
    return Result(cell)


def counted(cell: Cell, stage: str, **changes: float) -> None:
    """A finished stage of a cell's run, by what it counted."""
    folder, asked = RunFolder(cell.config.run_dir), Asked("m:f", {}, {})
    metrics = {"steps": 3, "tokens": 70, "completion_tokens": 11}
    folder.write_asked(stage, asked)
    folder.write_manifest(stage, Manifest(asked, "", metrics | changes))


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


def test_runs_that_are_the_same_under_both_budgets_are_one_test(tmp_path: Path) -> None:
    """mixed - off has the same answers under both, off - zero has not: a family of three tests, not of four.

    Who is better solves 10 problems alone, and 5 in off - zero with equal tokens: p = 2 / 2^10 and 2 / 2^5.
    """
    design = designed(tmp_path, methods="orpo-zero,orpo-off,orpo-mixed", seeds=1)
    results = []
    for budget, zeros in (("epochs", 40), ("tokens", 45)):
        for method, right in (("orpo-zero", zeros), ("orpo-off", 50), ("orpo-mixed", 60)):
            cell = design.trained(design.blocks[0], method, 0, 1e-3, budget)
            results.append(finish(cell, set(range(right))))
            if budget == "tokens" and method != "orpo-zero":
                shutil.rmtree(own := evaluation_of(cell))
                own.symlink_to(evaluation_of(design.trained(design.blocks[0], method, 0, 1e-3, "epochs")))
    rows = write_comparison(design, [], results, {}, "")["contrasts"]
    found = {(row["a"], row["budget"]): row["p_holm"] for row in rows if row["family"] == "primary"}
    assert found == {
        ("orpo-mixed", "epochs"): pytest.approx(3 * 2 / 2**10),
        ("orpo-mixed", "tokens"): pytest.approx(3 * 2 / 2**10),
        ("orpo-off", "epochs"): pytest.approx(3 * 2 / 2**10),
        ("orpo-off", "tokens"): pytest.approx(2 / 2**5),
    }


def test_five_seeds_are_crossed_with_the_problems(tmp_path: Path) -> None:
    right = [("orpo-off", seed, set(range(seed, 50 + seed))) for seed in range(5)]
    right += [("orpo-mixed", seed, set(range(seed, 70 + seed))) for seed in range(5)]
    (row,) = content(designed(tmp_path, seeds=5), *right)["contrasts"]
    assert not row["weak"]
    assert "5 seeds x 100 problems" in row["interval"]
    assert row["low"] < 0.2 < row["high"]
    assert row["resampled_low"] < 0.2 < row["resampled_high"]
    assert row["p"] <= 0.001


def test_cells_say_what_they_cost(tmp_path: Path) -> None:
    (cell,) = content(designed(tmp_path, seeds=1), ("orpo-off", 0, {1}))["cells"]
    expected = {"n": N, "correct": 1, "steps": 3, "trained_tokens": 70, "sampled_tokens": 22, "seconds": 5.0}
    assert expected.items() <= cell.items()
    assert cell["scored_tokens"] == 0
    assert cell["right"] == "4" + 24 * "0"  # problems 0 to 99, of which only 1
    assert (tmp_path / "demo-compare" / cell["run"]).is_dir()


def test_warm_up_and_scores_are_counted(tmp_path: Path) -> None:
    design = designed(tmp_path, methods="dpo", seeds=1)
    cell = design.trained(design.blocks[0], "dpo", 0, 1e-3, "epochs")
    result = finish(cell, {1})
    counted(cell, "warmup/train", steps=2, tokens=30)
    counted(cell, "round-1/reference-scores", tokens=40)
    row = result.row(design.folder)
    assert (row["steps"], row["trained_tokens"], row["scored_tokens"]) == (5, 100, 40)


@pytest.mark.parametrize(("second", "is_close"), [(75, True), (73, True), (71, False)])
def test_a_rate_among_equals_is_spoken_of(tmp_path: Path, second: int, is_close: bool) -> None:
    """77 of 100 right has a standard error of 4.2."""
    design = designed(tmp_path, methods="orpo-off", seeds=1)
    tried = [Search(design.blocks[0], "orpo-off", rate, 0, 100, right) for rate, right in ((1e-3, second), (2e-3, 50))]
    best = Search(design.blocks[0], "orpo-off", 5e-4, 0, 100, 77, chosen=True)
    notes = list(_equals(design, [*tried, best]))
    assert len(notes) == is_close and all("for orpo-off: other seeds" in note for note in notes)


def test_scores_of_whole_texts_are_a_warning(tmp_path: Path) -> None:
    design = designed(tmp_path, methods="dpo", seeds=1)
    cell = design.trained(design.blocks[0], "dpo", 0, 1e-3, "epochs")
    finish(cell, {1})
    counted(cell, "warmup/train")
    for same, warnings in ((True, 0), (False, 1)):
        counted(cell, "round-1/reference-scores", same_tokens=same)
        found = Result(cell).row(design.folder)["warnings"]
        assert len(found) == warnings and all("round-1/reference-scores" in one for one in found)


@pytest.mark.parametrize(("warmup", "steps"), [(400, 8), (0, None), (5000, 1)])
def test_equal_tokens_leave_fewer_steps_after_a_warm_up(tmp_path: Path, warmup: int, steps: int | None) -> None:
    """The reference trains on 2 x 1,000 tokens in 2 x 10 steps. After 400 of warm-up 1,600 are left: 2 x 8 steps."""
    design = design_of([config(runs=str(tmp_path), rounds=2)], Wanted("orpo-off,dpo"))
    done = {name: design.trained(design.blocks[0], name, 0, 1e-3, "epochs") for name in ("orpo-off", "dpo")}
    for cell in done.values():
        for number in (1, 2):
            counted(cell, f"round-{number}/train", steps=10, tokens=1000, pairs=320)
    counted(done["dpo"], "warmup/train", tokens=warmup)
    off, dpo = _equal_tokens(design, done, 0)
    assert off.config.train.steps_per_round is None
    assert dpo.config.train.steps_per_round == steps


def test_a_sweep_of_k_counts_the_texts_that_are_used(tmp_path: Path) -> None:
    """Three traces of 4 tokens for each of two problems, teacher and student; K = 2."""
    design = designed(tmp_path, methods="", sweeps=("K=2,4",), seeds=1)
    cell = design.trained(design.blocks[0], "pairs.traces=2", 0, 1e-3, "epochs")
    result = finish(cell, {1})
    for policy in ("teacher", "student-0"):
        traces = [Trace(f"{p}{i}", p, policy, i, "x", completion_tokens=4) for p in "ab" for i in range(3)]
        write_jsonl(cell.config.run_dir / policy / "traces.jsonl", traces)
    assert result.row(design.folder)["sampled_tokens"] == 2 * 2 * 2 * 4


def test_equal_tokens_know_that_the_steps_of_an_epoch_are_not_full(tmp_path: Path) -> None:
    """33 rows of 10 tokens are an epoch of 2 steps; 3,300 tokens are 330 rows: 10 full steps of 32, not 20.

    20 rows of 32 tokens: 3 steps of 1,024. 29 rows of 100 tokens: an epoch's 2,900 are nearer than 2 steps of 3,200.
    """
    design = designed(tmp_path, methods="orpo-off,single-cot", seeds=1)
    done = {name: design.trained(design.blocks[0], name, 0, 1e-3, "epochs") for name in ("orpo-off", "single-cot")}
    counted(done["orpo-off"], "round-1/train", steps=20, tokens=3300, pairs=640)
    for steps, tokens, rows, expected in ((2, 330, 33, 10), (1, 640, 20, 3), (1, 2900, 29, None)):
        counted(done["single-cot"], "round-1/train", steps=steps, tokens=tokens, pairs=rows)
        found = {cell.method: cell.config.train.steps_per_round for cell in _equal_tokens(design, done, 0)}
        assert found == {"orpo-off": None, "single-cot": expected}


@pytest.mark.parametrize(("alpha", "stage"), [(0.3, "extrapolate/0.3/evaluate"), (0, "round-1/evaluate")])
def test_an_extrapolated_cell_is_of_the_student_that_was_chosen(tmp_path: Path, alpha: float, stage: str) -> None:
    design = designed(tmp_path, methods="orpo-expo", seeds=1)
    cell = design.trained(design.blocks[0], "orpo-expo", 0, 1e-3, "epochs")
    counted(cell, "extrapolate/chosen", alpha=alpha)
    assert finish(cell, {1, 2}).row(design.folder)["correct"] == 2
    assert (cell.config.run_dir / stage / "answers.jsonl").exists()
    assert design.searching(design.blocks[0], "orpo-expo", 1e-3).until == "extrapolate/chosen"


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


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_setting_without_effect_has_no_trend(tmp_path: Path, seeds: int) -> None:
    """All values give the same answers. The weights of 0.7, 0.8 and 0.9 as floats sum to -5e-15, on every problem."""
    values = (0.7, 0.8, 0.9)
    design = designed(tmp_path, methods="", sweeps=("pairs.rouge_l_max=0.7,0.8,0.9",), seeds=seeds)
    right = [(f"pairs.rouge_l_max={value}", seed, set(range(50 + seed))) for seed in range(seeds) for value in values]
    (trend,) = content(design, *right)["trends"]
    assert trend["slope"] == 0
    assert trend["p"] in (None, 1.0)


def test_a_trend_over_other_problems_is_refused(tmp_path: Path) -> None:
    design = designed(tmp_path, methods="", sweeps=("pairs.phi=0,1",), seeds=1)
    block = design.blocks[0]
    cells = [design.trained(block, method, 0, 1e-3, "epochs") for method in design.swept()]
    results = [finish(cell, {1}, n) for cell, n in zip(cells, (6, 5), strict=True)]
    with pytest.raises(DataError, match="same test problems"):
        write_comparison(design, [], results, {}, "")
