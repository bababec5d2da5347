"""What a comparison shows: `compare.json`, every cell and every contrast.

Differences are paired: the same problems, and for every seed both methods. How they are judged is said in
`statistics.estimate`; a single seed is judged by McNemar's test. Fields are documented in docs/compare.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib import metadata
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from orpo_distill.additions import CHOSEN, folder_of
from orpo_distill.compare.cells import Block, Cell, Design, stages_of
from orpo_distill.compare.methods import EXPLORATORY, METHODS, PRIMARY, Sweep
from orpo_distill.errors import DataError
from orpo_distill.page.results import whole_texts
from orpo_distill.records import Answer, Outcome, Trace, read_jsonl, write_text
from orpo_distill.runs import Metrics, read_manifest
from orpo_distill.statistics import (
    ENOUGH_SEEDS,
    Estimate,
    compare_paired,
    estimate,
    holm,
    resampled,
    slope_weights,
    smallest_difference,
)

ALPHA = 0.05
Row = dict[str, Any]


@dataclass
class Search:
    """What one learning rate of one method reached on validation."""

    block: Block
    method: str
    rate: float
    seed: int | None = None
    n: int | None = None
    correct: int | None = None
    chosen: bool = False

    def row(self) -> Row:
        """As it stands in `compare.json`."""
        return {
            **_place(self.block),
            "method": self.method,
            "seed": self.seed,
            "learning_rate": self.rate,
            "n": self.n,
            "correct": self.correct,
            "chosen": self.chosen,
        }


@dataclass
class Result:
    """A finished cell, read from its run folder."""

    cell: Cell

    @property
    def _folder(self) -> Path:
        return self.cell.config.run_dir

    @cached_property
    def evaluation(self) -> Path:
        """The folder with its answers, links followed: the same for cells that are one training."""
        return evaluation_of(self.cell).resolve()

    @cached_property
    def right(self) -> dict[str, bool]:
        """Problem -> whether its answer on test was right."""
        answers = read_jsonl(self.evaluation / "answers.jsonl", Answer)
        return {answer.problem_id: answer.outcome == Outcome.CORRECT for answer in answers if answer.split == "test"}

    def row(self, root: Path) -> Row:
        """As it stands in `compare.json`."""
        cell = self.cell
        measured = json.loads((self.evaluation / "results.json").read_bytes())
        test = next(row for row in measured if row["split"] == "test")
        keys = ("n", "correct", "accuracy", "low", "high", "parsed", "truncated", "majority")
        return {
            **_place(cell.block),
            "method": cell.method,
            "seed": cell.seed,
            "budget": cell.budget,
            **{key: test[key] for key in keys},
            "right": _bits(self.right.values()),
            "learning_rate": cell.config.train.learning_rate if cell.trains else None,
            **self._cost(),
            "warnings": self._warnings(),
            "run": str(self._folder.relative_to(root)),
        }

    @cached_property
    def _scores(self) -> dict[str, Metrics]:
        """What each stage that scores given texts counted."""
        names = [stage.name for stage in stages_of(self.cell) if stage.work.endswith(":score")]
        return {name: read_manifest(self._folder / name).metrics for name in names}

    def _warnings(self) -> list[str]:
        """What the run's mechanisms warn of, by name, and which scores are of whole texts only."""
        if not self.cell.trains:
            return []
        said = whole_texts(self._scores)
        path = self._folder / "mechanisms" / "mechanisms.json"
        found = json.loads(path.read_bytes())["warnings"] if path.exists() else []
        return [*([said] if said else []), *(str(warning) for warning in found)]

    def _cost(self) -> Row:
        """Steps, tokens and seconds of the run, as if nothing had been shared; what counts as what: docs/compare.md."""
        if not self.cell.trains:
            return {"steps": 0, "trained_tokens": 0, "sampled_tokens": 0, "scored_tokens": 0, "seconds": 0.0}
        times = json.loads((self._folder / "times.json").read_bytes())
        trained = training(self.cell).values()
        scored = sum(counted["tokens"] for counted in self._scores.values())
        sampled, seconds = 0, 0.0
        for stage in stages_of(self.cell):
            kind = stage.work.rpartition(":")[2]
            if kind == "sample":
                sampled += _sampled(self._folder / stage.name, self.cell.config.pairs.traces)
            if kind not in ("problems", "evaluate", "report", "mechanisms"):
                seconds += times.get(stage.name, 0.0)
        return {
            "steps": sum(each["steps"] for each in trained),
            "trained_tokens": sum(each["tokens"] for each in trained),
            "sampled_tokens": sampled + sum(each.get("written_tokens", 0) for each in trained),
            "scored_tokens": scored + sum(each.get("teacher_tokens", 0) for each in trained),
            "seconds": round(seconds, 1),
        }


