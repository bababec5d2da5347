"""Rows come whole and in order, or with a message that names the file and the line."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from orpo_distill.errors import ConfigError, DataError
from orpo_distill.tasks.rows import Row, hub_rows, read_rows, split_files

LINES = '{"question": "a"}\n\n{"question": "b\u2028"}\n'
FIELDS = [{"question": "a"}, {"question": "b\u2028"}]
CUT_SHORT = gzip.compress(b"{}\n" * 1000, mtime=0)[:-12]


def fields(rows: list[Row]) -> list[object]:
    return [row.fields for row in rows]


def test_plain_gzip_and_parquet_hold_the_same(tmp_path: Path) -> None:
    """A line separator inside a string does not end the line; blank lines and a byte order mark are no rows."""
    (tmp_path / "a.jsonl").write_text("\ufeff" + LINES, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.replace("\n", "\r\n").encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FIELDS), tmp_path / "c.parquet")
    files = split_files(tmp_path)
    assert {split: fields(read_rows(path)) for split, path in files.items()} == dict.fromkeys("abc", FIELDS)


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "a"}\n{"question": ', r"a\.jsonl:2: expected a JSON object, found Expecting value"),
        ("a.jsonl", b"{}\n[1]\n", r"a\.jsonl:2: expected a JSON object, found a list"),
        ("a.jsonl", b"{}\n\xff\xfe\n", r"a\.jsonl:2: expected UTF-8"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: expected at least one problem, found none"),
        ("a.jsonl.gz", b"{}\n", r"a\.jsonl\.gz: expected a gzip file"),
        ("a.jsonl.gz", CUT_SHORT, r"a\.jsonl\.gz: expected a gzip file, found it damaged"),
        ("a.parquet", b"{}\n", r"a\.parquet: expected a parquet file"),
        ("a.csv", b"question\n", r"expected a file that ends in \.jsonl, \.jsonl\.gz, \.parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such file or folder"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(DataError, match="in the folder"):
        split_files(tmp_path)


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="expected one file of split 'train'"):
        split_files(tmp_path)


def test_the_hub_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` takes a folder where it takes a hub id, so this is the real path without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"question": "a", "answer": "1"}\n' * 2)
    rows = hub_rows(str(folder), None)
    assert list(rows) == ["train", "test"]
    assert rows["test"] == [Row(f"{folder} test row {n}", {"question": "a", "answer": "1"}) for n in (1, 2)]


def test_a_hub_data_set_that_cannot_be_had_points_to_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"on the Hugging Face hub, found: .*give the task a local `path`"):
        hub_rows(str(tmp_path / "nowhere"), None)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """None in `sys.modules` is how Python itself says that a module is not to be found."""
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "train.parquet"
    path.touch()
    with pytest.raises(ConfigError, match=rf"the package {package}, .*orpo-distill\[hub\]"):
        hub_rows("openai/gsm8k", "main") if package == "datasets" else read_rows(path)
