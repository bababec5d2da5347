"""The replicas of one model: load is spread over those that work, and one that fails rests until it is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import AsyncOpenAI

IN_A_ROW = 3  # failures without a success between them after which a replica rests
LONGEST_REST = 60.0  # seconds


@dataclass
class Server:
    """One address."""

    url: str
    client: AsyncOpenAI
    in_flight: int = 0
    failures: int = field(default=0, init=False)  # in a row
    rests_until: float = field(default=0.0, init=False)
    nowhere: bool = field(default=False, init=False)  # nobody knew its name, the last time

    def works(self) -> None:
        """Take note of a reply."""
        self.failures, self.rests_until, self.nowhere = 0, 0.0, False

    def failed(self, sent: float, nowhere: bool = False) -> None:
        """Take note of a request, sent at that time, that the server did not answer; `nowhere`: its name is unknown.

        What was under way when the rest began says nothing new: many requests that one hiccup ends count once.
        """
        self.nowhere = nowhere
        if sent < self.rests_until:
            return
        self.failures += 1
        if self.failures >= IN_A_ROW:
            self.rests_until = monotonic() + min(LONGEST_REST, 2.0 ** (self.failures - IN_A_ROW))


class Servers:
    """All addresses of one model."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    @property
    def nowhere(self) -> bool:
        """Whether nobody knew the name of any of them, the last time."""
        return all(server.nowhere for server in self._servers)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Server]:
        """Inside the block: the server with the fewest requests in flight, once one is there that does not rest."""
        while not (ready := [server for server in self._servers if server.rests_until <= monotonic()]):
            await asyncio.sleep(max(0.01, min(server.rests_until for server in self._servers) - monotonic()))
        server = min(ready, key=lambda one: one.in_flight)
        server.in_flight += 1
        try:
            yield server
        finally:
            server.in_flight -= 1

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.client.close()
