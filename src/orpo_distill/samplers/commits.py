"""Ledger operations from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from orpo_distill.ledger import Bought, Ledger, Operation, Settlement
from orpo_distill.ledger_file import LedgerTrouble
from orpo_distill.progress import say
from orpo_distill.samplers.unsaved import write_down

LOOK = 0.1  # seconds between looks at whether to hurry
BETWEEN_TRIES = 1.0  # seconds
SAID_EVERY = 60.0  # seconds
NEVER = float("-inf")


@dataclass(frozen=True)
class _Work:
    """An operation that somebody waits for. `reply`: what it records has been paid for and must not be lost."""

    operation: Operation[Any]
    future: asyncio.Future[Any]
    reply: Settlement | None = None


class Commits:
    """Writes the ledger in a thread; the operations that have gathered meanwhile share one transaction.

    While the ledger is locked, or cannot be written although a reply waits to be saved, everybody waits: no attempt
    begins, so that nothing more is sent. Replies are written down elsewhere meanwhile, see `unsaved`.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._waiting: list[_Work] = []
        self._flushing: asyncio.Task[None] | None = None
        self._written: Path | None = None  # where replies that cannot be saved stand
        self._left: list[Settlement] = []  # those of them that nobody tries to save any more
        self._said = NEVER  # when the user was last told
        self._closing = False
        self.hurry = threading.Event()  # once it is set (from any thread), nothing waits for the ledger any more

    async def __call__(self, operation: Operation[Any]) -> Any:
        """What the operation gives, once it is durable. Raises what it raises, and RunError."""
        return await self._do(operation, None)

    async def settle(self, reply: Settlement, key: str) -> dict[int, Bought]:
        """Record a reply; all samples of its prompt, once that is durable. Raises RunError where it has to give up."""

        def record(ledger: Ledger) -> dict[int, Bought]:
            reply(ledger)
            return ledger.samples(key)

        stands: dict[int, Bought] = await self._do(record, reply)
        return stands

    async def close(self) -> None:
        """Wait for the last transaction, also for operations whose callers were cancelled."""
        self._closing = True
        while self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing])
        self._pool.shutdown()

    async def _do(self, operation: Operation[Any], reply: Settlement | None) -> Any:
        loop = asyncio.get_running_loop()
        work = _Work(operation, loop.create_future(), reply)
        self._waiting.append(work)
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush())
        found = await work.future
        if isinstance(found, Exception):
            raise found
        return found

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            results = await self._committed(batch)
            for work, result in zip(batch, results, strict=True):
                with suppress(asyncio.InvalidStateError):
                    work.future.set_result(result)

    async def _committed(self, batch: list[_Work]) -> Sequence[Any]:
        """The results of a transaction, tried again for as long as that makes sense. What comes in meanwhile joins."""
        loop = asyncio.get_running_loop()
        while True:
            operations = [work.operation for work in batch]
            try:
                results = await loop.run_in_executor(self._pool, self._ledger.transaction, operations)
            except LedgerTrouble as error:
                batch += self._waiting
                self._waiting = []
                if not await self._wait(error, [work.reply for work in batch if work.reply is not None]):
                    return [error] * len(batch)
            except Exception as error:  # goes to those who wait
                return [error] * len(batch)
            else:
                self._relieved()
                return results

    async def _wait(self, error: LedgerTrouble, replies: Sequence[Settlement]) -> bool:
        """Wait until it is time to try again; False where that is no use, or nobody wants to wait any more."""
        if replies:
            self._write_down([*self._left, *replies])
        elif not error.busy:
            return False
        if self.hurry.is_set() or (self._closing and (self._written or not replies)):
            if replies:
                self._left += replies
                say(f"  {len(replies)} replies that were paid for could not be saved ({error}); {self._fate()}")
            return False
        if monotonic() - self._said > SAID_EVERY:
            self._said = monotonic()
            held = f"{len(replies)} replies that were paid for are held, and " if replies else ""
            say(f"  {error}. {held}nothing more is asked for until the ledger can be written")
        end = monotonic() + (0.0 if error.busy else BETWEEN_TRIES)
        while monotonic() < end and not self.hurry.is_set():
            await asyncio.sleep(LOOK)
        return True

    def _write_down(self, replies: Sequence[Settlement]) -> None:
        old, self._written = self._written, write_down(replies, self._ledger.path, self._ledger.session)
        if old and self._written and old != self._written:
            old.unlink(missing_ok=True)

    def _fate(self) -> str:
        """What has become of replies that are given up."""
        if self._written is None:
            return "they are lost, and their calls count as unknown"
        beside = self._written.parent == self._ledger.path.parent
        moved = "" if beside else f" once it is moved beside {self._ledger.path}"
        return f"they stand in {self._written}, and the next run takes them in{moved}"

    def _relieved(self) -> None:
        """Everything is saved that is still to be saved here."""
        if self._left:
            return
        if self._written is not None:
            self._written.unlink(missing_ok=True)
            self._written = None
        if self._said != NEVER:
            self._said = NEVER
            say("  the ledger can be written again: everything is saved, and the run goes on")
