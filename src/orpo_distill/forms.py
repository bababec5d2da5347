"""Files of texts that a user already owns, in every form that `import` reads.

    traces   a line a trace, as a run's traces.jsonl has them: problem_id, text, ...
    texts    {"id": problem id, "text": ...} or {"id": problem id, "texts": [...]}
    trl      prompt with completion, or with chosen and rejected, as text or as messages; messages alone; a run's pairs
    batch    output of OpenAI's batch API whose custom_id is "<problem id>#<sample index>"

Each as JSON Lines, plain or gzipped, or as Parquet with the same columns. The form is found out from the first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from orpo_distill.errors import DataError, missing_extra
from orpo_distill.records import FinishReason, Message, Role
from orpo_distill.samplers.lines import read_objects

Form = Literal["traces", "texts", "trl", "batch"]
Side = Literal["chosen", "rejected"]
Prompt = tuple[Message, ...] | str
Skip = Callable[[DataError], None]
"""What is told of a row that is passed over."""

_REASONS = {
    FinishReason.STOP: ("stop", "eos", "end_turn", "stop_sequence"),
    FinishReason.LENGTH: ("length", "max_tokens"),
    FinishReason.ERROR: ("error", "content_filter", "refusal"),
}
_REASON_OF = {word: reason for reason, words in _REASONS.items() for word in words}


@dataclass(frozen=True, slots=True)
class Text:
    """A text that a user brings, and what its row says of it. It belongs to a problem by id, or else by its prompt."""

    where: str
    text: str
    problem_id: str = ""
    prompt: Prompt = ""
    index: int | None = None  # as which of its problem's samples it was asked for
    finish_reason: FinishReason = FinishReason.STOP  # ERROR: there is no text
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    policy: str = ""  # who wrote it, where the row says so
    paired: bool = False  # from a row of pairs: the same text again is the same sample in another pair


def read_texts(path: Path, form: Form | None, side: Side, skip: Skip | None = None) -> Iterator[Text]:
    """The texts of a file; of a row of pairs, those of one side. Raises DataError with the row's place.

    With `skip` a malformed row is passed over; `skip` is told. A file all of whose rows are is an error.
    """
    seen = 0
    for place, fields in read_rows(path, skip):
        seen += 1
        try:
            form = form or _form(place, fields)
            yield from _READERS[form](place, fields, side)
        except DataError as error:
            if skip is None:
                raise
            skip(error)
    if not seen:
        raise DataError(f"expected texts in {path}, found an empty file, or no row that can be read; check the path")


def read_rows(path: Path, skip: Skip | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's columns that are not null, with its place. Raises DataError, or ConfigError without pyarrow."""
    if not path.is_file():
        raise DataError(f"expected a file of texts at {path}, found none; check the path")
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    for place, fields in _parquet_rows(path) if is_parquet else read_objects(path, skip):
        yield place, {name: value for name, value in fields.items() if value is not None}


def _form(place: str, fields: Mapping[str, Any]) -> Form:
    """The form of a file, from its first row."""
    if "custom_id" in fields:
        return "batch"
    if fields.keys() & {"completion", "chosen", "rejected", "messages"}:
        return "trl"
    if "problem_id" in fields:
        return "traces"
    if "id" in fields and fields.keys() & {"text", "texts"}:
        return "texts"
    raise DataError(
        f"{place}: expected columns of one of these forms: problem_id, text (traces); id, text or texts; prompt with "
        "completion or chosen, or messages (TRL); custom_id, response (batch output); found "
        f"{', '.join(fields) or 'none'}; rename the columns"
    )


def _traces(place: str, fields: Mapping[str, Any], _: Side) -> Iterator[Text]:
    index = fields.get("sample_index")
    yield Text(
        place,
        _string(place, "text", fields.get("text")),
        _id(place, "problem_id", fields),
        index=index if isinstance(index, int) else None,
        finish_reason=_reason(place, fields.get("finish_reason")),
        prompt_tokens=_count(fields.get("prompt_tokens")),
        completion_tokens=_count(fields.get("completion_tokens")),
        policy=str(fields.get("policy", "")),
    )


def _texts(place: str, fields: Mapping[str, Any], _: Side) -> Iterator[Text]:
    name, found = _id(place, "id", fields), fields.get("texts", fields.get("text"))
    for number, item in enumerate(found if isinstance(found, list) else [found]):
        own = item if isinstance(item, dict) else {"text": item}
        reason, tokens = (
            own.get(key) or _of_one(fields.get(key), number) for key in ("finish_reason", "completion_tokens")
        )
        text = _string(place, "text", own.get("text"))
        yield Text(place, text, name, finish_reason=_reason(place, reason), completion_tokens=_count(tokens))


