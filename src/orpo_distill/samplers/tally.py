"""What a purchase has come to."""

from __future__ import annotations

from time import monotonic

from orpo_distill.ledger import Usage


class Tally:
    """Counts of one purchase, kept by the event loop and read by the progress bar."""

    def __init__(self) -> None:
        self.started = self.last_success = monotonic()
        self.delivered = self.samples = self.calls = self.completion_tokens = self.tokens = 0
        self.money = 0.0
        self.doubtful = 0  # calls whose bill is missing or cannot be right
        self._failing: tuple[float, float] | None = None  # since when, and the seconds of pauses by then

    def silent(self, paused: float) -> float:
        """Seconds since the first failure after the last success, without pauses: `paused` are those so far."""
        self._failing = self._failing or (monotonic(), paused)
        since, paused_then = self._failing
        return monotonic() - since - (paused - paused_then)

    @property
    def failing(self) -> float | None:
        """Seconds since the first failure after the last success, pauses counted; None if there was none."""
        return monotonic() - self._failing[0] if self._failing else None

    def add(self, samples: int, usage: Usage | None, money: float) -> None:
        """Count a reply."""
        if samples:
            self.last_success, self._failing = monotonic(), None
        self.calls += 1
        if usage:
            self.samples += samples
            self.completion_tokens += usage.completion
            self.tokens += usage.tokens
            self.money += money
        else:
            self.doubtful += 1

    def mean_completion(self, most: int) -> float:
        """Tokens that a sample is expected to have."""
        return self.completion_tokens / self.samples if self.samples else float(most)

    def note(self, priced: bool) -> str:
        """In words."""
        minutes = max(monotonic() - self.started, 1e-9) / 60
        spent = f", {self.money:.4g} spent" if priced else ""
        unknown = f", {self.doubtful} calls of unknown cost" if self.doubtful else ""
        return f"{self.calls} calls ({self.calls / minutes:.0f}/min), {self.tokens} tokens{spent}{unknown}"
