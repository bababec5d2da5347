"""Says on the screen that nothing comes back: after some seconds of failures, or a minute without any reply."""

from __future__ import annotations

import asyncio
from time import monotonic

from orpo_distill.progress import say
from orpo_distill.samplers.sending import Sender

LOOK = 0.5  # seconds between looks
FAILING, WAITING = 10.0, 60.0  # seconds of failures, or without a reply, before something is said
SAID_EVERY = 60.0  # seconds
NEVER = float("-inf")


class Silence:
    """Watches a sender. `failure` is the last one, in words."""

    def __init__(self, sender: Sender, where: str, patience: float) -> None:
        self._sender, self._where, self._patience = sender, where, patience
        self._said = NEVER
        self.failure = ""

    async def watch(self) -> None:
        """Look until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK)
            words = self._words()
            if not words:
                self._said = NEVER
            elif monotonic() - self._said >= SAID_EVERY:
                self._said = monotonic()
                say(f"  {words}")

    def _words(self) -> str:
        """What is to be said, "" while all is well."""
        tally, sender = self._sender.tally, self._sender
        if (seconds := tally.failing) is not None:
            if seconds < FAILING:
                return ""
            pause = sender.limiter.pausing
            goes_on = f"it asks to wait {pause:.0f} s more" if pause else f"tried for {self._patience:g} s at least"
            return f"no success with {self._where} for {seconds:.0f} s, the last: {self.failure}; {goes_on}"
        seconds = monotonic() - max(tally.last_success, sender.last_sent)
        if sender.open and seconds >= WAITING:
            return f"{sender.open} requests under way, no reply for {seconds:.0f} s"
        return ""
