"""What an OpenAI-compatible server answers: its choices and its usage, with distrust.

A choice is kept in the ledger as it came. Its text, and what of a reasoning model's thinking belongs to it, is read
from there, so that `thinking` may be changed without asking again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orpo_distill.ledger import Bought, Usage
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Request

Thinking = Literal["keep", "strip", "answer_only"]
FILTERED = ("content_filter", "refusal", "error", "abort")  # finish reasons
OPENING, CLOSING = "<think>", "</think>"
HIDDEN = 1 << 15  # prompt tokens that a server may add (its own instructions, tools) and still be believed
LONGEST_TOKENS = 8  # characters that tokens have at most on average: llama.cpp counts only the first of n choices


class Malformed(ValueError):
    """A reply that is not what the protocol says."""


class Declined(Exception):
    """A reply of status 200 that is an error all the same: an `error` object where the choices should be.

    `status`: the one that the error names, if any; `kinds`: its code and type. `usage`: what was billed, None if the
    reply names no tokens, or `billed` if it does in counts that cannot be right.
    """

    def __init__(self, error: Mapping[str, Any], usage: Usage | None, billed: bool) -> None:
        self.words = str(error.get("message") or json.dumps(error))
        self.kinds = {kind for kind in (error.get("code"), error.get("type")) if isinstance(kind, str)}
        self.status = next((code for name in ("code", "status") if (code := _status(error.get(name)))), None)
        self.usage, self.billed = usage, billed
        super().__init__(self.words)


@dataclass(frozen=True, slots=True)
class Reply:
    """The choices of a reply, each as JSON, and what it was billed; None where the counts cannot be right."""

    choices: tuple[str, ...]
    usage: Usage | None


def read_reply(content: bytes, samples: int, most_prompt: int, most_completion: int) -> Reply:
    """A reply to a request for `samples` choices, of at most so many tokens each. Raises Malformed or Declined.

    Counts that are missing, negative, beyond what was asked for or far below what came are not believed.
    """
    choices, said = answered(content, most_prompt, samples * most_completion)
    kept = [choice for choice in choices if _body(choice) is not None][:samples]
    letters = sum(len(_content(choice)) + len(_reasoning(choice)) for choice in kept)
    least_completion = -(-letters // LONGEST_TOKENS)
    usage = believed(said, most_prompt, range(least_completion, samples * most_completion + 1))
    return Reply(tuple(map(_as_json, kept)), usage)


def answered(content: bytes, most_prompt: int, most_completion: int) -> tuple[list[dict[str, Any]], Any]:
    """The choices of a reply, and what it says of its usage: at most so many tokens. Raises Malformed or Declined."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Malformed("expected JSON") from error
    choices = data.get("choices") if isinstance(data, dict) else None
    if not choices and (declined := _error(data)):
        said = data.get("usage")
        usage = believed(said, most_prompt, range(most_completion + 1))
        counts = (said.get("prompt_tokens"), said.get("completion_tokens")) if isinstance(said, dict) else ()
        raise Declined(declined, usage, billed=usage is None and any(counts))
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Malformed("expected a list of choices")
    return choices, data.get("usage")


def shares(choices: Sequence[str], tokens: int | None) -> list[int | None]:
    """A reply's completion tokens divided among its choices in proportion to their length, without remainder."""
    if tokens is None or not choices:
        return [None] * len(choices)
    lengths = [len(choice) for choice in choices]
    found, before = [], 0
    for place in range(1, len(lengths) + 1):
        upto = round(tokens * sum(lengths[:place]) / sum(lengths))
        found.append(upto - before)
        before = upto
    return list(found)


def read_bought(request: Request, bought: Bought, thinking: Thinking) -> Completion:
    """A sample from the ledger as the completion of a request."""
    text, finish = read_choice(bought.choice, thinking)
    error = "the server ended it with an error or by its filter" if finish is FinishReason.ERROR else ""
    return Completion(request, text, finish, bought.prompt_tokens, bought.completion_tokens, error)


