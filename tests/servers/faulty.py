"""An OpenAI-compatible server that fails as real ones do, and keeps true books about it.

    .venv/bin/python -m tests.servers.faulty --port 0 --fault-rate 0.2 --seed 0 --log served.jsonl

The first line on stdout is its port, on 127.0.0.1. Faults, drawn evenly for a share of the requests that generate:

    drop_before    nothing generated    the connection ends (closed or reset) and nothing is sent
    429            nothing generated    with Retry-After
    declined       nothing generated    200 with an error object, only if asked for by name; `declined:status` names 503
    500            nothing generated    500 with JSON, or 502 or 503 with HTML
    drop_after     generated, counted   the connection ends and nothing is sent
    hang           generated, counted   the reply comes --hang seconds late
    truncated      generated, counted   half of the body that Content-Length announces, then the end
    malformed      generated, counted   status 200 and a body of kind cut, html, empty, null, shape (no choices list)
    no_choices     only the prompt      an empty list, and usage that says so
    fewer_choices  counted as made      1 to n - 1 choices, usage that says so; none for n = 1
    wrong_usage    generated, counted   all choices; usage of kind zero, negative, missing, null, absurd,
                                        first (choice alone), low (half), text

`--faults malformed:html` fixes the kind. Only `wrong_usage` makes the reply's counts differ from the true ones; the
true ones are in GET /stats (never faulty, in no count) and in the log. Generating goes on when a client leaves, and is
counted. The fault of a request depends on --seed and the request's running number alone.

The log has one line a request, written before the reply: `request` (its number, also the header x-request-id: req_N),
`path`, `messages` (see `messages_hash`), `seed`, `n`, `fault`, `status`, true counts of tokens, the `texts`, and
`usage` as the reply gives it. Rows of a batch have `batch` and `custom_id` instead of `request` and `path`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.servers.account import Account, Count
from tests.servers.answers import Style, messages_hash
from tests.servers.batches import Batches
from tests.servers.completions import Completions, Made
from tests.servers.faults import (
    DECLINED,
    FAULTS,
    NOT_SERVED,
    OF_CALLS,
    Fault,
    Faults,
    error_reply,
    not_served,
    spoil_transport,
    too_many,
)
from tests.servers.http1 import Asked, Reply, json_reply, listen

GENERATING = {"/v1/chat/completions": True, "/v1/completions": False}


class Limiter:
    """Requests a minute, as a bucket that fills evenly and holds `burst`. No limit: everything passes."""

    def __init__(self, per_minute: float, burst: float) -> None:
        self.rate, self.burst = per_minute / 60, burst or max(1.0, per_minute / 60)
        self.left, self.at = self.burst, time.monotonic()
        self.refused = 0

    def take(self) -> float:
        """0 for a request that passes, or the seconds to wait."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        self.left, self.at = min(self.burst, self.left + (now - self.at) * self.rate), now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        self.refused += 1
        return (1 - self.left) / self.rate

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, if there is a limit."""
        if not self.rate:
            return {}
        reset = (self.burst - self.left) / self.rate
        return {
            "x-ratelimit-limit-requests": str(round(self.rate * 60)),
            "x-ratelimit-remaining-requests": str(int(self.left)),
            "x-ratelimit-reset-requests": f"{reset:.3f}s" if reset >= 1 else f"{reset * 1000:.0f}ms",
        }


class Faulty:
    """The server: `answer` takes every request."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.account = Account.open(options.log)
        style = Style(options.right, options.reasoning, read_gold(options.gold), options.nasty)
        self.completions = Completions(options, style, self.account)
        self.batches = Batches(options, self.completions, self.account)
        self.faults = Faults(options.fault_rate, options.faults, options.seed)
        self.call_faults = Faults(options.batch_fault_rate, options.faults, options.seed)
        self.limiter = Limiter(options.rate_limit, options.burst)
        self.jitter = random.Random(options.seed)

    async def answer(self, asked: Asked) -> Reply:
        """Route a request; count it, unless it asks for the counts."""
        if asked.path == "/stats":
            stats = self.account.stats("times=1" in asked.query)
            return json_reply(stats | {"rate_limited": self.limiter.refused})
        number = self.account.arrived(asked.path)
        try:
            reply = await self._route(asked, number)
        finally:
            self.account.in_flight -= 1
        if self.options.echo and (reply.status >= 400 or b'"object": "error"' in reply.body):
            reply = error_reply(reply.status, f"You sent {asked.headers}: {reply.body.decode()}")
        self.account.statuses[str(reply.status) if reply.send is None else "cut"] += 1
        reply.headers = {**reply.headers, "x-request-id": f"req_{number}", **self.limiter.headers()}
        return reply

    async def _route(self, asked: Asked, number: int) -> Reply:
        key, path = self.options.api_key, asked.path
        if key and asked.headers.get("authorization") != f"Bearer {key}":
            return error_reply(401, "Incorrect API key provided.", code="invalid_api_key")
        if path in GENERATING and asked.method == "POST":
            return await self._generate(asked, number)
        if path == "/v1/models" and asked.method == "GET":
            models = [
                {"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.options.models
            ]
            return json_reply({"object": "list", "data": models})
        if path.startswith(("/v1/files", "/v1/batches")):
            return await self._call(asked, number)
        return error_reply(404, f"Invalid URL ({asked.method} {path})")

    async def _call(self, asked: Asked, number: int) -> Reply:
        fault = self._meet(self.call_faults, number, OF_CALLS)
        if fault.name in NOT_SERVED:
            return not_served(fault, self.options.retry_after, self.options.retry_after_form)
        reply = self.batches.answer(asked)
        if fault.name == "malformed" and reply.kind != "application/json":
            return reply
        if fault.name == "hang":
            await asyncio.sleep(self.options.hang)
        return spoil_transport(reply, fault)

    def _meet(self, faults: Faults, number: int, allowed: tuple[str, ...]) -> Fault:
        fault = faults.meet(number, allowed)
        if fault.name:
            self.account.faults[fault.label] += 1
        return fault

    async def _generate(self, asked: Asked, number: int) -> Reply:
        chat, options = GENERATING[asked.path], self.options
        try:
            body = json.loads(asked.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return error_reply(400, "We could not parse the JSON body of your request.")
        line = self._line(asked, number, body, chat)
        wait = self.limiter.take()
        refused = too_many(wait, options.retry_after_form) if wait else self.completions.refuse(body, chat)
        if not refused and options.quota and self.account.true.completion_tokens >= options.quota:
            refused = error_reply(429, "You exceeded your current quota.", code="insufficient_quota")
        fault = Fault() if refused else self._meet(self.faults, number, (*FAULTS, DECLINED))
        if fault.name in (*NOT_SERVED, DECLINED):
            refused = not_served(fault, options.retry_after, options.retry_after_form)
        if refused:
            status = refused.status if refused.send is None else None
            line |= {"fault": fault.label, "status": status, **Count().as_dict(), "texts": [], "usage": None}
            self.account.write(line)
            return refused
        await self._think()
        made = self.completions.make(body, chat, fault)
        reply = self._reply(made, fault)
        self.account.charge(made.count)
        line |= {"fault": fault.label, "status": 200 if reply.send is None else None, **made.count.as_dict()}
        self.account.write({**line, "texts": made.texts, "usage": readable_usage(made, fault)})
        if fault.name == "hang":
            await asyncio.sleep(options.hang)
        return reply

    def _line(self, asked: Asked, number: int, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        if not self.account.log:
            return {}
        line = {"request": number, "path": asked.path, "model": body.get("model"), "seed": body.get("seed")}
        line |= {"n": body.get("n") or 1, "temperature": body.get("temperature")}
        line |= {"client_request_id": asked.headers.get("x-client-request-id")}
        return line | {"messages": messages_hash(body.get("messages" if chat else "prompt"))}

    async def _think(self) -> None:
        latency = self.options.latency + self.options.jitter * self.jitter.random()
        if latency:
            await asyncio.sleep(latency)

    def _reply(self, made: Made, fault: Fault) -> Reply:
        reply = spoil_transport(json_reply(made.response), fault)
        usage = readable_usage(made, fault)
        reply.when_sent = lambda: self.account.whole(usage)
        return reply


def readable_usage(made: Made, fault: Fault) -> Any:
    """The usage that a reply which arrives gives, or None."""
    lost = fault.name in ("drop_after", "truncated") or (fault.name == "malformed" and fault.kind != "shape")
    return None if lost else made.response.get("usage")


def read_gold(path: Path | None) -> dict[str, str]:
    """Answers by question from a file of JSON Lines with `question` and `answer`."""
    if not path:
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["question"].strip(): str(row["answer"]) for row in rows}


def names(allowed: Sequence[str] = ()) -> Callable[[str], tuple[str, ...]]:
    """Reads a list with commas; the part of each item before a colon must be one of `allowed`."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in found if allowed and name.partition(":")[0] not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, found {', '.join(unknown)}")
        return found

    return read


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--port", type=int, default=0)
    add("--seed", type=int, default=0, help="of the faults, of the latency, and of texts asked without a seed")
    add("--log", type=Path, help="a line of JSON a request is appended here")
    add("--until-stdin-ends", action="store_true", help="stop when stdin is closed: no server outlives its test")
    add("--models", type=names(), default=("faulty",))
    add("--api-key", help="401 without it")
    add("--right", type=float, default=0.7, help="the share of right answers")
    add("--gold", type=Path, help="JSON Lines with question and answer, for questions that are not like 3 + 4")
    add("--reasoning", choices=("none", "reasoning_content", "think"), default="none")
    add("--ignore-seed", action="store_true", help="other texts every time, whatever the seed")
    add("--max-n", type=int, default=0, help="the most choices; 0: 128")
    add("--max-n-mode", choices=("refuse", "ignore"), default="refuse", help="400, or fewer choices in silence")
    add("--vocabulary", type=Path, help="tokens' texts, a JSON list: scores prompts in tokens, see scores.py")
    add("--strict", action="store_true", help="400 for parameters that OpenAI does not know")
    add("--refuse", type=names(), default=(), help="parameters that get a 400")
    add("--refuse-text", default="", help="prompts that hold this text are refused")
    add("--refuse-status", type=int, default=400, help="how such a prompt is refused")
    add("--nasty", action="store_true", help="texts, and errors of --refuse-text, begin with control characters")
    add("--echo", action="store_true", help="every error repeats the request's headers, the key among them")
    add("--prompt-cache", action="store_true", help="a prompt seen before is reported as cached")
    add("--latency", type=float, default=0.0, help="seconds")
    add("--jitter", type=float, default=0.0, help="seconds, the most that is added to the latency")
    add("--rate-limit", type=float, default=0.0, help="requests that generate, a minute; 0: none")
    add("--burst", type=float, default=0.0, help="requests at once under the limit; 0: those of a second")
    add("--quota", type=int, default=0, help="429 insufficient_quota after so many tokens; 0: none")
    add("--fault-rate", type=float, default=0.0)
    add("--faults", type=names((*FAULTS, DECLINED)), default=FAULTS, help="some of " + ", ".join(FAULTS))
    add("--hang", type=float, default=30.0, help="seconds that a hanging reply is late")
    add("--retry-after", type=float, default=1.0, help="seconds that the fault 429 asks for")
    add("--retry-after-form", choices=("seconds", "date", "none"), default="seconds")
    add("--batch-delay", type=float, default=1.0, help="seconds that a batch takes")
    add("--batch-fail", type=float, default=0.0, help="the share of a batch's rows that fail")
    add("--batch-expire", type=float, default=0.0, help="batches expire with this share of their rows done; 0: never")
    add("--batch-page", type=int, default=100, help="batches and files on a page of their lists, at most")
    add("--batch-hidden", type=float, default=0.0, help="seconds before a new batch stands in the list")
    add("--batch-odd", action="store_true", help="outputs have rows that belong to nobody, twice or in odd forms")
    add("--batch-fault-rate", type=float, default=0.0, help="of calls to files and batches: " + ", ".join(OF_CALLS))
    return found


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT, or the end of stdin if asked."""
    faulty = Faulty(options)
    server, port = await listen(faulty.answer, options.port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.until_stdin_ends:
        loop.add_reader(sys.stdin.fileno(), lambda: os.read(sys.stdin.fileno(), 4096) or stop.set())
    print(port, flush=True)
    await stop.wait()
    server.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server."""
    asyncio.run(serve(parser().parse_args(argv)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
