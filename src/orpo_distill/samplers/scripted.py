"""Replies written in advance: a fake model for tests and demonstrations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeFloat, ValidationError

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.lines import find_file, read_objects, text_list


class Reply(Options):
    """A reply that ends otherwise than by itself."""

    text: str
    finish_reason: FinishReason = FinishReason.STOP


class Scripted(Sampler):
    """Answers sample i of a problem with reply i, beginning again after the last. Token counts are words.

    A problem without replies gets those of `default`; without these either, the sample is an error.
    """

    replies: dict[str, tuple[str | Reply, ...]] = {}  # by problem id
    path: Path | None = None  # more of them: JSON Lines, {"id": ..., "texts": [...]}, each a text or a `Reply`
    default: tuple[str | Reply, ...] = ()
    delay: Annotated[NonNegativeFloat, SPEED_ONLY] = 0.0  # seconds before each completion

    def check(self) -> None:
        """Raise DataError where the file of replies is not there."""
        if self.path:
            find_file(self.path)

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        """Read the file of replies. Raises DataError."""
        replies = {**self._file(), **self.replies}

        def generate(requests: Iterable[Request], _: Decoding) -> Iterator[Completion]:
            for request in requests:
                time.sleep(self.delay)
                yield _complete(request, replies.get(request.problem_id) or self.default)

        yield generate

    def _file(self) -> Mapping[str, tuple[str | Reply, ...]]:
        found: dict[str, tuple[str | Reply, ...]] = {}
        for place, line in read_objects(find_file(self.path)) if self.path else ():
            name, texts = text_list(place, line, "texts")
            try:
                found[name] = tuple(text if isinstance(text, str) else Reply.model_validate(text) for text in texts)
            except ValidationError as error:
                raise DataError(
                    f"{place}: expected texts, or objects with text and finish_reason, found {str(texts)[:60]}"
                ) from error
        return found


def _complete(request: Request, replies: Sequence[str | Reply]) -> Completion:
    if not replies:
        return Completion(request, "", FinishReason.ERROR, error="no scripted reply")
    reply = replies[request.sample_index % len(replies)]
    if isinstance(reply, str):
        reply = Reply(text=reply)
    failed = reply.finish_reason is FinishReason.ERROR
    text = "" if failed else reply.text
    words = sum(len(message.content.split()) for message in request.messages)
    return Completion(
        request, text, reply.finish_reason, words, len(text.split()), "scripted failure" if failed else ""
    )
