"""What servers answer: every form of a choice, thinking, counts that cannot be right, and nonsense of any kind."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_distill.ledger import Usage
from orpo_distill.records import FinishReason
from orpo_distill.samplers.replies import HIDDEN, Declined, Malformed, Reply, Thinking, read_choice, read_reply, shares

MODES: tuple[Thinking, ...] = ("keep", "strip", "answer_only")
STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR
KEPT = "<think>\nTwo and two.\n</think>\n\nFour."


def chat(content: Any = None, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}


def plain(text: Any, finish: Any = "stop") -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def reply(*choices: Any, usage: Any = None, samples: int | None = None) -> Reply:
    """A reply with these choices to a request for as many, of at most 50 tokens each and 100 of the prompt."""
    data = json.dumps({"id": "x", "choices": choices, "usage": usage}).encode()
    return read_reply(data, len(choices) if samples is None else samples, 100, 50)


def usage_of(data: Any, *choices: Any, samples: int | None = None) -> Usage | None:
    return reply(*(choices or (chat("Four."),)), usage=data, samples=samples).usage


def read(choice: dict[str, Any], thinking: Thinking = "keep") -> tuple[str, FinishReason]:
    """Through a reply and back, as a text goes."""
    (kept,) = reply(choice).choices
    return read_choice(kept, thinking)


@pytest.mark.parametrize("thinking", MODES)
@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (chat("Four."), "Four."),
        (chat(" Four.\n"), " Four.\n"),
        (plain("Four.\n"), "Four.\n"),
        (chat("Four.", reasoning_content=None), "Four."),
        (chat("Four.", reasoning_content=""), "Four."),
        (chat("Four.", reasoning=""), "Four."),
        (chat("Four.", reasoning={"tokens": 5}), "Four."),
        (chat("<think>\n\n</think>\n\nFour."), "Four."),  # what Qwen3 writes when it does not think
        (chat("I <think> so."), "I <think> so."),
        (chat(None, tool_calls=[{"id": "1", "function": {"name": "add", "arguments": "{}"}}]), ""),
        (chat(None), ""),
        ({"message": {"role": "assistant"}, "finish_reason": "stop"}, ""),
        (chat({"text": "Four."}), ""),
        (chat(7), ""),
        (plain(""), ""),
        ({**plain("Four."), "message": None}, "Four."),
        (chat("Four.", finish=None), "Four."),
        (chat("Four.", finish="tool_calls"), "Four."),
        (chat("Four.", finish=["stop"]), "Four."),
        (chat("Four.", finish={"length": 1}), "Four."),
    ],
)
def test_texts_without_thinking_are_taken_as_they_are(choice: dict[str, Any], text: str, thinking: Thinking) -> None:
    assert read(choice, thinking) == (text, STOP)


@pytest.mark.parametrize("finish", ["length", "max_tokens"])
def test_cut_texts_are_known(finish: str) -> None:
    assert read(chat("Fo", finish)) == ("Fo", LENGTH)
    assert read(plain("Fo", finish)) == ("Fo", LENGTH)
    assert read(chat("", finish)) == ("", LENGTH)


@pytest.mark.parametrize(
    "choice",
    [
        chat("Four.", reasoning_content="Two and two."),
        chat("Four.", reasoning="Two and two."),
        chat("Four.", reasoning_content=None, reasoning="Two and two."),
        chat("\n\nFour.", reasoning_content="\nTwo and two.\n"),
        chat("<think>\nTwo and two.\n</think>\n\nFour."),
        chat("<think>Two and two.</think>Four."),
        chat("Two and two.\n</think>\n\nFour."),  # the template has opened it in the prompt
        plain("<think>\nTwo and two.\n</think>\n\nFour."),
        plain("\nTwo and two.</think> Four."),
    ],
)
def test_thinking_is_kept_stripped_of_its_tags_or_left_out(choice: dict[str, Any]) -> None:
    found = [read(choice, mode) for mode in MODES]
    assert found == [(KEPT, STOP), ("Two and two.\n\nFour.", STOP), ("Four.", STOP)]


@pytest.mark.parametrize(
    ("choice", "keep"),
    [
        (chat("", "length", reasoning_content="Two and"), "<think>\nTwo and\n"),
        (chat(None, "length", reasoning="Two and"), "<think>\nTwo and\n"),
        (chat("<think>\nTwo and", "length"), "<think>\nTwo and\n"),
        (plain("\n<think>Two and", "length"), "<think>\nTwo and\n"),
        (chat("<think>\nTwo and\n</think>\n\n", "length"), "<think>\nTwo and\n</think>\n\n"),
    ],
)
def test_thinking_that_was_cut_has_no_answer(choice: dict[str, Any], keep: str) -> None:
    """Its tag is closed only if the model had closed it."""
    assert [read(choice, mode) for mode in MODES] == [(keep, LENGTH), ("Two and", LENGTH), ("", LENGTH)]


def test_an_answer_that_was_cut_behind_its_thinking() -> None:
    choice = chat("<think>\nTwo and two.\n</think>\n\nFo", "length")
    assert [read(choice, mode)[0] for mode in MODES] == [KEPT[:-3], "Two and two.\n\nFo", "Fo"]
    assert {read(choice, mode)[1] for mode in MODES} == {LENGTH}


def test_nothing_but_thinking_that_ended_by_itself() -> None:
    assert read(chat(None, reasoning_content="Two and two.")) == ("<think>\nTwo and two.\n", STOP)
    assert read(chat(None, reasoning_content="Two and two."), "answer_only") == ("", STOP)


@pytest.mark.parametrize("choice", [chat("Fo", "content_filter"), chat(None, "content_filter"), plain("", "refusal")])
@pytest.mark.parametrize("thinking", MODES)
def test_what_a_filter_cut_is_no_text(choice: dict[str, Any], thinking: Thinking) -> None:
    """As in texts that are imported (`forms.py`)."""
    assert read(choice, thinking) == ("", ERROR)


def test_choices_are_kept_as_they_came_and_no_more_than_asked_for() -> None:
    first, second = chat("1é", "stop", audio=None), plain("2")
    found = reply(first, {"index": 3}, second, chat("3"), samples=2)
    assert [json.loads(choice) for choice in found.choices] == [first, second]
    assert "é" in found.choices[0]
    assert reply(samples=4).choices == ()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\x1b[31m", "\u2028\u0085", "😀", '"\\'])
def test_any_text_can_be_stored(text: str) -> None:
    (kept,) = reply(chat(text)).choices
    assert kept.encode()
    assert read_choice(kept, "keep") == (text, STOP)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"[]", b"7", b"{}", b"<html>502</html>", b'{"choices": [', b"\xff\xfe", b'{"choices": null}'),
        *(b'{"choices": {}}', b'{"choices": ["Four."]}', b'{"error": {}}', b"1" * 5000, b"[" * 100_000),
        b'{"choices": [{"message": {"content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}]}",
    ],
)
def test_what_is_no_reply_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(Malformed, match=r"^expected (JSON|a list of choices)$"):
        read_reply(content, 1, 10, 10)


def test_usage_with_and_without_details() -> None:
    counts = {"prompt_tokens": 7, "completion_tokens": 20, "total_tokens": 27}
    assert usage_of(counts) == Usage(7, 20)
    details = {
        "prompt_tokens_details": {"cached_tokens": 6},
        "completion_tokens_details": {"reasoning_tokens": 11, "x": 1},
    }
    assert usage_of(counts | details) == Usage(7, 20, 6, 11)
    odd = {"prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": None}}
    assert usage_of(counts | odd) == Usage(7, 20)
    beyond = {"prompt_tokens_details": {"cached_tokens": 99}, "completion_tokens_details": {"reasoning_tokens": 99}}
    assert usage_of(counts | beyond) == Usage(7, 20, 7, 20)
    negative = {"prompt_tokens_details": {"cached_tokens": -1}, "completion_tokens_details": [5]}
    assert usage_of(counts | negative) == Usage(7, 20)


@pytest.mark.parametrize(
    "counts",
    [
        *(None, [], "20", 20, {}, {"prompt_tokens": 7, "completion_tokens": None}, {"completion_tokens": 20}),
        *({"prompt_tokens": 7}, {"prompt_tokens": None, "completion_tokens": 20}),
    ],
)
def test_missing_counts_are_not_made_up(counts: Any) -> None:
    assert usage_of(counts) is None


@pytest.mark.parametrize("prompt", [0, -1, 100 + HIDDEN, 10**9, "7", 7.0, True])
def test_implausible_prompt_counts(prompt: Any) -> None:
    assert usage_of({"prompt_tokens": prompt, "completion_tokens": 20}) is None
    assert usage_of({"prompt_tokens": 100, "completion_tokens": 20}) == Usage(100, 20)


@pytest.mark.parametrize("completion", [0, -1, 51, 10**9, "20", 20.5, False])
def test_implausible_completion_counts(completion: Any) -> None:
    assert usage_of({"prompt_tokens": 7, "completion_tokens": completion}) is None
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 50}) == Usage(7, 50)


def test_more_choices_may_have_more_tokens() -> None:
    choices = [chat("Four.")] * 3
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 150}, *choices) == Usage(7, 150)
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 151}, *choices) is None


def test_counts_far_below_what_came_are_not_believed() -> None:
    """As of llama.cpp's server, which counts the first choice alone: 28 tokens for 4 x 100 letters."""
    long = "The answer is, as everybody knows, to be found in the book on the shelf behind the door of the room."
    assert len(long) == 100
    choices = [chat(long)] * 4
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 28}, *choices) is None
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 112}, *choices) == Usage(7, 112)
    thinking = chat("Four.", reasoning_content=long * 4)
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 2}, thinking) is None


