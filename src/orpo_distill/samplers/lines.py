"""JSON Lines files that users bring to samplers: one object a line, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")


def read_objects(path: Path, skip: Callable[[DataError], None] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object with its place, `file:line`. Raises DataError for what cannot be read, with the place.

    With `skip` a line that is no object is passed over; `skip` is told.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    found = _object(place, line)
                except DataError as error:
                    if skip is None:
                        raise
                    skip(error)
                else:
                    yield place, found
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"expected JSON Lines at {path}, found: {error}; check the path and the file") from error


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected a JSON object, found: {error}; mend or remove the line") from error
    if not isinstance(found, dict):
        what = f"{type(found).__name__} {str(found)[:40]!r}"
        raise DataError(f"{place}: expected a JSON object, found: {what}; mend or remove the line")
    return found


def find_file(path: Path) -> Path:
    """The file itself, or the only JSON Lines file of a folder. Raises DataError."""
    path = path.expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise DataError(f"expected one {' or '.join(SUFFIXES)} file in {path}, found {names}; name the file")
        return files[0]
    if not path.is_file():
        raise DataError(f"expected a {' or '.join(SUFFIXES)} file at {path}, found nothing; check the path")
    return path


def text_list(place: str, found: dict[str, Any], key: str) -> tuple[str, list[Any]]:
    """The `id` and the list under `key` of a line. Raises DataError."""
    name, items = found.get("id"), found.get(key)
    if not isinstance(name, str) or not isinstance(items, list):
        raise DataError(f'{place}: expected {{"id": text, "{key}": [...]}}, found the keys {", ".join(found)}')
    return name, items
