"""Ctrl-C and SIGTERM: stop within 30 seconds, keep everything, say how to go on.

A signal raises `Interrupted` wherever the main thread is. Work that is better finished than dropped (a training step
and its checkpoint) runs under `deferred`, which only takes note of the signal, until its patience is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from orpo_distill.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise `Interrupted`. Main thread only."""

    def stop(number: int, _: FrameType | None) -> None:
        _received.append(number)
        raise Interrupted(number)

    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        _received.clear()
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def check() -> None:
    """Raise Interrupted if a signal came. Python loses what a handler raises inside `__del__` and the like."""
    if _received:
        raise Interrupted(_received[0])


class Stop:
    """Whether a signal has asked to stop."""

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """True once a signal came."""
        return self.signal_number is not None


@contextmanager
def deferred(patience: float = 20.0) -> Iterator[Stop]:
    """`with deferred() as stop:` check `stop.requested` where it is safe to stop, then leave the block.

    Raises Interrupted at the block's end if a signal came, or inside the block `patience` seconds after the signal.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread, as Python has it
        yield stop
        return

    def note(number: int, _: FrameType | None) -> None:
        if stop.signal_number is None:
            stop.signal_number = number
            signal.setitimer(signal.ITIMER_REAL, patience)

    def give_up(_: int, __: FrameType | None) -> None:
        raise Interrupted(stop.signal_number or signal.SIGTERM)

    numbers = (*SIGNALS, signal.SIGALRM)
    before = [signal.signal(n, h) for n, h in zip(numbers, (note, note, give_up), strict=True)]
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if stop.signal_number is not None:
        raise Interrupted(stop.signal_number)
