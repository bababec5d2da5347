"""Carry a comparison out: learning rates first, on validation; then equal epochs; then equal trained tokens."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from math import log
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from orpo_distill.ahead import check_ahead
from orpo_distill.compare.cells import Block, Cell, Design, stages_of
from orpo_distill.compare.results import Result, Search, evaluation_of, training, write_comparison
from orpo_distill.compare.tables import render_markdown
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, DataError, Interrupted, RunError, RunInUse
from orpo_distill.experiment import run
from orpo_distill.interrupt import signals_raise
from orpo_distill.launch import SECONDS_TO_STOP, device_environment, die_with
from orpo_distill.page import comparison_page
from orpo_distill.progress import say
from orpo_distill.records import write_text
from orpo_distill.runs import SHARED, RunFolder, disk_errors_explained
from orpo_distill.stages.problems import ProblemsOptions, has_validation

REFERENCE = "orpo-off"  # equal tokens are its tokens; without it those of the method that trains on most
DELETED = "deleted"  # a checkpoint's name while it is deleted
LeftOut = DataError | RunInUse | None  # why a run was left out; None: it was not
CLOSE = 0.05  # a method whose tokens are this close to those needs no other run


def compare(design: Design, jobs: int = 1, command: str = "") -> Path:
    """Bring a comparison up to date, `jobs` runs at a time. Returns its folder.

    There stand `compare.json`, `compare.md` and `report.html`. Each run is a folder of its own; started again after a
    kill, everything goes on where it was. A method that a data set cannot have (no wrong traces of the teacher, say) is
    left out with its reason; so is a run that another process holds, and then RunError is raised at the end. Raises
    OrpoDistillError's children for anything else.
    """
    folder = RunFolder(design.folder)
    with disk_errors_explained(folder.path), folder.lock():
        _require_validation(design)
        _check_ahead(design)
        (folder.path / SHARED).mkdir(exist_ok=True)
        runner = Runner(design, jobs)
        searches = [search for block in design.blocks for search in _search(runner, block)]
        rates = {(search.block.name, search.method): search.rate for search in searches if search.chosen}
        baselines = [design.baseline(block) for block in design.blocks]
        runner(baselines)
        cells = [cell for cell in baselines if not runner.failed(cell)]
        cells += [cell for block in design.blocks for cell in _with_budgets(runner, block, rates)]
        if cells:
            left_out = runner.impossible | runner.held
            content = write_comparison(design, searches, [Result(cell) for cell in cells], left_out, command)
            write_text(folder.path / "compare.md", render_markdown(content))
            write_text(folder.path / "report.html", comparison_page(content))
        if runner.held:
            raise RunError(
                f"expected every run in {folder.path} to be free, found others at work in {', '.join(runner.held)}; "
                "wait for them or stop them and run the same command: compare.md has what could be compared without"
            )
        if not cells:
            name, reason = next(iter(runner.impossible.items()))
            raise DataError(f"expected a method that the data allows, found none; {name}: {reason}")
    return folder.path


def _require_validation(design: Design) -> None:
    """Raise ConfigError where learning rates are to be chosen and there is nothing to choose them on."""
    for block in design.blocks:
        if not (design.searches and design.trained_methods(block)):
            continue
        split = block.config.problems.validation
        if not has_validation(ProblemsOptions(task=block.config.task, problems=block.config.problems)):
            found = "problems.validation: null" if split is None else f"no split {split!r} with problems in the task"
            raise ConfigError(
                f"expected validation problems to choose learning rates on, found {found} ({block.config.name}); name "
                "a split in problems.validation, hold some of train out with problems.holdout, or give one rate with "
                "--learning-rates"
            )


def _check_ahead(design: Design) -> None:
    """Raise what a method of a block would only find out late, such as that it needs another teacher."""
    for block in design.blocks:
        for method in design.trained_methods(block):
            rate = block.config.train.learning_rate
            cell = design.trained(block, method, block.config.seed, rate, "epochs")
            if not RunFolder(cell.config.run_dir).finished(cell.until):
                check_ahead(stages_of(cell))


def _search(runner: Runner, block: Block) -> list[Search]:
    """Each method's learning rates with what they reach on validation. A single rate is not measured."""
    design = runner.design
    rates = {method: design.rates_of(block, method) for method in design.trained_methods(block)}
    if not design.searches:
        return [Search(block, method, only, chosen=True) for method, (only,) in rates.items()]
    cells = {method: {rate: design.searching(block, method, rate) for rate in each} for method, each in rates.items()}
    runner([cell for own in cells.values() for cell in own.values()])
    found = []
    for method, own in cells.items():
        tried = [
            Search(block, method, rate, cell.seed, *_validation(cell))
            for rate, cell in own.items()
            if not runner.failed(cell)
        ]
        if tried and not runner.holds_up(own.values()):
            base = block.config.train.learning_rate
            best = max(tried, key=lambda each: (each.correct or 0, -abs(log(each.rate / base)), -each.rate))
            best.chosen = True
            say(f"{method}: learning rate {best.rate:g} ({best.correct} of {best.n} right on validation)")
        found += tried
    return found


