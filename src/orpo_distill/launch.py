"""How a stage's work is started: inline, as several processes, or under accelerate. Never what it computes.

python -m orpo_distill.call CALL.json        runs one call in this process (what the other ways start)
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from orpo_distill.config import LaunchSection
from orpo_distill.errors import Interrupted, ModelError, OrpoDistillError, RunError
from orpo_distill.interrupt import signals_raise
from orpo_distill.progress import say
from orpo_distill.records import write_text
from orpo_distill.runs import Metrics, Stage, disk_errors_explained
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.sample import SampleOptions

SECONDS_TO_STOP = 25.0
Sampling = SampleOptions | EvaluateOptions
LAUNCHER = "ORPO_DISTILL_LAUNCHER"  # the environment variable with the process id of the run


@dataclass(frozen=True)
class Launcher:
    """Starts stages as the config's `launch` section says. An instance is an `execution.Start`."""

    settings: LaunchSection

    def __call__(self, stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        """Run a stage's work and return its metrics."""
        train, several = self.settings.train, self.settings.sample.processes > 1
        if isinstance(stage.options, Sampling) and stage.options.sampler.shards and several:
            self._run_shards(stage, stage.options, inputs, out)
        elif stage.work.endswith(":train") and train.launcher == "accelerate":
            return self._run_accelerate(stage, inputs, out, train.processes)
        return call(stage.work, stage.options, inputs, out)

    def _run_shards(self, stage: Stage, options: Sampling, inputs: Mapping[str, Path], out: Path) -> None:
        """Each process samples its share of the problems into its own partial file; the caller merges them."""
        jobs, count = [], self.settings.sample.processes
        for index in range(count):
            path = _write_call(
                stage.work, options.model_copy(update={"shard": (index, count)}), inputs, out, f"call-{index}.json"
            )
            command = [sys.executable, "-m", "orpo_distill.call", str(path)]
            jobs.append(Job(command, device_environment(index, count, options.sampler.devices), path))
        run_jobs(stage.name, jobs)

    def _run_accelerate(self, stage: Stage, inputs: Mapping[str, Path], out: Path, processes: int) -> Metrics:
        path = _write_call(stage.work, stage.options, inputs, out, "call.json")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        if processes > 1:
            command.append("--multi_gpu")  # what accelerate calls several processes, on CPUs too
        run_jobs(stage.name, [Job([*command, "-m", "orpo_distill.call", str(path)], dict(os.environ), path)])
        metrics: Metrics = json.loads((out / "metrics.json").read_bytes())
        (out / "metrics.json").unlink()
        return metrics


@dataclass(frozen=True)
class Job:
    """A process that makes one written call."""

    command: Sequence[str]
    environment: Mapping[str, str]
    call: Path


def call(work: str, options: Any, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """Call a stage's work function in this process."""
    module, _, name = work.partition(":")
    return cast(Metrics, getattr(importlib.import_module(module), name)(options, inputs, out))


def main(arguments: Sequence[str]) -> int:
    """Make one written call: the body of every process that a launcher starts."""
    path = Path(arguments[0])
    data = json.loads(path.read_bytes())
    module, _, name = data["options_class"].partition(":")
    options = getattr(importlib.import_module(module), name).model_validate(data["options"])
    out = Path(data["out"])
    threading.Thread(target=die_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    try:
        with signals_raise(), disk_errors_explained(out):
            metrics = call(data["work"], options, {key: Path(value) for key, value in data["inputs"].items()}, out)
            _leave_process_group()
    except Interrupted as error:
        return error.exit_code
    except OrpoDistillError as error:
        write_text(_error_file(path), str(error))
        return error.exit_code
    if int(os.environ.get("RANK", "0")) == 0 and path.name == "call.json":
        write_text(out / "metrics.json", json.dumps(metrics))
    return 0


def _leave_process_group() -> None:
    """End torch's communication threads, if there are any: one that outlives the interpreter may abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _error_file(call_file: Path) -> Path:
    """Where the process that makes a written call, or one of its own, leaves its message when it fails."""
    return call_file.with_suffix(".error")


def run_jobs(stage: str, jobs: Sequence[Job]) -> None:
    """Run all to the end. When one fails or a signal comes, the others are told to stop, then killed.

    Raises RunError with the message of the one that failed. What they say on stderr is passed on, until something
    goes wrong: what follows then is only the noise of their going down.
    """
    for job in jobs:
        _error_file(job.call).unlink(missing_ok=True)
    environment = {LAUNCHER: str(os.getpid())}
    running = [
        subprocess.Popen(
            job.command, env={**job.environment, **environment}, stderr=subprocess.PIPE, start_new_session=True
        )
        for job in jobs
    ]
    stopping = threading.Event()
    relays = [
        threading.Thread(target=_relay, args=(process, job, stopping))
        for process, job in zip(running, jobs, strict=True)
    ]
    for relay in relays:
        relay.start()
    try:
        _wait(stage, running, jobs)
    finally:
        stopping.set()
        _stop(running)
        for relay in relays:
            relay.join()
    for job in jobs:
        job.call.unlink()


def _wait(stage: str, running: Sequence[subprocess.Popen[bytes]], jobs: Sequence[Job]) -> None:
    waiting = list(zip(running, jobs, strict=True))
    while waiting:
        for process, job in list(waiting):
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            waiting.remove((process, job))
            if code:
                message = (
                    _error_file(job.call).read_text()
                    if _error_file(job.call).exists()
                    else f"a process ended with exit code {code}"
                )
                raise RunError(f"{stage}: {message}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and all that they started: politely, then not."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    _signal_groups(processes, signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    _signal_groups(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal_groups(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _relay(process: subprocess.Popen[bytes], job: Job, stopping: threading.Event) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            if not (stopping.is_set() or _error_file(job.call).exists()):
                say(line.decode(errors="replace").rstrip("\n"))


def die_with(launcher: int) -> None:
    """End this process as soon as the one that the user started is gone: nobody would hold the run's lock for it."""
    while not _is_gone(launcher):
        time.sleep(0.2)
    os._exit(1)


def _is_gone(process: int) -> bool:
    """Whether a process has ended, although its own parent may not have taken note of it yet (a zombie)."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:  # no Linux
        return False
    except ProcessLookupError:
        return True


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


def device_environment(
    index: int, count: int, devices: int, setting: str = "launch.sample.processes"
) -> dict[str, str]:
    """The environment of one process of `count`: GPUs of its own, or its share of the cores where there are none."""
    environment = dict(os.environ)
    gpus = _gpus()
    if not gpus:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        return environment
    if count * devices > len(gpus):
        raise ModelError(
            f"expected {devices} GPU(s) for each of {setting}={count}, found {len(gpus)} in all; lower the setting"
        )
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * devices : (index + 1) * devices])
    return environment


@cache
def _gpus() -> list[str]:
    """The devices to share out. Asked in a process of its own, so that this one never opens a CUDA context."""
    script = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    count = int(found.stdout or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
