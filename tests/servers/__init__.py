"""Real servers for tests, each in a process of its own: one that fails on purpose, and llama.cpp's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class FaultyServer:
    """A running `tests.servers.faulty`."""

    base_url: str
    port: int
    log_path: Path
    process: subprocess.Popen[str]

    def stats(self, times: bool = False) -> dict[str, Any]:
        """The server's own books; `times` adds when each request came (seconds since the epoch)."""
        url = f"http://127.0.0.1:{self.port}/stats{'?times=1' if times else ''}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def settled(self, seconds: float = 30) -> dict[str, Any]:
        """The books once nothing is being generated any more, as after a client was killed."""
        end = time.monotonic() + seconds
        while (found := self.stats())["in_flight"]:
            assert time.monotonic() < end, f"still {found['in_flight']} in flight after {seconds} s"
            time.sleep(0.02)
        return found

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def faulty_server(**options: object) -> Iterator[FaultyServer]:
    """Run `python -m tests.servers.faulty` with the options of its command line, such as `fault_rate=0.2`.

    True is a flag, a list or tuple is joined by commas. Without `log` the log is a file that goes in the end.
    """
    with tempfile.TemporaryDirectory(prefix="faulty-") as folder:
        options.setdefault("log", Path(folder) / "log.jsonl")
        log = Path(str(options["log"]))
        log.touch()
        command = [sys.executable, "-m", "tests.servers.faulty", "--until-stdin-ends", *flags(options)]
        with running(command) as (process, line):
            yield FaultyServer(f"http://127.0.0.1:{int(line)}/v1", int(line), log, process)


def flags(options: dict[str, object]) -> list[str]:
    """`{"fault_rate": 0.2, "strict": True}` as `["--fault-rate=0.2", "--strict"]`."""
    found = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            found.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return found


@contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and its first line on stdout; it is ended in the end, and by itself when this process dies."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline().strip()
            assert line, f"expected `{' '.join(command[1:4])}` to start, found: exit code {process.wait(timeout=30)}"
            yield process, line
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
