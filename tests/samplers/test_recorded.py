"""Traces a user already owns."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request, Sampler
from orpo_distill.samplers.recorded import Recorded, with_final_line

SHARED = Path(__file__).parents[3] / "shared" / "data" / "teacher_traces"


def trace(text: str, answer: str | None = None, *flags: str) -> dict[str, Any]:
    return {"text": text, "answer": answer, "correct": None, "via": None, **({"flags": list(flags)} if flags else {})}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def play(sampler: Recorded, *asked: tuple[str, int]) -> list[Completion]:
    requests = [Request(problem, index, (Message("user", "?"),), seed=0) for problem, index in asked]
    with sampler.open("gpt-3.5-turbo") as generate:
        return list(generate(requests, Decoding()))


@pytest.mark.parametrize("name", ["traces.jsonl", "traces.jsonl.gz"])
def test_sample_i_is_the_ith_trace_without_flags(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name,
        {"id": "p", "traces": [trace("a"), trace("b", None, "refers_to_prompt"), trace("c", "D", "other")]},
    )
    for place in (path, tmp_path):  # a folder with one such file is as good
        found = play(Recorded(path=place), ("p", 0), ("p", 1), ("p", 2), ("q", 0))
        assert [completion.text for completion in found] == ["a", "c", "", ""]
        assert [completion.error for completion in found] == ["", "", *["no recorded trace"] * 2]
        assert found[0].finish_reason is FinishReason.STOP and found[2].finish_reason is FinishReason.ERROR
    assert [one.text for one in play(Recorded(path=path, drop_flags=()), ("p", 1), ("p", 2))] == ["b", "c"]


def test_how_many_traces_were_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flagged = trace("b", None, "mentions_given_answer")
    play(Recorded(path=write(tmp_path / "t.jsonl", {"id": "p", "traces": [trace("a"), flagged]})))
    assert "1 traces of 1 problems, 1 left out for their flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("So it is plants.", "D", "So it is plants.\nThe answer is (D)."),
        ("So it is plants.\n", "no", "So it is plants.\nThe answer is no."),
        ("Well.\nThe answer is (D).", "D", "Well.\nThe answer is (D)."),
        ("The answer is (B). Wait, no.\nIt is A", "A", "The answer is (B). Wait, no.\nIt is A\nThe answer is (A)."),
        ("It is 12", "12", "It is 12\nThe answer is 12."),
        ("", "ABC", "\nThe answer is ABC."),
    ],
)
def test_a_final_line_is_appended(text: str, answer: str, expected: str) -> None:
    assert with_final_line(text, answer) == expected


@given(st.text(), st.text(min_size=1))
def test_a_final_line_is_appended_once(text: str, answer: str) -> None:
    once = with_final_line(text, answer)
    if "\n" not in answer and "\r" not in answer:
        assert with_final_line(once, answer) == once.rstrip()


def test_traces_without_an_answer_stay_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"id": "p", "traces": [trace("Hm."), trace("Yes.", "yes")]})
    found = play(Recorded(path=path, final_line="append"), ("p", 0), ("p", 1))
    assert [completion.text for completion in found] == ["Hm.", "Yes.\nThe answer is yes."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"id": "p"}', 'expected {"id": text, "traces": [...]}'),
        ('{"id": 3, "traces": []}', 'expected {"id": text, "traces": [...]}'),
        ('{"id": "p", "traces": [{"answer": "A"}]}', "expected traces like"),
        ('{"id": "a", "traces": []}', "expected each id once"),
        ('{"id": "p", "traces": [{"text": "x", "flags": "cut"}]}', "expected flags as a list of names, found 'cut'"),
        ('{"id": "p", "traces": [{"text": "x", "answer": 3}]}', "expected an answer that is text or null"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "a", "traces": []}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        play(Recorded(path=path, final_line="append"))
    assert str(caught.value).startswith(f"{path}:2: {message}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing; check the path"):
        play(Recorded(path=tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="found none; name the file"):
        play(Recorded(path=tmp_path))
    write(tmp_path / "a.jsonl")
    damaged = write(tmp_path / "b.jsonl.gz", {"id": "p", "traces": []})
    with pytest.raises(DataError, match=r"found a\.jsonl, b\.jsonl\.gz; name the file"):
        play(Recorded(path=tmp_path))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(DataError, match="expected JSON Lines at"):
        play(Recorded(path=damaged))
    damaged.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="expected JSON Lines at"):
        play(Recorded(path=damaged))


def test_it_has_a_short_name() -> None:
    sampler = Sampler.model_validate({"type": "recorded", "path": "traces"})
    assert sampler == Recorded(path=Path("traces"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["medqa_usmle", "openbookqa", "strategyqa"])
def test_the_public_traces_load(name: str) -> None:
    texts = Recorded(path=SHARED / name, final_line="append")._read()
    assert len(texts) > 500
    assert max(map(len, texts.values())) >= 3
