"""How a stage's work is started: inline, as several processes, or under accelerate. Never what it computes.

python -m orpo_distill.launch CALL.json        runs one call in this process (what the other ways start)
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from orpo_distill.config import LaunchSection
from orpo_distill.errors import Interrupted, ModelError, OrpoDistillError, RunError
from orpo_distill.interrupt import signals_raise
from orpo_distill.records import write_text
from orpo_distill.runs import Metrics, Stage, disk_errors_explained

SECONDS_TO_STOP = 25.0


@dataclass(frozen=True)
class Launcher:
    """Starts stages as the config's `launch` section says. An instance is a `runs.Start`."""

    settings: LaunchSection

    def __call__(self, stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        """Run a stage's work and return its metrics."""
        shards = self.settings.sample.processes
        train = self.settings.train
        if "shard" in type(stage.options).model_fields and shards > 1:
            self._run_shards(stage, inputs, out, shards)
        elif stage.work.endswith(":train") and train.launcher == "accelerate":
            return self._run_accelerate(stage, inputs, out, train.processes)
        return call(stage.work, stage.options, inputs, out)

    def _run_shards(self, stage: Stage, inputs: Mapping[str, Path], out: Path, count: int) -> None:
        """Each process samples its share of the problems into its own partial file; the caller merges them."""
        commands, environments = [], []
        for index in range(count):
            options = stage.options.model_copy(update={"shard": (index, count)})
            path = _write_call(stage.work, options, inputs, out, f"call-{index}.json")
            commands.append([sys.executable, "-m", "orpo_distill.launch", str(path)])
            environments.append(_device_environment(index, count))
        _run_processes(stage.name, commands, environments)
        for index in range(count):
            (out / f"call-{index}.json").unlink()

    def _run_accelerate(self, stage: Stage, inputs: Mapping[str, Path], out: Path, processes: int) -> Metrics:
        path = _write_call(stage.work, stage.options, inputs, out, "call.json")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        if processes > 1:
            command.append("--multi_gpu" if _gpus() else "--cpu")
        _run_processes(stage.name, [[*command, "-m", "orpo_distill.launch", str(path)]], [dict(os.environ)])
        metrics: Metrics = json.loads((out / "metrics.json").read_bytes())
        (out / "metrics.json").unlink()
        path.unlink()
        return metrics


def call(work: str, options: Any, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Call a stage's work function in this process."""
    module, _, name = work.partition(":")
    return cast(Metrics, getattr(importlib.import_module(module), name)(options, inputs, out))


def main(arguments: Sequence[str]) -> int:
    """Run one written call: the body of every process that a launcher starts."""
    data = json.loads(Path(arguments[0]).read_bytes())
    module, _, name = data["options_class"].partition(":")
    options = getattr(importlib.import_module(module), name).model_validate(data["options"])
    out = Path(data["out"])
    try:
        with signals_raise(), disk_errors_explained(out):
            metrics = call(data["work"], options, {key: Path(path) for key, path in data["inputs"].items()}, out)
    except OrpoDistillError as error:
        if not isinstance(error, Interrupted):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if int(os.environ.get("RANK", "0")) == 0 and Path(arguments[0]).name == "call.json":
        write_text(out / "metrics.json", json.dumps(metrics))
    return 0


def _write_call(work: str, options: Any, inputs: Mapping[str, Path], out: Path, name: str) -> Path:
    path = out / name
    content = {
        "work": work,
        "options_class": f"{type(options).__module__}:{type(options).__qualname__}",
        "options": options.model_dump(mode="json"),
        "inputs": {key: str(value) for key, value in inputs.items()},
        "out": str(out),
    }
    write_text(path, json.dumps(content))
    return path


def _run_processes(stage: str, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> None:
    """Run all to the end; when one fails or a signal comes, the others are told to stop, then killed."""
    running = [subprocess.Popen(c, env=dict(e)) for c, e in zip(commands, environments, strict=True)]
    try:
        waiting = list(running)
        while waiting:
            for process in list(waiting):
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                waiting.remove(process)
                if code:
                    raise RunError(f"{stage}: process {running.index(process)} ended with exit code {code}, see above")
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            try:
                process.wait(timeout=SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _device_environment(index: int, count: int) -> dict[str, str]:
    """The environment of one shard: its own GPU where there are some, its share of the cores otherwise."""
    environment = dict(os.environ)
    gpus = _gpus()
    if not gpus:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        return environment
    if count > len(gpus):
        raise ModelError(
            f"expected a GPU for each of launch.sample.processes={count}, found {len(gpus)}; lower the setting"
        )
    environment["CUDA_VISIBLE_DEVICES"] = gpus[index]
    return environment


@cache
def _gpus() -> list[str]:
    """The devices to share out. Asked in a process of its own, so that this one never opens a CUDA context."""
    script = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    count = int(found.stdout or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