def _bits(values: Iterable[bool]) -> str:
    """A bit a problem, in the order of the problems, as hexadecimal digits; the last digit is filled up with zeros."""
    bits = "".join("01"[value] for value in values)
    return "".join(f"{int(bits[start : start + 4].ljust(4, '0'), 2):x}" for start in range(0, len(bits), 4))


def evaluation_of(cell: Cell) -> Path:
    """The folder of the evaluation that a finished cell is about; with `extrapolate` that of the alpha it chose."""
    folder, config = cell.config.run_dir, cell.config
    if not cell.trains:
        return folder / "baseline"
    alpha = read_manifest(folder / CHOSEN).metrics["alpha"] if config.extrapolate else 0.0
    return folder / folder_of(config, alpha) / "evaluate"


def training(cell: Cell) -> dict[str, Metrics]:
    """What each train stage of a finished cell counted: the warm-up's, if there is one, and every round's."""
    stages = [stage.name for stage in stages_of(cell) if stage.work.endswith(":train")]
    return {name: read_manifest(cell.config.run_dir / name).metrics for name in stages}


def _sampled(stage: Path, most: int | None) -> int:
    """Tokens of a stage's texts; with `most` of the first so many a problem, which are all that pairs are made of."""
    if most is None:
        return int(read_manifest(stage).metrics["completion_tokens"])
    traces = read_jsonl(stage / "traces.jsonl", Trace)
    return sum(trace.completion_tokens or 0 for trace in traces if trace.sample_index < most)


