"""Progress for people: a bar on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[int], None]
Note = Callable[[], str]  # what is to be said just now; "" for nothing
SECONDS_BETWEEN_LINES = 10.0
LEAST_SHARE = 0.03  # of the work that is done before the time left is guessed


def say(text: str) -> None:
    """A message to the user. Control characters, which may come from a model or a server, are shown, not obeyed."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    print(plain, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, done: int = 0, *notes: Note | None) -> Iterator[Advance]:
    """`with progress("teacher", 2400) as advance:` then `advance(n)` for each n items done; `notes` say more."""
    if sys.stderr.isatty():
        with _bar(label, total, done, notes) as advance:
            yield advance
        return
    started = last = time.monotonic()
    count = done

    def advance_plain(n: int = 1) -> None:
        nonlocal count, last
        count += n
        if (now := time.monotonic()) - last >= SECONDS_BETWEEN_LINES:
            last = now
            share = (count - done) / max(1, total - done)
            left = (now - started) * (1 / share - 1) if share > LEAST_SHARE else None
            more = [f"about {left:.0f} s left"] if left is not None else []
            say(f"  {label}: " + ", ".join([f"{count}/{total}", *more, *_said(notes)]))

    yield advance_plain


def _said(notes: Sequence[Note | None]) -> list[str]:
    return [words for note in notes if note is not None and (words := note())]


@contextmanager
def _bar(label: str, total: int, done: int, notes: Sequence[Note | None]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(n: int = 1) -> None:
            bar.update(task, advance=n, note=", ".join(_said(notes)))

        yield advance
