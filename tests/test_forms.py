"""Forms of files that users bring."""

import gzip
import json
from pathlib import Path

import pytest

from orpo_distill.errors import DataError
from orpo_distill.forms import Form, Side, Text, read_texts
from orpo_distill.records import FinishReason, Message, Pair, Trace, to_json

USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be short."}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def write(folder: Path, *rows: object, name: str = "brought.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(path: Path, form: Form | None = None, side: Side = "chosen") -> list[Text]:
    return list(read_texts(path, form, side))


def said(found: list[Text]) -> list[tuple[object, ...]]:
    return [(one.problem_id, one.text, one.index, one.finish_reason.value, one.completion_tokens) for one in found]


def test_traces_of_a_run(tmp_path: Path) -> None:
    trace = Trace("t", "p1", "teacher", 3, "4", FinishReason.LENGTH, 7, 1, "", "hash")
    found = texts(write(tmp_path, to_json(trace)))
    assert said(found) == [("p1", "4", 3, "length", 1)]
    assert (found[0].policy, found[0].prompt_tokens) == ("teacher", 7)


def test_a_text_or_several_a_problem(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"id": "p1", "text": "a", "finish_reason": "length", "completion_tokens": 9},
        {"id": 2, "texts": ["b", {"text": "c", "finish_reason": "length", "completion_tokens": 4}]},
        {"id": "p3", "texts": ["d", "e"], "completion_tokens": [1, 2], "finish_reason": None},
    )
    assert said(texts(path)) == [
        ("p1", "a", None, "length", 9),
        ("2", "b", None, "stop", None),
        ("2", "c", None, "length", 4),
        ("p3", "d", None, "stop", 1),
        ("p3", "e", None, "stop", 2),
    ]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, ("2 + 2?", "4"), ("2 + 2?", "4")),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, ("2 + 2?", "4"), ("2 + 2?", "5")),
        ({"prompt": "2 + 2?", "chosen": "4"}, ("2 + 2?", "4"), None),
        ({"prompt": [SYSTEM, USER], "completion": [FOUR]}, ("Be short.2 + 2?", "4"), ("Be short.2 + 2?", "4")),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, ("2 + 2?", "4"), ("2 + 2?", "5")),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ("2 + 2?", "4"), ("2 + 2?", "5")),
        ({"prompt": "2 + 2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, ("2 + 2?", "4"), ("2 + 2?", "5")),
        ({"messages": [USER, FOUR]}, ("2 + 2?", "4"), ("2 + 2?", "4")),
        ({"messages": [USER, FOUR], "rejected_response": "5"}, ("2 + 2?", "4"), ("2 + 2?", "5")),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},)
        + (("2 + 2?", "4"),) * 2,
    ],
)
def test_rows_with_a_prompt(
    tmp_path: Path, row: dict[str, object], chosen: tuple[str, str], rejected: tuple[str, str] | None
) -> None:
    def found(side: Side) -> tuple[str, str] | None:
        for one in texts(write(tmp_path, row), side=side):
            prompt = one.prompt if isinstance(one.prompt, str) else "".join(message.content for message in one.prompt)
            return prompt, one.text
        return None

    assert (found("chosen"), found("rejected")) == (chosen, rejected)


def test_pairs_of_a_run_keep_their_problem_their_policies_and_cuts(tmp_path: Path) -> None:
    pair = Pair("p1", (Message("user", "2 + 2?"),), "4", "5 and", "c", "r", "teacher", "student-2", True)
    path = write(tmp_path, to_json(pair))
    good, bad = texts(path)[0], texts(path, side="rejected")[0]
    assert (good.problem_id, good.text, good.policy, good.finish_reason, good.paired) == (
        ("p1", "4", "teacher", "stop", True)
    )
    assert (bad.text, bad.policy, bad.finish_reason) == ("5 and", "student-2", "length")


def batch(custom_id: str, *choices: tuple[str | None, str], status: int = 200) -> dict[str, object]:
    """A line of what OpenAI's batch API sends back."""
    found = [
        {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for number, (text, reason) in enumerate(choices)
    ]
    body = {"id": "x", "object": "chat.completion", "choices": found}
    usage = {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    response = {"status_code": status, "request_id": "r", "body": body | {"usage": usage}}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}


def test_batch_output(tmp_path: Path) -> None:
    """Choices in their order, also if the file has another; tokens only where they are one text's."""
    two = batch("p#1#4", ("a", "stop"), ("b", "length"))
    two["response"]["body"]["choices"].reverse()  # type: ignore[index]
    path = write(
        tmp_path,
        two,
        batch("p2#0", ("c", "stop")),
        batch("plain", (None, "content_filter")),
        batch("p3#0", status=429),
        {"id": "x", "custom_id": "p4#2", "response": None, "error": {"code": "batch_expired", "message": "too late"}},
    )
    assert said(texts(path)) == [
        ("p#1", "a", 4, "stop", None),
        ("p#1", "b", 5, "length", None),
        ("p2", "c", 0, "stop", 8),
        ("plain", "", None, "error", 8),
        ("p3", "", None, "error", None),
        ("p4", "", None, "error", None),
    ]


def test_parquet_and_gzip_hold_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": "p1", "texts": ["a", "b"], "note": None}, {"id": "p2", "texts": ["c"], "note": "x"}]
    plain = write(tmp_path, *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "without.suffix")
    with gzip.open(tmp_path / "z.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    expected = said(texts(plain))
    assert len(expected) == 3
    assert said(texts(tmp_path / "without.suffix")) == expected == said(texts(tmp_path / "z.jsonl.gz"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "output": "4"}, ["question, output", "custom_id"]),
        ({"id": "p1", "text": 4}, ["text", "4"]),
        ({"id": None, "texts": ["a"]}, ["custom_id"]),
        ({"id": 1.5, "text": "a"}, ["id", "1.5"]),
        ({"id": "p1", "text": "a", "finish_reason": "tired"}, ["finish_reason", "tired"]),
        ({"problem_id": "p1"}, ["text"]),
        ({"prompt": 3, "completion": "4"}, ["messages", "3"]),
        ({"prompt": [USER], "completion": [USER]}, ["assistant"]),
        ({"prompt": [{"role": "tool", "content": ""}], "completion": "4"}, ["tool"]),
        ({"messages": []}, ["assistant"]),
        ({"custom_id": "p#0", "method": "POST", "url": "/v1", "body": {}}, ["request"]),
        ({"custom_id": "p#0", "response": {"status_code": 200, "body": {"text": "4"}}}, ["choices"]),
        ({"custom_id": "p#0", "response": "4"}, ["choices"]),
        ("[1]", ["JSON object"]),
        ("{", ["JSON object"]),
    ],
)
def test_malformed_rows_name_their_place(tmp_path: Path, row: object, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        texts(write(tmp_path, row))
    for word in [*words, "brought.jsonl:1", "expected", "found"]:
        assert word in str(caught.value)


def test_files_that_are_no_files_of_texts(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for path, word in ((tmp_path / "none", "none"), (write(tmp_path), "empty"), (tmp_path / "broken.parquet", "Parq")):
        with pytest.raises(DataError, match=word):
            texts(path)
