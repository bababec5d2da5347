"""Replies that were paid for and that the ledger's file cannot take: written down beside it until it can."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from orpo_distill.errors import RunError
from orpo_distill.ledger import Ledger, Operation, Settlement, Usage
from orpo_distill.progress import say
from orpo_distill.records import atomic_file

MARK = "-unsaved-"  # between the ledger's name and the session's, in the name of such a file


def write_down(settlements: Iterable[Settlement], ledger: Path, session: str) -> Path | None:
    """Write all of them to one file, beside the ledger or in the folder of temporary files; None if neither works."""
    lines = [json.dumps(asdict(one)) + "\n" for one in settlements]
    for folder in (ledger.parent, Path(tempfile.gettempdir())):
        path = folder / f"{ledger.name}{MARK}{session}.jsonl"
        try:
            with atomic_file(path) as file:
                file.writelines(line.encode() for line in lines)
        except OSError:
            continue
        return path
    return None


def waiting(ledger: Path) -> list[Path]:
    """The files of such replies beside a ledger."""
    return sorted(path for path in ledger.parent.glob("*.jsonl") if path.name.startswith(ledger.name + MARK))


def take_in(ledger: Ledger) -> int:
    """Record what stands beside the ledger, and remove it; how many replies there were. Raises RunError."""
    count = 0
    for path in waiting(ledger.path):
        session = path.stem.removeprefix(ledger.path.name + MARK)
        try:
            found = [_settlement(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:  # another process has just taken it in
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"expected replies that a ledger could not take in {path}, found: {error!r}; mend the file or move it "
                "away: the calls it belongs to count as unknown"
            ) from error
        ledger.transaction([_recorded(settlement, session) for settlement in found])
        path.unlink(missing_ok=True)
        count += len(found)
    if count:
        say(f"  {count} replies that could not be saved before are in the ledger now")
    return count


def _recorded(settlement: Settlement, session: str) -> Operation[None]:
    """The operation that records a reply if its attempt is that session's: in another file its number means another."""

    def record(ledger: Ledger) -> None:
        row = ledger.connection.execute("SELECT session FROM attempts WHERE id = ?", (settlement.attempt,))
        if row.fetchone() == (session,):
            settlement(ledger)

    return record


def _settlement(line: str) -> Settlement:
    data = json.loads(line)
    usage = data["usage"]
    return Settlement(
        int(data["attempt"]),
        tuple(map(str, data["choices"])),
        tuple(data["shares"]),
        None if usage is None else Usage(**usage),
        float(data["money"]),
    )
