"""Traces a user already owns, instead of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from orpo_distill import progress
from orpo_distill.errors import DataError
from orpo_distill.records import LETTERS, FinishReason
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.lines import find_file, read_objects, text_list

FINAL_LINE = re.compile(r"\s*the answer is\b", re.IGNORECASE)


class Recorded(Sampler):
    """Plays back a file with a question a line: {"id": ..., "traces": [{"text": ..., "answer": ..., "flags": [...]}]}.

    Sample i of a problem is its i-th trace without any of `drop_flags`. Where there is none the sample is an error, "no
    recorded trace". The model is only a label, and decoding settings have no effect.
    """

    path: Path  # .jsonl or .jsonl.gz, or a folder with one such file
    final_line: Literal["none", "append"] = "none"  # append: end in "The answer is ..." with the trace's own answer
    drop_flags: tuple[str, ...] = ("mentions_given_answer", "refers_to_prompt")

    def check(self) -> None:
        """Raise DataError where the file is not there."""
        find_file(self.path)

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        """Read the whole file. Raises DataError, with the line's number."""
        texts = self._read()

        def generate(requests: Iterable[Request], _: Decoding) -> Iterator[Completion]:
            for request in requests:
                found = texts.get(request.problem_id, ())
                if request.sample_index < len(found):
                    yield Completion(request, found[request.sample_index], FinishReason.STOP)
                else:
                    yield Completion(request, "", FinishReason.ERROR, error="no recorded trace")

        yield generate

    def _read(self) -> Mapping[str, list[str]]:
        texts: dict[str, list[str]] = {}
        dropped = 0
        for place, line in read_objects(find_file(self.path)):
            name, traces = text_list(place, line, "traces")
            if name in texts:
                raise DataError(f"{place}: expected each id once, found {name!r} again; merge the two lines")
            texts[name] = [self._text(place, trace) for trace in traces if not self._is_dropped(place, trace)]
            dropped += len(traces) - len(texts[name])
        count = sum(map(len, texts.values()))
        progress.say(f"  {self.path}: {count} traces of {len(texts)} problems, {dropped} left out for their flags")
        return texts

    def _is_dropped(self, place: str, trace: Any) -> bool:
        if not isinstance(trace, dict) or not isinstance(trace.get("text"), str):
            raise DataError(f'{place}: expected traces like {{"text": "..."}}, found {str(trace)[:60]}; mend the line')
        flags = trace.get("flags") or []
        if not isinstance(flags, list):
            raise DataError(f"{place}: expected flags as a list of names, found {str(flags)[:60]!r}; mend the line")
        return any(flag in self.drop_flags for flag in flags)

    def _text(self, place: str, trace: Mapping[str, Any]) -> str:
        text, answer = str(trace["text"]), trace.get("answer")
        if self.final_line == "none" or answer is None:
            return text
        if not isinstance(answer, str):
            raise DataError(f"{place}: expected an answer that is text or null, found {answer!r}; quote it")
        return with_final_line(text, answer)


def with_final_line(text: str, answer: str) -> str:
    """The text with "The answer is ..." as its last line; a letter stands in parentheses. Unchanged if it has one."""
    text = text.rstrip()
    if FINAL_LINE.match(text.rpartition("\n")[2]):
        return text
    shown = f"({answer})" if answer in LETTERS and len(answer) == 1 else answer
    return f"{text}\nThe answer is {shown}."