def _validation(cell: Cell) -> tuple[int, int]:
    """Problems, and how many were right."""
    rows = json.loads((evaluation_of(cell) / "results.json").read_bytes())
    row = next(row for row in rows if row["split"] == "validation")
    return row["n"], row["correct"]


def _with_budgets(runner: Runner, block: Block, rates: dict[tuple[str, str], float]) -> list[Cell]:
    """A block's runs: every method and seed with equal epochs, then with as many steps as equal tokens allow."""
    design, found = runner.design, []
    methods = [method for method in design.trained_methods(block) if (block.name, method) in rates]
    for seed in design.seeds_of(block):
        epochs = {
            method: design.trained(block, method, seed, rates[block.name, method], "epochs") for method in methods
        }
        runner(list(epochs.values()))
        done = {method: cell for method, cell in epochs.items() if not runner.failed(cell)}
        found += list(done.values()) if "epochs" in design.budgets else []
        if "tokens" in design.budgets and done and not runner.holds_up(epochs.values()):
            tokens = _equal_tokens(design, done, seed)
            runner(tokens)
            found += [cell for cell in tokens if not runner.failed(cell)]
        _free(design)
    return found


def _equal_tokens(design: Design, done: dict[str, Cell], seed: int) -> list[Cell]:
    """The methods (no sweeps) with as many steps a round as bring their trained tokens closest to the reference's."""
    counts = {method: _trained(cell) for method, cell in done.items()}
    totals = {method: each["warmup"] + each["tokens"] for method, each in counts.items()}
    target = totals.get(REFERENCE, max(totals.values()))
    cells = []
    for method, cell in done.items():
        if method in design.swept():
            continue
        near = abs(totals[method] - target) <= CLOSE * target
        steps = None if near else _steps_a_round(counts[method], cell.config, target)
        rate = cell.config.train.learning_rate
        cells.append(design.trained(cell.block, method, seed, rate, "tokens", steps))
    return cells


def _steps_a_round(count: dict[str, int], config: Config, target: int) -> int | None:
    """As many steps a round as bring the tokens of warm-up and rounds nearest to the target; None for an epoch's.

    The steps of an epoch may hold fewer than `pairs_per_step` rows, those of any other number are full.
    """
    a_step, an_epoch = count["tokens"] / count["pairs"] * config.train.pairs_per_step, count["steps"] // config.rounds
    wanted = (target - count["warmup"]) / config.rounds
    fewer = max(1, int(wanted / a_step))
    tokens = {steps: steps * a_step for steps in (fewer, fewer + 1)}
    tokens[an_epoch] = count["tokens"] / config.rounds
    best = min(tokens, key=lambda steps: abs(tokens[steps] - wanted))
    return None if best == an_epoch else best


def _trained(cell: Cell) -> dict[str, int]:
    """Tokens that a cell's warm-up trained on; tokens, rows and optimizer steps of all rounds together."""
    rounds = training(cell)
    warmup = rounds.pop("warmup/train", {"tokens": 0})["tokens"]
    return {"warmup": warmup} | {
        key: sum(each[key] for each in rounds.values()) for key in ("tokens", "pairs", "steps")
    }


