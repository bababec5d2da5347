"""Records: the only thing stages exchange. Text only, one JSON object a line.

No token ids and no chat templates stand here, because teacher and student tokenise differently.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, get_args

from orpo_distill.errors import DataError

Role = Literal["system", "user", "assistant"]
TEACHER, INITIAL = "teacher", "student-0"  # policies, see `Trace`
LETTERS = "ABCDEFGHIJ"  # of the most choices that a problem may have to be judged by their letters


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer. `answer` is a letter for multiple choice (A = first of `choices`)."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


class FinishReason(StrEnum):
    """Why a text ended."""

    STOP = "stop"  # the model ended it
    LENGTH = "length"  # cut at max_new_tokens
    ERROR = "error"  # there is no text; `Trace.error` says why


@dataclass(frozen=True, slots=True)
class Trace:
    """One sampled text: who wrote it, for which problem, as which of its K samples.

    `policy` is `teacher`, `student-R` (R = rounds of training it has had), `sft` or `judge`. `prompt_id` is a hash of
    the messages that were sent, so that a changed prompt or question is never answered with an old text. Token counts
    are the sampler's own, None where it cannot tell.
    """

    id: str
    problem_id: str
    policy: str
    sample_index: int
    text: str
    finish_reason: FinishReason = FinishReason.STOP
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""
    prompt_id: str = ""

    @staticmethod
    def make_id(policy: str, problem_id: str, sample_index: int, text: str, finish_reason: FinishReason) -> str:
        """A stable id: 16 hex digits of sha256 over what a verdict can depend on, and where the trace stands."""
        return stable_hash(policy, problem_id, sample_index, text, finish_reason)[:16]


class Outcome(StrEnum):
    """What a verifier found. Only CORRECT traces are ever chosen and only WRONG ones ever rejected."""

    CORRECT = "correct"
    WRONG = "wrong"
    AMBIGUOUS = "ambiguous"  # two answers at once, or none that can be decided
    UNPARSEABLE = "unparseable"  # states no answer
    TRUNCATED = "truncated"  # cut before it stated one
    FAILED = "failed"  # no text, or the verifier broke or ran out of time on it


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a trace's final answer is right, with the answer that was read and the reason in words."""

    trace_id: str
    outcome: Outcome
    answer: str | None
    reason: str

    @property
    def correct(self) -> bool | None:
        """True, False, or None where it cannot be told (such a trace is used on neither side)."""
        return {Outcome.CORRECT: True, Outcome.WRONG: False}.get(self.outcome)


@dataclass(frozen=True, slots=True)
class Pair:
    """One training row: a prompt, a text to prefer and a text to avoid, and where both came from.

    `rejected` and its provenance are empty in a row that only teaches its chosen side.
    """

    problem_id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_id: str
    rejected_id: str
    chosen_policy: str
    rejected_policy: str
    rejected_cut: bool = False  # cut at max_new_tokens: training appends no end-of-sequence token


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds a trace's text as the answer to its prompt. Sums in nats, over the model's own tokens.

    The text's end counts as a token unless it was cut. `prompt_id` is a hash of the messages that stand before it.
    """

    trace_id: str
    prompt_id: str
    logp_sum: float
    tokens: int
    entropy: float | None  # mean over the tokens of the next-token distribution's entropy over log V, from 0 to 1;
    # None where the scorer does not tell it: a server


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one problem when it was evaluated."""

    problem_id: str
    split: str
    gold: str
    answer: str | None
    outcome: Outcome


Said = Literal["won", "lost", "tie", "nonsense", "no_answer", "same"]


@dataclass(frozen=True, slots=True)
class Preference:
    """What a judge said of one of two traces on a problem, in either place: `won` against the other, `lost`, or `tie`.

    It was not asked about two equal texts (`same`). `prompt_ids` are those of the judge's traces, `one` shown first
    and shown last.
    """

    problem_id: str
    one_id: str
    other_id: str
    shown_first: Said
    shown_last: Said
    prompt_ids: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """`won` or `lost` where both orders say so. Everything else, also `orders_disagree`, means: it cannot tell."""
        said = (self.shown_first, self.shown_last)
        if "no_answer" in said:
            return "no_answer"
        if "nonsense" in said:
            return "nonsense"
        return said[0] if said[0] == said[1] else "orders_disagree"


