"""JSON Lines files that users bring to samplers: one object a line, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object with its place, `file:line`. Raises DataError for what cannot be read, with the place."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError(f"{type(found).__name__} {str(found)[:40]!r}")
                yield f"{path}:{number}", found
    except ValueError as error:
        raise DataError(f"{path}:{number}: expected a JSON object, found: {error}; mend or remove the line") from error
    except (OSError, EOFError, zlib.error, RecursionError) as error:
        raise DataError(f"expected JSON Lines at {path}, found: {error}; check the path and the file") from error


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