def read_choice(choice: str, thinking: Thinking) -> tuple[str, FinishReason]:
    """The text of a choice that the student is to learn, and why it ended.

    A reasoning model's thinking (`reasoning_content` or `reasoning` beside the content, or <think> ... </think> in it)
    is kept in its tags (`keep`), kept as plain text before the answer (`strip`), or left out (`answer_only`). What the
    server's filter has cut is an error and no text.
    """
    data: dict[str, Any] = json.loads(choice)
    if data.get("finish_reason") in FILTERED:
        return "", FinishReason.ERROR
    cut = data.get("finish_reason") in ("length", "max_tokens")
    thought, answer, closed = _apart(_reasoning(data), _content(data))
    finish = FinishReason.LENGTH if cut else FinishReason.STOP
    if not thought or thinking == "answer_only":
        return answer, finish
    if thinking == "strip":
        return "\n\n".join(part for part in (thought, answer) if part), finish
    return f"{OPENING}\n{thought}\n" + (f"{CLOSING}\n\n{answer}" if closed or answer else ""), finish


def _apart(reasoning: str, content: str) -> tuple[str, str, bool]:
    """Thinking, answer, and whether the thinking came to its end."""
    if reasoning:
        return reasoning.strip(), content.lstrip() if content else "", bool(content)
    head, closing, tail = content.rpartition(CLOSING)
    if closing:
        return head.replace(OPENING, "", 1).strip(), tail.lstrip(), True
    if content.lstrip().startswith(OPENING):
        return content.lstrip().removeprefix(OPENING).strip(), "", False
    return "", content, True


def _error(data: Any) -> Mapping[str, Any] | None:
    """The error that stands in a reply, if one does: as {"error": {...}}, or as vLLM used to write it."""
    if not isinstance(data, dict):
        return None
    error = data.get("error")
    if isinstance(error, str) and error:
        return {"message": error}
    if isinstance(error, dict) and error:
        return error
    return data if data.get("object") == "error" and isinstance(data.get("message"), str) else None


def _status(code: Any) -> int | None:
    """An HTTP status of an error, as a number or its digits."""
    number = int(code) if isinstance(code, str) and code.isdecimal() else code
    return _count(number, range(400, 600))


def _as_json(choice: Mapping[str, Any]) -> str:
    """Text that UTF-8 cannot hold (lone surrogates) stays escaped."""
    text = json.dumps(choice, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(choice)
    return text


def _body(choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What of a choice holds its texts: the message of a chat, or the choice itself; None if it has neither."""
    message = choice.get("message")
    if isinstance(message, Mapping):
        return message
    return choice if isinstance(choice.get("text"), str) else None


def _content(choice: Mapping[str, Any]) -> str:
    body = _body(choice) or {}
    return _joined(body.get("content", body.get("text")), "text")


def _reasoning(choice: Mapping[str, Any]) -> str:
    body = _body(choice) or {}
    beside = body.get("reasoning_content") or body.get("reasoning")
    return beside if isinstance(beside, str) else _joined(body.get("content"), "thinking")


def _joined(content: Any, kind: str) -> str:
    """A text, or the parts of this kind of a list: {"type": "text", "text": ...}, {"type": "thinking", ...}."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return "".join(_joined(part.get(kind), "text") for part in parts if part.get("type") == kind)


def believed(data: Any, most_prompt: int, possible: range) -> Usage | None:
    """The usage that a reply names, if its counts can be right: of the prompt, and `possible` ones of completions."""
    if not isinstance(data, dict):
        return None
    prompt = _count(data.get("prompt_tokens"), range(1, most_prompt + HIDDEN))
    completion = _count(data.get("completion_tokens", 0), possible)
    if prompt is None or completion is None:
        return None
    cached = _detail(data, "prompt_tokens_details", "cached_tokens")
    reasoning = _detail(data, "completion_tokens_details", "reasoning_tokens")
    return Usage(prompt, completion, min(cached, prompt), min(reasoning, completion))


def _detail(data: Mapping[str, Any], where: str, name: str) -> int:
    details = data.get(where)
    return _count(details.get(name), range(1 << 62)) or 0 if isinstance(details, dict) else 0


def _count(found: Any, possible: range) -> int | None:
    """`found` if it is one of these whole numbers."""
    return found if isinstance(found, int) and not isinstance(found, bool) and found in possible else None
