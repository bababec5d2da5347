"""Records survive the disk: any text, torn lines, crashes between write and rename."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.errors import DataError
from orpo_distill.records import (
    FinishReason,
    JsonlAppender,
    Message,
    Outcome,
    Pair,
    Problem,
    Trace,
    Verdict,
    atomic_file,
    derive_seed,
    from_json,
    read_jsonl,
    repair_torn_line,
    stable_hash,
    to_json,
    write_jsonl,
)

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and control characters too


@given(ANY_TEXT, st.sampled_from(FinishReason))
def test_any_text_a_model_writes_comes_back_from_one_line(text: str, reason: FinishReason) -> None:
    import json

    trace = Trace("id", "p", "teacher", 0, text, reason)
    line = to_json(trace)
    assert "\n" not in line
    assert from_json(Trace, json.loads(line.encode())) == trace


def test_every_record_comes_back(tmp_path: Path) -> None:
    records = [
        Problem("p", "Which?", "B", ("oak", "plum")),
        Verdict("t", Outcome.AMBIGUOUS, None, "two answers"),
        Pair("p", (Message("user", "Which?"),), "a", "b", "c", "d", "teacher", "student-0"),
    ]
    for record in records:
        write_jsonl(tmp_path / "x.jsonl", [record, record])
        assert list(read_jsonl(tmp_path / "x.jsonl", type(record))) == [record, record]


def test_a_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "1", "question": "q", "answer": "a"}\n{"id": "2"}\n')
    with pytest.raises(DataError, match=r"problems\.jsonl:2: expected a Problem"):
        list(read_jsonl(path, Problem))


def test_appending_tells_where_each_line_begins(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    places = []
    for torn in (b"", b"torn"):
        with path.open("ab") as file:
            file.write(torn)
        with JsonlAppender(path) as file:
            places += [file.append(Trace(str(i), "p", "teacher", i, "é" * i)) for i in range(3)]
    lines = path.read_bytes().splitlines(keepends=True)
    assert places == [sum(map(len, lines[:i])) for i in range(6)]


@pytest.mark.parametrize("torn", [b'{"id": "t', b"x" * 200_000])
def test_a_torn_last_line_is_cut_and_appending_goes_on(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "traces.jsonl"
    first, second = (Trace(str(i), "p", "teacher", i, "text") for i in range(2))
    path.write_bytes((to_json(first) + "\n").encode() + torn)
    with JsonlAppender(path) as file:
        file.append(second)
    assert list(read_jsonl(path, Trace)) == [first, second]


def test_a_whole_file_is_not_touched_by_repair(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\ntwo\n")
    assert not repair_torn_line(path)
    assert path.read_bytes() == b"one\ntwo\n"
    assert not repair_torn_line(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_hashes_and_seeds_are_the_same_on_every_machine() -> None:
    """sha256 of '["a", 1]' computed with `printf '["a", 1]' | sha256sum`."""
    assert stable_hash("a", 1) == "2657442bb4a48d62f780ea60395ef2d203da2669fa41cdc1f4f080b25ddb1a6a"
    assert derive_seed("a", 1) == int("2657442bb4a48d62f780ea60395ef2d203da2669fa41cdc1f4f080b25ddb1a6a"[:16], 16) >> 1