def test_nothing_came_and_nothing_was_counted() -> None:
    assert usage_of({"prompt_tokens": 7, "completion_tokens": 0}, chat(None)) == Usage(7, 0)
    assert reply(samples=1, usage={"prompt_tokens": 7, "completion_tokens": 0}).usage == Usage(7, 0)


FIELDS = ("choices", "usage", "message", "text", "content", "finish_reason", "reasoning", "reasoning_content")
FIELDS += ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", "index")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["stop", "length"])
KEYS = st.sampled_from(FIELDS) | st.text(max_size=3)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
MESSAGES = st.fixed_dictionaries({}, optional={"content": VALUES, "reasoning": VALUES, "reasoning_content": VALUES})
CHOICES = st.fixed_dictionaries({}, optional={"message": MESSAGES | VALUES, "text": VALUES, "finish_reason": VALUES})
REPLIES = st.fixed_dictionaries({"choices": st.lists(CHOICES | VALUES, max_size=4) | VALUES, "usage": VALUES})


@settings(max_examples=400, deadline=None)
@given(value=REPLIES | VALUES, samples=st.integers(1, 4), escaped=st.booleans())
def test_any_json_is_malformed_or_a_reply_whose_texts_can_be_read(value: Any, samples: int, escaped: bool) -> None:
    content = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    try:
        found = read_reply(content, samples, 100, 50)
    except Malformed:
        return
    assert len(found.choices) <= samples
    assert found.usage is None or 0 <= found.usage.completion <= 50 * samples
    for choice in found.choices:
        assert choice.encode()
        for thinking in MODES:
            text, finish = read_choice(choice, thinking)
            assert isinstance(text, str) and isinstance(finish, FinishReason)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_malformed(content: bytes) -> None:
    with pytest.raises(Malformed):
        read_reply(content, 1, 100, 50)