def write_comparison(
    design: Design, searches: Sequence[Search], results: Sequence[Result], impossible: Mapping[str, str], command: str
) -> Row:
    """Write `compare.json` into the comparison's folder. Returns its content."""
    content = {
        "name": design.folder.name,
        "version": metadata.version("orpo-distill"),
        "command": command,
        "notes": [*_notes(design, impossible), *_edges(design, searches), *_equals(design, searches)],
        "methods": {name: _about(design, name) for name in [*design.methods, *design.swept()]},
        "search": [search.row() for search in searches if search.n is not None],
        "cells": [result.row(design.folder) for result in results],
        "contrasts": _contrasts(design, results),
        "trends": _trends(design, results),
    }
    write_text(design.folder / "compare.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


def _place(block: Block) -> Row:
    return {"block": block.name, "task": block.task, "student": block.student}


def _about(design: Design, name: str) -> Row:
    if name in METHODS:
        return {"about": METHODS[name].about, "settings": dict(METHODS[name].settings)}
    key, value = next((s.key, v) for s in design.sweeps for v in s.values if s.method(v) == name)
    return {"about": f"the config with {key} = {value}", "settings": {key: value}}


def _notes(design: Design, impossible: Mapping[str, str]) -> Iterator[str]:
    """What a reader must know before the figures."""
    if design.vary_traces:
        yield "Each seed has its own traces of teacher and initial student, and its own order of training."
    else:
        yield (
            "All seeds share one set of traces of teacher and initial student: intervals over seeds say how another "
            "order of training would do, not how other traces would."
        )
    yield "The problems are fixed: nothing here says how another choice of train problems would do."
    trained = {method: None for block in design.blocks for method in design.trained_methods(block)}
    if trained and design.searches:
        yield (
            "Each method's learning rate was chosen on validation, with the first seed and equal epochs, before test "
            "problems were read; equal tokens use the same rate."
        )
    if trained and "tokens" in design.budgets:
        whose = "orpo-off" if "orpo-off" in trained else "the method that trains on most"
        yield (
            "Equal tokens: response tokens trained on, warm-up included, within 5% of what "
            f"{whose} has in epochs, or as near to it as whole steps a round come."
        )
    for method in design.methods:
        if single := [block.name for block in design.left_out(method)]:
            where = "" if len(single) == len(design.blocks) else f" of {', '.join(single)}"
            yield f"{method} is left out{where}: one teacher trace a problem is used, so it is single-cot."
    runs: dict[str, list[str]] = {}
    for name, reason in impossible.items():
        runs.setdefault(reason, []).append(name)
    for reason, names in runs.items():
        yield f"{', '.join(names)} could not be run: {reason}"


def _edges(design: Design, searches: Sequence[Search]) -> Iterator[str]:
    """Methods whose best learning rate was the lowest or the highest of those tried: another might suit them better."""
    for block in design.blocks if design.searches else ():
        names: dict[tuple[float, str], list[str]] = {}
        for each in searches:
            rates = design.rates_of(block, each.method)
            word = {min(rates): "lowest", max(rates): "highest"}.get(each.rate)
            if each.block == block and each.chosen and word:
                names.setdefault((each.rate, word), []).append(each.method)
        for (rate, word), methods in sorted(names.items()):
            where = f" ({block.name})" if block.name else ""
            yield f"The {word} learning rate tried, {rate:g}, was the best for {', '.join(methods)}{where}."


def _equals(design: Design, searches: Sequence[Search]) -> Iterator[str]:
    """Methods with another learning rate within a standard error of the best: theirs is a choice among equals."""
    for block in design.blocks:
        here = [each for each in searches if each.block == block]
        if names := [each.method for each in here if each.chosen and _has_equals(each, here)]:
            where = f" ({block.name})" if block.name else ""
            yield (
                "Another learning rate was within a standard error of the best on validation for "
                f"{', '.join(names)}{where}: other seeds may prefer it, and differences may be those of rates."
            )


def _has_equals(best: Search, searches: Sequence[Search]) -> bool:
    others = [each.correct or 0 for each in searches if each.method == best.method and not each.chosen]
    if not others or best.correct is None or best.n is None:
        return False
    return best.correct - max(others) <= sqrt(best.correct * (1 - best.correct / best.n))


def _contrasts(design: Design, results: Sequence[Result]) -> list[Row]:
    """Every contrast of every block and budget, the primary ones corrected together.

    One whose cells are the same trainings under both budgets stands under each, and is one test.
    """
    found = []
    for block in design.blocks:
        for budget in design.budgets:
            here = [result for result in results if result.cell.block == block and result.cell.budget in (budget, None)]
            for family, pairs in (("primary", PRIMARY), ("exploratory", [*EXPLORATORY, *_swept_pairs(design)])):
                found += [
                    {**_place(block), "budget": budget, "family": family, **row}
                    for a, b in pairs
                    if (row := _contrast(a, b, here)) is not None
                ]
    tests = {row["test"]: 1.0 if row["p"] is None else row["p"] for row in found if row["family"] == "primary"}
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    for row in found:
        is_primary, test = row["family"] == "primary", row.pop("test")
        row["p_holm"] = corrected[test] if is_primary else None
        level = ALPHA / len(tests) if is_primary else ALPHA
        row["smallest"] = smallest_difference(row["n"], row.pop("discordance"), level)
    return found


def _trends(design: Design, results: Sequence[Result]) -> list[Row]:
    rows = (
        _trend(sweep, block, budget, results)
        for sweep in design.sweeps
        if sweep.is_numeric
        for block in design.blocks
        for budget in design.budgets
    )
    return [row for row in rows if row is not None]


def _swept_pairs(design: Design) -> list[tuple[str, str]]:
    """Values of a sweep that are no numbers against the first one; numbers have a trend instead."""
    return [
        (sweep.method(value), sweep.method(sweep.values[0]))
        for sweep in design.sweeps
        if not sweep.is_numeric
        for value in sweep.values[1:]
    ]


def _contrast(a: str, b: str, results: Sequence[Result]) -> Row | None:
    """accuracy(a) - accuracy(b) on the same problems, seed by seed. None where there is nothing to compare."""
    paired = _paired(a, b, results)
    if not paired:
        return None
    scores = [_differences(one, other) for _, one, other in paired]
    rows = [{"seed": seed, **_one_seed(one, other)} for seed, one, other in paired]
    judged = estimate(scores)
    row = {"a": a, "b": b, "n": len(scores[0]), "seeds": rows, "difference": judged.mean}
    if len(rows) == 1:
        how = "Newcombe and McNemar, one seed"
        row |= {key: rows[0][key] for key in ("low", "high", "p")} | {"interval": how, "weak": True}
    else:
        row |= _judged(judged)
    if len(rows) >= ENOUGH_SEEDS:
        row["resampled_low"], row["resampled_high"] = resampled(scores)
    discordance = mean((each["only_a"] + each["only_b"]) / each["n"] for each in rows)
    test = tuple((one.evaluation, other.evaluation) for _, one, other in paired)
    return {**row, "discordance": discordance, "test": test}


def _judged(judged: Estimate) -> Row:
    return {"low": judged.low, "high": judged.high, "p": judged.p, "interval": judged.how, "weak": judged.weak}


def _paired(a: str, b: str, results: Sequence[Result]) -> list[tuple[int, Result, Result]]:
    """The seeds that both methods have, with both results. What has no seed stands beside every one."""
    by_key = {(result.cell.method, result.cell.seed): result for result in results}
    seeds = sorted({seed for method, seed in by_key if method in (a, b) and seed is not None})
    both = [[by_key.get((name, seed)) or by_key.get((name, None)) for name in (a, b)] for seed in seeds]
    return [(seed, one, other) for seed, (one, other) in zip(seeds, both, strict=True) if one and other]


def _differences(one: Result, other: Result) -> list[float]:
    """By problem: 1 where only `one` is right, -1 where only `other` is. Raises DataError for different problems."""
    _require_same_problems([one, other])
    return [float(right) - float(other.right[problem]) for problem, right in one.right.items()]


def _one_seed(one: Result, other: Result) -> Row:
    """Newcombe's interval and McNemar's test of one seed's difference."""
    found = compare_paired((right, other.right[problem]) for problem, right in one.right.items())
    row = {key: found[key] for key in ("n", "difference", "low", "high")}
    return {**row, "only_a": found["only_first"], "only_b": found["only_second"], "p": found["p"]}


def _trend(sweep: Sweep, block: Block, budget: str, results: Sequence[Result]) -> Row | None:
    """One test of a sweep: the slope of accuracy against the setting's value, in accuracy a unit of the value.

    The least-squares slope is a weighted sum of the values' accuracies, so it is judged as a difference is.
    """
    here = {
        (result.cell.method, result.cell.seed): result
        for result in results
        if result.cell.block == block and result.cell.budget == budget
    }
    seeds = sorted({seed for _, seed in here if seed is not None})
    methods = [sweep.method(value) for value in sweep.values]
    whole = [seed for seed in seeds if all((method, seed) in here for method in methods)]
    if not whole:
        return None
    weights = slope_weights(sweep.values)
    scores = [_weighted([here[method, seed] for method in methods], weights) for seed in whole]
    accuracies = [mean(mean(here[method, seed].right.values()) for seed in whole) for method in methods]
    judged = estimate(scores)
    row = {**_place(block), "budget": budget, "key": sweep.key, "values": list(sweep.values), "accuracies": accuracies}
    return {**row, "seeds": len(whole), "slope": judged.mean, **_judged(judged)}


def _weighted(results: Sequence[Result], weights: Sequence[Fraction]) -> list[float]:
    """By problem: the sum of the weights of the results that are right. Raises DataError for different problems."""
    _require_same_problems(results)
    return [
        float(sum(weight for result, weight in zip(results, weights, strict=True) if result.right[problem]))
        for problem in results[0].right
    ]


def _require_same_problems(results: Sequence[Result]) -> None:
    for result in results[1:]:
        if result.right.keys() != results[0].right.keys():
            names = f"{results[0].cell.config.name} and {result.cell.config.name}"
            raise DataError(
                f"expected the same test problems in {names}, found different ones; run the comparison again"
            )
