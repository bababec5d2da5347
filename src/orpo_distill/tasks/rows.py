"""Rows of a data set, as they stand on disk or on the Hugging Face hub: a mapping each, with the place it stands at."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError, missing_extra

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands, for messages: `train.jsonl:3`."""

    where: str
    fields: Mapping[str, Any]


def split_files(folder: Path) -> dict[str, Path]:
    """The data files of a folder by split name, sorted: `train.jsonl.gz` holds `train`. Raises DataError."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None or not path.is_file():
            continue
        split = path.name.removesuffix(suffix)
        if split in files:
            raise DataError(f"expected one file of split {split!r}, found {files[split]} and {path}; remove one")
        files[split] = path
    if not files:
        raise DataError(f"expected <split>.jsonl, .jsonl.gz or .parquet in the folder {folder}, found none")
    return files


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, in order; blank lines are skipped. Raises DataError with the line's number."""
    if not path.is_file():
        raise DataError(f"expected a data set at {path}, found no such file or folder; check `path`")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"expected a file that ends in {', '.join(SUFFIXES)}, found {path}")
    rows = list(_parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path))
    if not rows:
        raise DataError(f"{path}: expected at least one problem, found none")
    return rows


def hub_rows(hub_id: str, config: str | None) -> dict[str, list[Row]]:
    """Every split of a hub data set (or of a folder laid out like one), through `datasets`.

    Raises ConfigError if `datasets` is not installed and DataError if the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "hub") from error
    try:
        splits = datasets.load_dataset(hub_id, config)
        return {
            str(split): [Row(f"{hub_id} {split} row {number}", row) for number, row in enumerate(rows, start=1)]
            for split, rows in splits.items()
        }
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"expected the data set {hub_id!r} on the Hugging Face hub, found: {reason}; "
            "without a network give the task a local `path`"
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield Row(f"{path}:{number}", _json_object(text))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected a gzip file, found it damaged after line {number}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, found: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: expected UTF-8, found {error}") from error
    except ValueError as error:
        raise DataError(f"{path}:{number}: expected a JSON object, found {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "hub") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a parquet file, found: {error}") from error
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{path} row {number}", fields)
