"""Run an experiment, or look at one: what the command line and the Python API call."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from orpo_distill.ahead import check_ahead
from orpo_distill.config import Config
from orpo_distill.errors import RunError
from orpo_distill.execution import REDOING, due, execute, refuse_stale, state
from orpo_distill.launch import Launcher
from orpo_distill.loading import load_config
from orpo_distill.plan import plan, select
from orpo_distill.progress import say
from orpo_distill.records import write_text
from orpo_distill.runs import Metrics, RunFolder, Stage, disk_errors_explained, environment
from orpo_distill.stages.problems import said_dropped


def run(config: Config, until: str | None = None, redo: Sequence[str] = (), keep: Sequence[str] = ()) -> Path:
    """Bring a run up to date, to the end or to the stage `until`. Returns the run folder.

    Started again after a kill, or with more samples or problems, it makes only what is missing. Raises
    OrpoDistillError's children; every message says what to do.
    """
    stages = plan(config)
    if until is not None:
        stages = select(stages, until)
    folder = RunFolder(config.run_dir)
    with disk_errors_explained(folder.path), folder.lock():
        refuse_stale(stages, folder, redo, keep)
        check_ahead(due(stages, folder, redo, keep), _validation(folder))
        write_text(folder.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_text(folder.path / "environment.json", json.dumps(environment(), indent=1) + "\n")
        execute(stages, folder, _Timed(Launcher(config.launch), folder), redo, keep)
        if folder.shares:
            _collect_times(stages, folder)
    return folder.path


def status(path: Path) -> list[tuple[str, str, str]]:
    """The stages of a run folder, each with its `execution.state` and what came out of it in a few words."""
    config = path / "config.yaml"
    if not config.exists():
        raise RunError(f"expected a run folder with a config.yaml at {path}, found none; name a folder in runs/")
    folder = RunFolder(path)
    rows = []
    for stage in plan(load_config(config)):
        manifest = folder.manifest(stage.name)
        came_out = _brief(stage, manifest.metrics) if manifest else _so_far(folder.of(stage.name))
        kept = f" (kept although changed: {', '.join(manifest.asked.kept)})" if manifest and manifest.asked.kept else ""
        rows.append((stage.name, state(stage, folder), came_out + kept))
    return rows


def _validation(folder: RunFolder) -> int | None:
    """How many validation problems a run has, if its problems stand."""
    found = folder.manifest("problems")
    return found.metrics["validation"] if found else None


def _so_far(folder: Path) -> str:
    """How many records an unfinished stage has."""
    count = 0
    for partial in folder.glob("*.partial*.jsonl"):
        with partial.open("rb") as lines:
            count += sum(1 for _ in lines)
    return f"{count} so far" if count else ""


def _collect_times(stages: Sequence[Stage], folder: RunFolder) -> None:
    """Let `times.json` hold the seconds of shared stages too, whichever run made them."""
    times = _read_times(folder.path / "times.json")
    for stage in stages:
        times |= _read_times(folder.of(stage.name) / SECONDS, stage.name)
    write_text(folder.path / "times.json", json.dumps(times, indent=1) + "\n")


def _read_times(path: Path, stage: str | None = None) -> dict[str, float]:
    """The seconds in a file, of the stage where it holds one number. Lost ones are no reason to stop."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if stage is None else {stage: found}
    return {}


SECONDS = "seconds.json"  # in the folder of a shared stage


class _Timed:
    """Says what starts, and keeps the seconds that what stands took to make in `times.json`, apart from the results."""

    def __init__(self, launcher: Launcher, folder: RunFolder) -> None:
        self._launcher = launcher
        self._path = folder.path / "times.json"

    def __call__(self, stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        say(f"{stage.name} ...")
        started, is_new = time.monotonic(), {path.name for path in out.iterdir()} <= {"stage.json", REDOING}
        metrics = self._launcher(stage, inputs, out)
        seconds = time.monotonic() - started
        times = _read_times(self._path) | _read_times(out / SECONDS, stage.name)
        times[stage.name] = round((0.0 if is_new else times.get(stage.name, 0.0)) + seconds, 2)
        write_text(self._path, json.dumps(times, indent=1) + "\n")
        if out.is_symlink():
            write_text(out / SECONDS, json.dumps(times[stage.name]) + "\n")
        say(f"{stage.name}: {_brief(stage, metrics)} ({seconds:.1f} s)")
        return metrics


# What is said of a finished stage, by the name of its work; everything it counted stands in its manifest.
SAID = {
    "problems": ("train", "test", "validation"),
    "sample": ("traces", "completion_tokens"),
    "verify": ("correct", "wrong", "ambiguous", "unparseable", "truncated", "failed"),
    "phi": ("phi", "latest", "initial"),
    "pair": ("phi", "pairs", "paired_problems", "fell_back"),
    "judge_pairs": ("pairs", "candidates", "paired_problems"),
    "scorer": ("scoring",),
    "score": ("policy", "scored", "tokens"),
    "extrapolate": ("alpha",),
    "choose": ("alpha",),
    "mechanisms": ("scored_problems", "warnings"),
    "train": ("steps", "tokens", "nll_loss", "rewards/accuracies"),
}


def _brief(stage: Stage, metrics: Metrics) -> str:
    """A stage's main counts on one line."""
    keys = SAID.get(stage.work.partition(":")[2], ())
    counts = [
        f"{metrics[key]:.4g} {key}" if isinstance(metrics[key], float) else f"{metrics[key]} {key}"
        for key in keys
        if metrics.get(key) is not None
    ]
    scores = [
        f"{row[score]:.1%} of {row['n']} on {split}"
        for split, row in metrics.items()
        for score in ("accuracy", "win_rate")
        if isinstance(row, dict) and row.get(score) is not None and "n" in row and "split" in row
    ]
    dropped = said_dropped(metrics.get("dropped") or {}) if "train_available" in metrics else ""
    return ", ".join([*counts, *scores, *([dropped] if dropped else [])]) or "done"
