"""Ledger operations from an event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from orpo_distill.ledger import Ledger, Operation


class Commits:
    """Writes the ledger in a thread; the operations that have gathered meanwhile share one transaction."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._waiting: list[tuple[Operation[Any], asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def __call__(self, operation: Operation[Any]) -> Any:
        """What the operation gives, once it is durable. Raises what it raises, and RunError."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((operation, future))
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush())
        found = await future
        if isinstance(found, Exception):
            raise found
        return found

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            operations = [operation for operation, _ in batch]
            try:
                results = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._ledger.transaction, operations
                )
            except Exception as error:  # goes to those who wait
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                with suppress(asyncio.InvalidStateError):
                    future.set_result(result)

    async def close(self) -> None:
        """Wait for the last transaction, also for operations whose callers were cancelled."""
        while self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing])
        self._pool.shutdown()
