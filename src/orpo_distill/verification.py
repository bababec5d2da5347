"""Verdicts for many traces: in this process, or in workers that are killed when a verifier hangs or crashes.

A worker is a fresh Python that imports the verifier and nothing else: neither this process's `__main__` nor torch. With
a verifier that may hang it gets one trace at a time; one that takes too long costs its own verdict (FAILED) and a
restart of the worker.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from orpo_distill.errors import ConfigError
from orpo_distill.records import FinishReason, Outcome, Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier

START_TIMEOUT = 120.0  # seconds a worker may take to import its verifier
IN_FLIGHT = 4  # batches handed out ahead of the one whose verdicts are awaited, for each worker
BATCH = 128  # traces that a worker gets at once where the verifier cannot hang

Item = tuple[Problem, Trace]


def verify_all(
    verifier: Verifier, items: Iterable[Item], timeout: float = 10.0, processes: int = 1
) -> Iterator[Verdict]:
    """The verdicts on `items`, in their order, as they are found.

    An isolated verifier runs in `processes` workers and has `timeout` seconds a trace. Another one runs here, or in
    workers too if there are to be several. A trace without text, and one on which the verifier raises, hangs or dies,
    is FAILED with the reason. Raises ConfigError if a worker cannot start.
    """
    if verifier.isolated or processes > 1:
        return _in_workers(verifier, items, timeout, processes)
    return (judge(verifier, problem, trace) for problem, trace in items)


def judge(verifier: Verifier, problem: Problem, trace: Trace) -> Verdict:
    """One verdict in this process. An exception of the verifier becomes a FAILED verdict."""
    if trace.finish_reason is FinishReason.ERROR:
        return failed(trace, trace.error or "there is no text")
    try:
        found: object = verifier(problem, trace)
    except Exception as error:
        return failed(trace, f"the verifier raised {type(error).__name__}: {error}")
    if isinstance(found, Verdict) and found.trace_id == trace.id and isinstance(found.outcome, Outcome):
        return found
    return failed(trace, f"expected a Verdict(trace.id, Outcome, answer, reason) of the verifier, found {found!r}")


def failed(trace: Trace, reason: str) -> Verdict:
    """The verdict on a trace that nothing can be said of."""
    return Verdict(trace.id, Outcome.FAILED, None, reason)


def _in_workers(verifier: Verifier, items: Iterable[Item], timeout: float, processes: int) -> Iterator[Verdict]:
    workers = [Worker(verifier, timeout) for _ in range(processes)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def some(batch: Sequence[Item]) -> list[Verdict]:
        worker = idle.get()
        try:
            return worker.judge(batch)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(processes, thread_name_prefix="verify")
    pending: deque[Future[list[Verdict]]] = deque()
    try:
        for batch in _batches(items, 1 if verifier.isolated else BATCH):
            pending.append(pool.submit(some, batch))
            if len(pending) >= IN_FLIGHT * processes:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in workers:
            worker.close()
        pool.shutdown()


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class Worker:
    """A process that judges batches of traces, started when first needed and again after it was killed."""

    def __init__(self, verifier: Verifier, timeout: float) -> None:
        self._setup = (pickle.dumps(verifier), timeout)
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._closed = threading.Event()

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """The worker's verdicts, or FAILED ones. Raises ConfigError if the worker cannot start.

        Where one of several traces costs the worker, each is judged again alone.
        """
        connection = self._connection or self._start()
        try:
            connection.send(items)
            if connection.poll(self._timeout * len(items)):
                found = connection.recv()
                if _answers(found, items):
                    return list(found)
                self.kill()
                reason = "the verifier's process answered for another trace; did it fork?"
            else:
                self.kill()
                reason = f"the verifier took longer than {self._timeout:g} s"
        except (EOFError, OSError):
            reason = f"the verifier's process died (exit code {self.kill(patience=5.0)})"
        if len(items) > 1:
            return [verdict for item in items for verdict in self.judge([item])]
        return [failed(items[0][1], reason)]

    def close(self) -> None:
        """Kill the process; it will not start again."""
        self._closed.set()
        self.kill()

    def kill(self, patience: float = 0.2) -> int | None:
        """Kill the process after so many seconds to end by itself. Its exit code, None if there was none."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that the verifier started
        return process.wait()

    def _start(self) -> Connection[Any, Any]:
        if self._closed.is_set():
            raise OSError("the worker is closed")
        ours, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from orpo_distill import verification as v; v.work(sys.argv[1])"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what a verifier prints is not this program's output
                start_new_session=True,
            )
        self._connection = ours
        problem = "it did not answer"
        with suppress(EOFError, OSError):
            ours.send(self._setup)
            if ours.poll(START_TIMEOUT):
                problem = ours.recv()
        if problem or self._closed.is_set():
            self.kill()
            raise ConfigError(f"expected a verifier that a worker process can import, found: {problem}")
        return ours


def _answers(found: object, items: Sequence[Item]) -> bool:
    """Whether a worker's answer is a verdict on each of the traces."""
    if not isinstance(found, list) or not all(isinstance(verdict, Verdict) for verdict in found):
        return False
    return [verdict.trace_id for verdict in found] == [trace.id for _, trace in items]


def work(handle: str) -> None:
    """The worker's side: judge what comes through a connection, given by its file descriptor, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(int(handle)) as connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pickled, timeout = connection.recv()
        try:
            verifier = pickle.loads(pickled)  # noqa: S301 (from our own parent, over a private pipe)
            verifier.prepare()
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send("")
        with open(os.devnull, "w") as silent:  # noqa: PTH123
            while True:
                items = connection.recv()
                limit = 2 * timeout * len(items) + 5
                faulthandler.dump_traceback_later(limit, exit=True, file=silent)  # if the parent is gone
                connection.send([judge(verifier, problem, trace) for problem, trace in items])
                faulthandler.cancel_dump_traceback_later()
