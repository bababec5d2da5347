"""vLLM's server from the environment that `benchmarks/environments.py` makes, on a small checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.environments import python_of

SECONDS_TO_START = 600  # on a busy machine


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """A server of `model` in float32; its base_url. What it says goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself asks for a package named vllm, which the CPU build is not.
    command = [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    options = [
        f"--model={model}",
        "--dtype=float32",
        "--enforce-eager",
        "--served-model-name=tiny",
        "--gpu-memory-utilization=0.1",
    ]
    with log.open("wb") as said:
        process = subprocess.Popen([*command, *options], stdout=said, stderr=said, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