@given(choices=st.lists(st.text(min_size=2), max_size=9), tokens=st.integers(0, 10**7))
def test_shares_add_up_exactly(choices: list[str], tokens: int) -> None:
    found = shares(choices, tokens)
    assert len(found) == len(choices)
    counts = [share for share in found if share is not None]
    assert len(counts) == len(found)
    assert all(count >= 0 for count in counts)
    assert sum(counts) == (tokens if choices else 0)


def test_shares_follow_the_length() -> None:
    assert shares(["x" * 10, "x" * 30, "x" * 60], 50) == [5, 15, 30]
    assert shares(["x", "y"], None) == [None, None]
    assert shares([], 5) == []


@pytest.mark.parametrize(
    ("thinking", "text"), [("keep", "<think>\nA B\n</think>\n\nC D"), ("strip", "A B\n\nC D"), ("answer_only", "C D")]
)
def test_content_in_parts(thinking: Thinking, text: str) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "A "}, {"type": "text", "text": "B"}]},
        {"type": "text", "text": "C "},
        {"type": "text", "text": "D"},
        {"type": "image_url", "image_url": {}},
        "odd",
    ]
    choice = json.dumps({"message": {"content": parts}, "finish_reason": "stop"})
    assert read_choice(choice, thinking) == (text, FinishReason.STOP)


@pytest.mark.parametrize(
    ("data", "status", "kinds"),
    [
        ({"error": {"message": "No luck", "code": 502}}, 502, set()),
        ({"error": {"message": "No luck", "code": "429", "type": "requests"}, "choices": []}, 429, {"429", "requests"}),
        ({"error": "No luck", "choices": None}, None, set()),
        ({"error": {"message": "No luck", "code": 7}}, None, set()),
        ({"error": {"message": "No luck", "code": "insufficient_quota"}}, None, {"insufficient_quota"}),
        ({"object": "error", "message": "No luck", "code": 400}, 400, set()),
    ],
)
def test_an_error_where_the_choices_should_be(data: dict[str, Any], status: int | None, kinds: set[str]) -> None:
    with pytest.raises(Declined) as caught:
        read_reply(json.dumps(data).encode(), 1, 100, 50)
    error = caught.value
    assert (error.words, error.status, error.kinds, error.usage, error.billed) == (
        "No luck",
        status,
        kinds,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("usage", "believed", "billed"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3}, Usage(9, 3), False),
        ({"prompt_tokens": 9, "completion_tokens": 0}, Usage(9, 0), False),
        ({"prompt_tokens": 0, "completion_tokens": 0}, None, False),
        ({"prompt_tokens": 9, "completion_tokens": 10**9}, None, True),
        (None, None, False),
    ],
)
def test_what_a_reply_with_an_error_was_billed(usage: Any, believed: Usage | None, billed: bool) -> None:
    with pytest.raises(Declined) as caught:
        read_reply(json.dumps({"error": {"message": "x"}, "usage": usage}).encode(), 1, 100, 50)
    assert (caught.value.usage, caught.value.billed) == (believed, billed)


def test_choices_beside_an_error_are_kept() -> None:
    data = {"error": {"message": "x"}, "choices": [chat("Four.")]}
    assert len(read_reply(json.dumps(data).encode(), 1, 100, 50).choices) == 1
