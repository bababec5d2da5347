"""What the faulty server does wrong: which fault meets which request, and how a reply is spoilt."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any

from tests.servers.http1 import Reply, json_reply

NOT_SERVED = ("drop_before", "429", "500")
DECLINED = "declined"  # not served either; only where it is asked for by name
SERVED = ("drop_after", "hang", "truncated", "malformed", "no_choices", "fewer_choices", "wrong_usage")
FAULTS = NOT_SERVED + SERVED
OF_CALLS = ("drop_before", "429", "500", "drop_after", "hang", "truncated", "malformed")  # on files and batches
MALFORMED = ("cut", "html", "empty", "null", "shape")
WRONG_USAGE = ("zero", "negative", "missing", "null", "absurd", "first", "low", "text")
STATUSES = (500, 502, 503)
HTML = b"<html><head><title>Bad Gateway</title></head><body>cloudflare</body></html>"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its name, its kind where there are several, and a number to draw from. No name: none."""

    name: str = ""
    kind: str = ""
    draw: random.Random | None = None

    @property
    def label(self) -> str:
        """`name` or `name:kind`, as the log and the counts have it."""
        return f"{self.name}:{self.kind}" if self.kind else self.name


@dataclass(frozen=True)
class Faults:
    """The share of requests that meet a fault, and those it is drawn from, evenly; `name:kind` fixes the kind."""

    rate: float
    names: tuple[str, ...]
    seed: int

    def meet(self, number: int, allowed: tuple[str, ...] = FAULTS) -> Fault:
        """The fault of request `number`: the same for the same seed, whatever else is asked."""
        names = [name for name in self.names if name.partition(":")[0] in allowed]
        draw = random.Random(f"{self.seed}-{number}")
        if not names or draw.random() >= self.rate:
            return Fault()
        name, _, kind = draw.choice(names).partition(":")
        if not kind and name in ("malformed", "wrong_usage"):
            kind = draw.choice(MALFORMED if name == "malformed" else WRONG_USAGE)
        return Fault(name, kind, draw)


def error_reply(status: int, message: str, code: str | None = None, param: str | None = None, **headers: str) -> Reply:
    """An error in OpenAI's form. Underscores in the names of headers stand for hyphens."""
    kind = {401: "invalid_request_error", 429: "requests"}.get(status, "invalid_request_error")
    kind = "server_error" if status >= 500 else kind
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json_reply({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


def too_many(seconds: float, form: str = "seconds", message: str = "Rate limit reached for requests") -> Reply:
    """A 429 that asks to wait. `form`: seconds (rounded up, and `retry-after-ms`), date, none."""
    whole = max(1, int(-(-seconds // 1)))
    headers = {"seconds": {"retry_after": str(whole), "retry_after_ms": str(int(seconds * 1000))}, "none": {}}
    headers["date"] = {"retry_after": formatdate(time.time() + whole, usegmt=True)}
    return error_reply(429, message, code="rate_limit_exceeded", **headers[form])


def not_served(fault: Fault, retry_after: float, form: str) -> Reply:
    """The reply of a fault that comes before anything is generated."""
    assert fault.draw
    if fault.name == "429":
        return too_many(retry_after, form)
    if fault.name == DECLINED:
        code = {"code": 503} if fault.kind == "status" else {}
        return json_reply({"error": {"message": "Provider returned an error", **code}, "user_id": "u"})
    if fault.name == "500":
        status = fault.draw.choice(STATUSES)
        if status == 500:
            return error_reply(500, "The server had an error while processing your request. Sorry about that!")
        return Reply(status, HTML, kind="text/html")
    return Reply(cut=fault.draw.choice(("fin", "rst")), send=-1)


def spoil_transport(reply: Reply, fault: Fault) -> Reply:
    """The reply as it goes on the wire after a fault that comes behind the generating."""
    if fault.name == "drop_after":
        assert fault.draw
        return replace(reply, cut=fault.draw.choice(("fin", "rst")), send=-1)
    if fault.name == "truncated":
        return replace(reply, cut="fin", send=len(reply.body) // 2)
    if fault.name != "malformed":
        return reply
    if fault.kind == "html":
        return replace(reply, body=HTML, kind="text/html")
    shape = json.loads(reply.body)
    shape = {**shape, "choices": None, "data": None, "object": "error"}
    bodies = {"cut": reply.body[: len(reply.body) // 2], "empty": b"", "null": b"null"}
    return replace(reply, body=bodies[fault.kind] if fault.kind in bodies else json.dumps(shape).encode())


def wrong_usage(usage: dict[str, Any], kind: str, first: int) -> dict[str, Any] | None:
    """Wrong counts; "missing" gives {}. Two that nobody can tell from right ones: "low" is half of the true count,
    "first" is that of the first choice alone, which is what llama.cpp's server says.
    """
    true = usage["completion_tokens"]
    if kind in ("missing", "null"):
        return {} if kind == "missing" else None
    said = {"zero": 0, "negative": -true, "absurd": 10**9, "first": first, "low": true // 2, "text": str(true)}[kind]
    return {**usage, "completion_tokens": said}