def _free(design: Design) -> None:
    """Delete optimizer states that no later seed can need, unless a config keeps all."""
    if any(block.config.train.keep == "all" for block in design.blocks):
        return
    shared = design.folder / SHARED
    for checkpoint in shared.glob("*/checkpoint"):
        if (checkpoint.parent / "manifest.json").exists():
            _delete_whole(checkpoint)
    for rest in shared.glob(f"*/{DELETED}"):  # of a deletion that was broken off
        shutil.rmtree(rest)


def _delete_whole(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill never leaves a part of it behind under its name."""
    rest = checkpoint.with_name(DELETED)
    shutil.rmtree(rest, ignore_errors=True)
    checkpoint.rename(rest)
    shutil.rmtree(rest)


class Runner:
    """Runs cells, several at a time if asked, and remembers those that could not be run."""

    def __init__(self, design: Design, jobs: int) -> None:
        self.design = design
        self.impossible: dict[str, str] = {}  # a run's name -> why the data does not allow it
        self.held: dict[str, str] = {}  # a run's name -> who is at work in it
        self._jobs = jobs

    def __call__(self, cells: Sequence[Cell]) -> None:
        """Bring cells up to date."""
        calls = [(cell.config, cell.until) for cell in cells]
        if self._jobs == 1 or len(cells) == 1:
            self._note(cells, (_run_cell(*each) for each in calls))
            return
        say(f"{len(cells)} runs, {self._jobs} at a time; each says what it does in {self.design.folder}/NAME/log.txt")
        spawn = multiprocessing.get_context("spawn")
        shares = spawn.SimpleQueue()
        for index in range(self._jobs):
            shares.put(device_environment(index, self._jobs, 1, "--jobs"))
        pool = ProcessPoolExecutor(self._jobs, spawn, _begin_worker, (os.getpid(), shares))
        try:
            jobs = [pool.submit(_run_quietly, *each) for each in calls]
            self._note(cells, (job.result() for job in jobs))
        except BrokenProcessPool as error:
            raise RunError(
                f"expected {self._jobs} processes to run a comparison's runs, found that one was killed (out of "
                "memory?); lower --jobs and run the same command: what was finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _end(multiprocessing.active_children())

    def failed(self, cell: Cell) -> bool:
        """Whether a cell could not be run."""
        return cell.config.name in self.impossible | self.held

    def holds_up(self, cells: Iterable[Cell]) -> bool:
        """Whether another process is at work in one of the cells, so that what follows from all of them has to wait."""
        return any(cell.config.name in self.held for cell in cells)

    def _note(self, cells: Sequence[Cell], found: Iterable[LeftOut]) -> None:
        for number, (cell, why) in enumerate(zip(cells, found, strict=True), start=1):
            name = cell.config.name
            if why is not None:
                (self.held if isinstance(why, RunInUse) else self.impossible)[name] = str(why)
            say(f"[{number}/{len(cells)}] {name}: {'done' if why is None else f'left out: {why}'}")


def _end(workers: Sequence[BaseProcess]) -> None:
    """End workers politely, then not: nobody may work in the comparison once its lock is given back."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.join()


def _run_cell(config: Config, until: str) -> LeftOut:
    """Bring one run up to date, or return why it cannot be."""
    try:
        run(config, until)
    except (DataError, RunInUse) as error:
        return error
    return None


def _begin_worker(parent: int, shares: SimpleQueue[dict[str, str]]) -> None:
    """Before anything else in a process that runs cells: its share of the machine, and its end with the parent's."""
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()
    os.environ.update(shares.get())


def _run_quietly(config: Config, until: str) -> LeftOut:
    """`_run_cell` in a process of its own, whose messages go into the run's `log.txt`."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (config.run_dir / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            with signals_raise():
                return _run_cell(config, until)
        except Interrupted as error:
            os._exit(error.exit_code)  # the pool would go on with the next cell