class Record(Protocol):
    """Any of the dataclasses above."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


def _pickled_as_call(record_type: type[Record]) -> None:
    """Pickle a record as a call with its fields: half the time of what frozen dataclasses with slots do themselves."""
    fields = operator.attrgetter(*record_type.__dataclass_fields__)
    copyreg.pickle(record_type, lambda record: (record_type, fields(record)))


for _record_type in (Problem, Trace, Verdict):  # those that workers are sent and answer with
    _pickled_as_call(_record_type)


def stable_hash(*parts: object) -> str:
    """sha256 (hex) of the parts' JSON: the source of ids and derived seeds. Never Python's salted `hash`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from (seed, stage, key, ...): the same in every process and on every machine."""
    return int(stable_hash(*parts)[:16], 16) >> 1


def to_json(record: Record) -> str:
    """One line without its newline. Text that UTF-8 cannot hold (lone surrogates) is escaped."""
    line = _READABLE.encode(_fields(record))
    return line if line.isascii() or _encodable(line) else _ESCAPED.encode(_fields(record))


def _fields(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


_READABLE = json.JSONEncoder(ensure_ascii=False, default=_fields)
_ESCAPED = json.JSONEncoder(default=_fields)


def from_json(record_type: type[R], data: Mapping[str, Any]) -> R:
    """A record from its parsed line. Raises DataError for missing or unknown fields."""
    try:
        fields = dict(data)
        for name, convert in _converters(record_type).items():
            if name in fields:
                fields[name] = convert(fields[name])
        return record_type(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"expected the fields of a {record_type.__name__}, found {error}") from error


def read_jsonl(path: Path, record_type: type[R]) -> Iterator[R]:
    """Stream the records of a finished file. Raises DataError with path and line number."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield from_json(record_type, json.loads(line.decode()))
            except ValueError as error:
                raise DataError(f"{path}:{number}: expected a {record_type.__name__}, found {error}") from error


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Write a whole file so that it is either there complete or not at all. Returns the number of lines."""
    count = 0
    with atomic_file(path) as file:
        for record in records:
            file.write((to_json(record) + "\n").encode())
            count += 1
    return count


@dataclass
class atomic_file:
    """`with atomic_file(path) as file:` (binary): fsynced and renamed onto `path` only if the block succeeds."""

    path: Path
    _file: Any = field(default=None, init=False)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def __enter__(self) -> Any:
        self._file = self._partial.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None:
            self._partial.replace(self.path)
            sync_folder(self.path.parent)
        else:
            self._partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class JsonlAppender:
    """Append records as they arrive; a torn last line (a process killed in mid-write) is cut off on opening.

    Each record reaches the operating system before `append` returns, so only a machine crash can lose one.
    """

    def __init__(self, path: Path) -> None:
        repair_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def append(self, record: Record) -> int:
        """Write one line; returns where it begins, in bytes."""
        at = self._size
        line = memoryview((to_json(record) + "\n").encode())
        self._size += len(line)
        while line:  # a nearly full disk may take a part and refuse the rest
            line = line[self._file.write(line) or 0 :]
        return at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def repair_torn_line(path: Path) -> bool:
    """Cut a last line that has no newline. True if there was one. A missing file is fine."""
    if not path.exists() or not (size := path.stat().st_size):
        return False
    with path.open("rb+") as file:
        end = size
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            if (cut := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + cut + 1
                break
            end = start
        file.truncate(end)
    return end != size


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(value: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    messages = tuple(Message(**message) for message in value)
    for message in messages:
        if message.role not in get_args(Role):
            raise ValueError(f"a message's role {message.role!r} (expected {', '.join(get_args(Role))})")
    return messages


def _member_of(kind: type[StrEnum]) -> Callable[[Any], StrEnum]:
    """From a value to its member by a table: five times as fast as calling the enumeration, which explains failures."""
    members = {member.value: member for member in kind}
    return lambda value: (members.get(value) if isinstance(value, str) else None) or kind(value)


_CONVERTERS: Mapping[type[Any], Mapping[str, Callable[[Any], Any]]] = types.MappingProxyType(
    {
        Problem: {"choices": tuple},
        Trace: {"finish_reason": _member_of(FinishReason)},
        Verdict: {"outcome": _member_of(Outcome)},
        Answer: {"outcome": _member_of(Outcome)},
        Pair: {"prompt": _messages},
        Preference: {"prompt_ids": tuple},
    }
)


def _converters(record_type: type[Any]) -> Mapping[str, Callable[[Any], Any]]:
    return _CONVERTERS.get(record_type, {})
