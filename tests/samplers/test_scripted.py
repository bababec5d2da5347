"""Replies written in advance."""

import json
from pathlib import Path

import pytest

from orpo_distill.component import method_options
from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request, Sampler
from orpo_distill.samplers.scripted import Reply, Scripted


def play(sampler: Scripted, *asked: tuple[str, int]) -> list[Completion]:
    requests = [Request(problem, index, (Message("user", "How many?"),), seed=0) for problem, index in asked]
    with sampler.open("model") as generate:
        return list(generate(requests, Decoding()))


def test_replies_come_by_index_and_begin_again() -> None:
    sampler = Scripted(replies={"p": ("one", "two two")}, default=("else",))
    found = play(sampler, ("p", 0), ("p", 1), ("p", 2), ("q", 5))
    assert [completion.text for completion in found] == ["one", "two two", "one", "else"]
    assert (found[1].prompt_tokens, found[1].completion_tokens) == (2, 2)


def test_no_reply_is_a_failed_sample() -> None:
    (completion,) = play(Scripted(), ("p", 0))
    assert (completion.finish_reason, completion.error) == (FinishReason.ERROR, "no scripted reply")


def test_replies_from_a_file_and_other_endings(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps({"id": "p", "texts": ["from file"]}) + "\n")
    spec = {"type": "scripted", "path": str(path), "replies": {"q": [{"text": "cut", "finish_reason": "length"}]}}
    sampler = Sampler.model_validate(spec)
    assert isinstance(sampler, Scripted)
    assert sampler.replies == {"q": (Reply(text="cut", finish_reason=FinishReason.LENGTH),)}
    file, cut = play(sampler, ("p", 3), ("q", 0))
    assert (file.text, file.finish_reason) == ("from file", FinishReason.STOP)
    assert (cut.text, cut.finish_reason) == ("cut", FinishReason.LENGTH)
    assert "delay" not in method_options(sampler)


def test_a_scripted_failure_has_no_text() -> None:
    sampler = Scripted(default=(Reply(text="x", finish_reason=FinishReason.ERROR),))
    (completion,) = play(sampler, ("p", 0))
    assert (completion.text, completion.error) == ("", "scripted failure")


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"id": "p", "texts": [3]}\n')
    with pytest.raises(DataError, match=f"{path}:1: expected texts, or objects"):
        play(Scripted(path=path))
