"""The faulty server's own books: what was asked, what was generated, what was said about it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.servers.http1 import as_json


@dataclass(slots=True)
class Count:
    """Tokens: of prompts, of texts (reasoning among them), and those of prompts that came from the cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    choices: int = 0

    def add(self, other: Count) -> None:
        """Add `other` to this."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.reasoning_tokens += other.reasoning_tokens
        self.choices += other.choices

    def as_dict(self) -> dict[str, int]:
        """The fields as JSON has them."""
        return {name: getattr(self, name) for name in Count.__slots__}


@dataclass
class Account:
    """Counts since the start. `true` is what was generated; `said` what replies that were sent whole say of it."""

    log: TextIO | None = None
    requests: int = 0
    served: int = 0
    sent: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    true: Count = field(default_factory=Count)
    batch: Count = field(default_factory=Count)
    batch_served: int = 0
    said: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @classmethod
    def open(cls, log: Path | None) -> Account:
        """An account that also writes its lines to `log`, each at once."""
        return cls(log.open("a", buffering=1, encoding="utf-8") if log else None)

    def arrived(self, path: str) -> int:
        """Note a request; returns its running number, from 1."""
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.paths[path] += 1
        self.times.append(time.time())
        return self.requests

    def charge(self, count: Count, batch: bool = False) -> None:
        """Put what was generated on the bill. Tokens of batches are kept apart, and are in `true` as well."""
        self.true.add(count)
        if batch:
            self.batch.add(count)
            self.batch_served += 1
        else:
            self.served += 1

    def whole(self, usage: object) -> None:
        """Note that a reply which says `usage` was sent whole; what is no number in it counts nothing."""
        self.sent += 1
        if isinstance(usage, dict):
            for name in ("prompt_tokens", "completion_tokens"):
                if isinstance(usage.get(name), int):
                    self.said[name] += usage[name]

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""
        if self.log:
            self.log.write(as_json({"time": time.time(), **line}) + "\n")

    def stats(self, times: bool) -> dict[str, Any]:
        """Everything as JSON has it; the arrival times (seconds since the epoch) on request."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("started", "requests", "served", "batch_served", "sent", "in_flight", "most_in_flight")
        }
        found |= {"true": self.true.as_dict(), "batch": self.batch.as_dict()}
        found |= {name: dict(getattr(self, name)) for name in ("said", "faults", "statuses", "paths")}
        seconds = Counter(int(at - self.started) for at in self.times)
        found["arrivals"] = [seconds[second] for second in range(max(seconds, default=-1) + 1)]
        return found | ({"times": self.times} if times else {})