def _trl(place: str, fields: Mapping[str, Any], side: Side) -> Iterator[Text]:
    paired = "completion" not in fields and ("chosen" in fields or "rejected_response" in fields)
    answer = fields.get("completion", fields.get(side))
    if "messages" in fields:
        answer = [*_dicts(place, fields["messages"])]
        if side == "rejected" and paired:
            answer = [*answer[:-1], {"role": "assistant", "content": fields.get("rejected_response")}]
    if answer is None:  # a row that has only the other side
        return
    prompt = fields.get("prompt", answer[:-1] if isinstance(answer, list) else "")
    cut = side == "rejected" and bool(fields.get("rejected_cut"))
    yield Text(
        place,
        _reply(place, answer),
        str(fields.get("problem_id", "")),
        _prompt(place, prompt),
        finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP,
        policy=str(fields.get(f"{side}_policy", "")),
        paired=paired,
    )


def _batch(place: str, fields: Mapping[str, Any], _: Side) -> Iterator[Text]:
    name = _id(place, "custom_id", fields)
    if "response" not in fields and "body" in fields:
        raise DataError(f"{place}: expected a batch's output, found a request; give the file that the API sent back")
    problem, sign, digits = name.rpartition("#")
    first = int(digits) if sign and digits.isdecimal() else None
    try:
        choices, usage = _answered(fields.get("response"))
        found = [(choice.get("finish_reason"), choice["message"].get("content")) for choice in choices]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{place}: expected response.body.choices[*].message.content, found {type(error).__name__}: {error}; "
            "mend or remove the line"
        ) from error
    named = name if first is None else problem
    if not found:
        yield Text(place, "", named, finish_reason=FinishReason.ERROR)
    for number, (reason, content) in enumerate(found):
        yield Text(
            place,
            "" if content is None else _content(place, content),
            named,
            index=None if first is None else first + number,
            finish_reason=_reason(place, reason),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")) if len(found) == 1 else None,
        )


_READERS: Mapping[Form, Callable[[str, Mapping[str, Any], Side], Iterator[Text]]] = {
    "traces": _traces,
    "texts": _texts,
    "trl": _trl,
    "batch": _batch,
}


def _answered(response: Any) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """The choices of a response in their order, and its usage; nothing if the API refused or gave up."""
    if response is None or response.get("status_code", 200) != 200:
        return [], {}
    body = response["body"]
    return sorted(body["choices"], key=lambda choice: int(choice.get("index") or 0)), body.get("usage") or {}


def _of_one(value: Any, number: int) -> Any:
    """What a row says of its `number`-th text: one value for all, or a list."""
    if not isinstance(value, list):
        return value
    return value[number] if number < len(value) else None


def _id(place: str, key: str, fields: Mapping[str, Any]) -> str:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{place}: expected a problem's id in {key}, found {value!r}; mend or remove the row")
    return str(value)


def _string(place: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected {key} to be text, found {str(value)[:60]}; mend or remove the row")
    return value


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _reason(place: str, value: Any) -> FinishReason:
    if value is None:
        return FinishReason.STOP
    if not isinstance(value, str) or value not in _REASON_OF:
        raise DataError(f"{place}: expected finish_reason stop, length or error, found {value!r}; mend the row")
    return _REASON_OF[value]


def _content(place: str, value: Any) -> str:
    """A message's content: text, or a list of parts that have text."""
    if isinstance(value, list):
        value = "".join(str(part.get("text") or "") for part in _dicts(place, value))
    return _string(place, "a message's content", value)


def _dicts(place: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{place}: expected messages (role, content), found {str(value)[:60]}; mend or remove the row")
    return value


def _prompt(place: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    messages = _dicts(place, value)
    for message in messages:
        if message.get("role") not in get_args(Role):
            raise DataError(
                f"{place}: expected the roles {', '.join(get_args(Role))}, found {message.get('role')!r}; mend the row"
            )
    return tuple(Message(message["role"], _content(place, message.get("content"))) for message in messages)


def _reply(place: str, value: Any) -> str:
    """The text that answers: itself, or the last message of a list, which must be the assistant's."""
    if isinstance(value, str):
        return value
    last: Mapping[str, Any] = next(reversed(_dicts(place, value)), {})
    if last.get("role") != "assistant":
        raise DataError(
            f"{place}: expected an assistant's message last, found {str(last)[:60]}; mend or remove the row"
        )
    return _content(place, last.get("content"))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "hub") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for fields in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", fields
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file, found: {error}; check the file") from error
