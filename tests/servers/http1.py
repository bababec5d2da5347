"""HTTP/1.1 on asyncio, no more than a test's server needs: keep-alive, and replies that break off on purpose."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}
REASONS |= {500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}
BACKLOG = 4096
RESET = struct.pack("ii", 1, 0)  # linger for 0 seconds: closing resets the connection
LARGEST_HEAD = 65_536  # bytes


@dataclass(slots=True)
class Asked:
    """A request that has come in whole. Header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Reply:
    """What is sent back. `cut`: the connection is closed ("fin") or reset ("rst") after `send` bytes of the body.

    `send` of None is the whole body; with -1 not even the head is sent.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    cut: Literal["", "fin", "rst"] = ""
    send: int | None = None
    when_sent: Callable[[], None] | None = None  # called if every byte was handed to the kernel


Handler = Callable[[Asked], Awaitable[Reply]]


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply whose body is `value` as JSON."""
    return Reply(status, as_json(value).encode(), headers or {})


def as_json(value: object) -> str:
    """JSON that UTF-8 can hold: lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other, in the order they came."""

    def __init__(self, handler: Handler, tasks: set[asyncio.Task[None]]) -> None:
        self.handler, self.tasks = handler, tasks
        self.buffer = bytearray()
        self.transport: Any = None
        self.busy = self.lost = False
        self.drained: asyncio.Event | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; tell it to report as soon as a byte could not be written."""
        self.transport = transport
        self.transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: what is being generated goes on, as it does at a provider."""
        self.lost = True
        if self.drained:
            self.drained.set()

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self.drained = asyncio.Event()

    def resume_writing(self) -> None:
        """The kernel has taken everything."""
        if self.drained:
            self.drained.set()
        self.drained = None

    def data_received(self, data: bytes) -> None:
        """Begin the next request if it is here whole and none is being answered."""
        self.buffer += data
        if not self.busy:
            self._next()

    def _next(self) -> None:
        try:
            asked = self._parse()
        except ValueError:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()
            return
        if asked:
            self.busy = True
            task = asyncio.get_running_loop().create_task(self._answer(asked))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _parse(self) -> Asked | None:
        end = self.buffer.find(b"\r\n\r\n", 0, LARGEST_HEAD)
        if end < 0:
            if len(self.buffer) >= LARGEST_HEAD:
                raise ValueError("the head is too long")
            return None
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body, used = self._body(headers, end + 4)
        if body is None:
            if headers.pop("expect", "") and len(self.buffer) == end + 4:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        del self.buffer[:used]
        path, _, query = target.partition("?")
        return Asked(method, path, query, headers, body)

    def _body(self, headers: dict[str, str], start: int) -> tuple[bytes | None, int]:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            end = start + int(headers.get("content-length", "0"))
            return (bytes(self.buffer[start:end]), end) if len(self.buffer) >= end else (None, 0)
        parts: list[bytes] = []
        while (line := self.buffer.find(b"\r\n", start)) >= 0:
            size = int(bytes(self.buffer[start:line]).split(b";")[0], 16)
            start = line + 2 + size + 2
            if len(self.buffer) < start:
                break
            if not size:
                return b"".join(parts), start
            parts.append(bytes(self.buffer[line + 2 : start - 2]))
        return None, 0

    async def _answer(self, asked: Asked) -> None:
        try:
            reply = await self.handler(asked)
        except Exception as error:  # a mistake of the server's own: loud, and never taken for a fault
            print(f"the test server failed: {error!r}", file=sys.stderr, flush=True)
            reply = Reply(599, repr(error).encode(), kind="text/plain")
        await self._write(reply, asked.headers.get("connection", "").lower() == "close")
        self.busy = False
        if not self.lost and self.buffer:
            self._next()

    async def _write(self, reply: Reply, close: bool) -> None:
        if self.lost:
            return
        close = close or bool(reply.cut)
        head = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Other')}", f"Content-Type: {reply.kind}"]
        head += [f"{name}: {value}" for name, value in reply.headers.items()]
        head += [f"Content-Length: {len(reply.body)}", f"Connection: {'close' if close else 'keep-alive'}", "", ""]
        if reply.send != -1:
            self.transport.write("\r\n".join(head).encode("latin-1") + reply.body[: reply.send])
        if self.drained:
            await self.drained.wait()
        if not self.lost and not reply.cut and reply.when_sent:
            reply.when_sent()
        if reply.cut == "rst":
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()
        elif close:
            self.transport.close()


async def listen(handler: Handler, port: int) -> tuple[asyncio.Server, int]:
    """Listen on a port of 127.0.0.1, 0 for any; returns the server and its port."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 20_000 if hard == resource.RLIM_INFINITY else min(hard, 20_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(handler, tasks), "127.0.0.1", port, backlog=BACKLOG)
    return server, server.sockets[0].getsockname()[1]
