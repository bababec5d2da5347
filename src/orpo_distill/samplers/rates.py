"""How often requests may leave: requests and tokens a minute, and pauses that a server asks for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import monotonic, time

BURST = 1.0  # seconds' worth that may leave at once: no minute holds more than 61 seconds' worth
LONGEST_PAUSE = 600.0  # seconds; a server that asks for more is asked again by then
FIRST_GAP, LONGEST_GAP = 0.02, 10.0  # seconds between requests after a pause, twice as long after each further one
EASE = 0.98  # what is left of that gap after each success
HALF_LIFE = 20.0  # seconds in which it halves besides: where it is long, successes are too few to shorten it
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Limiter:
    """Lets requests leave one after another, in the order they come, as fast as both rates and all pauses allow.

    After a pause that a server asked for they leave one by one, further apart with every pause until requests succeed:
    a limit that the server does not name is found so.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._requests = _Flow(requests_per_minute)
        self._tokens = _Flow(tokens_per_minute)
        self._pause_until = self._paused = 0.0
        self._gap, self._gap_since, self._last = 0.0, 0.0, 0.0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    async def leave(self, tokens: float) -> None:
        """Wait until a request of about `tokens` tokens may leave, and count it."""
        async with self._turn:
            while True:
                now = monotonic()
                gap = self._last + self._gap_at(now) - now
                wait = max(self._pause_until - now, gap, self._requests.wait(now), self._tokens.wait(now))
                if wait <= 0:
                    break
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), wait)
                except TimeoutError:
                    continue
            self._last = now
            self._requests.take(now, 1)
            self._tokens.take(now, tokens)

    @property
    def paused(self) -> float:
        """Seconds of pauses so far, the present one to its end."""
        return self._paused

    @property
    def pausing(self) -> float:
        """Seconds that are left of a pause."""
        return max(0.0, self._pause_until - monotonic())

    def ease(self) -> None:
        """Take note of a success."""
        now = monotonic()
        gap = self._gap_at(now)
        self._gap = gap * EASE if gap > FIRST_GAP / 4 else 0.0
        self._gap_since = max(self._gap_since, now)

    def correct(self, tokens: float) -> None:
        """Count `tokens` more for a request that has left, or fewer if negative: a reply said how many there were."""
        self._tokens.take(monotonic(), tokens)
        self._changed.set()

    def pause(self, seconds: float) -> None:
        """Let nothing leave for so long: the server asked for it."""
        now = monotonic()
        until = now + min(seconds, LONGEST_PAUSE)
        if now >= self._pause_until:
            self._gap = min(max(2 * self._gap_at(now), FIRST_GAP), LONGEST_GAP)
        self._gap_since = max(self._gap_since, until)
        self._paused += max(0.0, until - max(now, self._pause_until))
        self._pause_until = max(self._pause_until, until)

    def _gap_at(self, now: float) -> float:
        """Seconds between requests; pauses do not shorten it."""
        halvings = max(0.0, now - self._gap_since) / HALF_LIFE
        return self._gap * float(0.5**halvings)


class _Flow:
    """A steady flow of so many units a minute (None: no limit), by the time at which the next unit is due."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0  # a unit
        self._due = 0.0

    def wait(self, now: float) -> float:
        """Seconds until something may pass."""
        return self._due - now if self._seconds else 0.0

    def take(self, now: float, units: float) -> None:
        """Let `units` pass."""
        self._due = max(self._due, now - BURST) + units * self._seconds


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds for which a reply's headers ask to wait; None if they do not.

    `Retry-After` (RFC 9110, section 10.2.3: seconds or a date), `retry-after-ms`, and where nothing remains of a limit
    its `x-ratelimit-reset-requests` or `-tokens` ("1s", "6m0s", "250ms").
    """
    if milliseconds := _number(headers.get("retry-after-ms")):
        return milliseconds / 1000
    if (after := headers.get("retry-after")) is not None:
        return seconds if (seconds := _number(after)) is not None else _until(after)
    waits = [
        span(headers.get(f"x-ratelimit-reset-{what}", ""))
        for what in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{what}", "").strip() == "0"
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def span(text: str) -> float | None:
    """The seconds of "6m0s", "250ms" or "12"; None for anything else."""
    if (plain := _number(text)) is not None:
        return plain
    parts = _SPAN.findall(text)
    if not parts or "".join(map("".join, parts)) != text.strip():
        return None
    return sum(float(count) * _SECONDS[unit] for count, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        found = float(text or "")
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None


def _until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time())
    except (ValueError, TypeError):
        return None
