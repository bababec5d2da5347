"""What can become of a request that brought nothing: whether it may have been paid for, and whether it can heal."""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orpo_distill.samplers.rates import asked_pause
from orpo_distill.samplers.replies import Declined

# What a connection that was not made is called by those who would have made it (httpx's names for it are not exact).
NEVER_LEFT = (
    *(("aiohttp", "ClientConnectorError"), ("aiohttp", "ConnectionTimeoutError")),
    *(("httpcore", "ConnectError"), ("httpcore", "ConnectTimeout")),
)
PASSES = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)  # statuses that may heal
PERHAPS_SERVED = (408, 502, 504, 520, 522, 524)  # a gateway gave up waiting: the server behind it may not have
MOVED = (301, 302, 303, 307, 308)
EVERYWHERE = (*MOVED, 401, 402, 404, 405, 501)  # the address, key, account or server is wrong, not the request
OUT_OF_CREDIT = "insufficient_quota"  # an error's code or type
NAME_PATIENCE = 10.0  # seconds for which a host's name may be unknown, before anything has succeeded
WORDS = 300  # characters of a server's message that are shown


class Fault(Exception):
    """A request that may be sent again.

    `paid`: it may have been billed. `pause`: seconds that the server asks for. `answered`: by an error of the server's.
    `nowhere`: nobody knows the host's name.
    """

    def __init__(
        self, why: str, paid: bool, pause: float | None = None, answered: bool = False, nowhere: bool = False
    ) -> None:
        self.paid, self.pause, self.answered, self.nowhere = paid, pause, answered, nowhere
        super().__init__(why)


class NotOffered(Fault):
    """The server does not take requests for several samples."""


class Refused(Fault):
    """A request that cannot heal. `everywhere`: no other one would be answered either."""

    def __init__(self, why: str, everywhere: bool) -> None:
        self.everywhere = everywhere
        super().__init__(why, paid=False)


def fault_of(error: Exception, secrets: Sequence[str]) -> Fault | None:
    """What an error of the client means; None if it is none of its. Secrets are blotted out of the server's words."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        why = f"HTTP {error.status_code}: {shown(_words(error.response), secrets)}"
        return _of_status(error.status_code, why, {error.code, error.type}, error.response.headers)
    if isinstance(error, APIConnectionError):
        causes: list[BaseException] = [error]  # the client translates twice, once wrongly: aiohttp's own error tells
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        unmade = [one for one in causes if any(_full_name(kind) in NEVER_LEFT for kind in type(one).__mro__)]
        found = (unmade or causes)[-1]
        nowhere = any(_is_of_names(one) for cause in causes for one in (cause, cause.__context__))
        why = f"{shown(str(found) or error.message, secrets)} ({type(found).__name__})"
        return Fault(why, paid=not unmade, nowhere=nowhere)
    return None


def declined(error: Declined, secrets: Sequence[str]) -> Fault:
    """What an error in a reply of status 200 means: what the status that it names means; it costs nothing without one.

    It may have been billed if the reply says so, in counts that cannot be right.
    """
    why = f"HTTP 200 with an error: {shown(error.words, secrets)}"
    fault = Fault(why, False, answered=True)
    if error.status is not None or OUT_OF_CREDIT in error.kinds:
        fault = _of_status(error.status or 429, why, error.kinds, {})
    fault.paid |= error.billed
    return fault


def _full_name(kind: type) -> tuple[str, str]:
    """The package and the name of a class; httpcore2 goes on from httpcore."""
    return kind.__module__.partition(".")[0].rstrip("2"), kind.__name__


def _is_of_names(error: BaseException | None) -> bool:
    return isinstance(error, socket.gaierror) or type(error).__name__ == "ClientConnectorDNSError"


def _of_status(status: int, why: str, kinds: Collection[object], headers: Mapping[str, str]) -> Fault:
    out_of_credit = OUT_OF_CREDIT in kinds
    if status in PASSES and not out_of_credit:
        pause = asked_pause(headers)
        if pause is None and status == 429:
            pause = 1.0
        return Fault(why, status in PERHAPS_SERVED, pause, answered=True)
    return Refused(why, status in EVERYWHERE or out_of_credit)


def shown(words: str, secrets: Sequence[str]) -> str:
    """A server's words on one line that is not too long, without the secrets, and fit for any file."""
    for secret in secrets:
        words = words.replace(secret or "\0", "[key]")  # first: a secret that is cut cannot be found any more
    line = " ".join(words.encode(errors="replace").decode().split())
    return (line[:WORDS] + "…" if len(line) > WORDS else line) or "no words"


def _words(response: Any) -> str:
    """A server's own words, from any of the usual places."""
    text: str = response.text
    try:
        data = json.loads(text)
        inner = data.get("error", data) if isinstance(data, dict) else data
        message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
        text = message if isinstance(message, str) else text
    except (ValueError, RecursionError):
        pass
    return text
