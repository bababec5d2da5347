"""What is sent to an OpenAI-compatible server, and how its answer is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ModelError
from orpo_distill.ledger import Asked, Bought
from orpo_distill.records import Message
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.prompts import plain_prompt, render
from orpo_distill.samplers.replies import Reply, read_bought, read_reply

if TYPE_CHECKING:
    from orpo_distill.samplers.openai import OpenAI

ROOM = 256, 16  # tokens that a server may put around a prompt, and around each of its messages
SEEDS = 1 << 31  # every server takes the numbers below it
BYTES_A_TOKEN = 3  # a guess, for the rates


@dataclass
class Ask:
    """A prompt with the samples that are wanted of it."""

    asked: Asked
    body: dict[str, Any]  # of a request, without `n` and `seed`
    most_prompt: int  # tokens: no tokenizer makes more than one of a byte
    likely_prompt: float  # tokens
    requests: dict[int, Request]  # by sample index
    given_up: set[int] = field(default_factory=set)  # delivered as failed
    stands: dict[int, Bought] | None = None  # what the ledger held when it was last asked

    def filled(self, indices: Sequence[int], seeded: bool) -> dict[str, Any]:
        """The body of a request for some of its samples: how many, or the seed of a single one."""
        if len(indices) > 1:
            return {**self.body, "n": len(indices)}
        return {**self.body, "seed": self.requests[indices[0]].seed % SEEDS} if seeded else dict(self.body)


class Asking:
    """Turns requests into what a server is sent for them, and what it answers into completions."""

    def __init__(self, options: OpenAI, model: str, decoding: Decoding) -> None:
        self._options, self._model, self._decoding = options, model, decoding
        self.most_completion = decoding.max_new_tokens  # tokens a sample
        self._tokenizer: Any = None

    def asks(self, requests: Iterable[Request]) -> Iterator[Ask]:
        """One for each prompt; the requests of a prompt stand together."""
        for (_, messages), group in groupby(requests, key=lambda request: (request.problem_id, request.messages)):
            body = self.body(messages)
            asked = self._asked(body)
            most_prompt = len(asked.request.encode()) + ROOM[0] + ROOM[1] * len(messages)
            wanted = {request.sample_index: request for request in group}
            yield Ask(asked, body, most_prompt, most_prompt / BYTES_A_TOKEN, wanted)

    def reply(self, content: bytes, ask: Ask, samples: int) -> Reply:
        """What a server answered when it was asked for so many samples. Raises Malformed or Declined."""
        return read_reply(content, samples, ask.most_prompt, self.most_completion)

    def unusable(self, found: str) -> ModelError:
        """The error for a server that does not do what it is asked for."""
        return self._options.unusable(found)

    def completion(self, request: Request, bought: Bought) -> Completion:
        """A sample from the ledger as the completion of its request."""
        return read_bought(request, bought, self._options.thinking)

    def asked(self, messages: Sequence[Message]) -> Asked:
        """Under what the samples of a prompt stand in the ledger."""
        return self._asked(self.body(messages))

    def _asked(self, body: Mapping[str, Any]) -> Asked:
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)
        return Asked(self._options.known_as, self._model, text.encode(errors="replace").decode())

    @property
    def path(self) -> str:
        """Where requests go, as a batch names it."""
        return self._options.path

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The fields of a request for a prompt, all but `n` and `seed`."""
        decoding, options = self._decoding, self._options
        fields: dict[str, Any] = {"model": self._model, **self._prompt(messages), "temperature": decoding.temperature}
        fields[options.length_field] = decoding.max_new_tokens
        if decoding.top_p < 1:
            fields["top_p"] = decoding.top_p
        if decoding.top_k:
            fields["top_k"] = decoding.top_k
        if decoding.stop:
            fields["stop"] = list(decoding.stop)
        return {**fields, **options.extra_body}

    def _prompt(self, messages: Sequence[Message]) -> dict[str, Any]:
        """`messages` of a chat, or the `prompt` of a completion: as the tokenizer's chat template writes it, if any."""
        if self._options.api == "chat":
            return {"messages": [{"role": message.role, "content": _plain(message.content)} for message in messages]}
        if not self._options.tokenizer:
            return {"prompt": _plain(plain_prompt(messages))}
        from orpo_distill.models import load_tokenizer

        self._tokenizer = self._tokenizer or load_tokenizer(self._options.tokenizer)
        return {"prompt": _plain(render(self._tokenizer, messages))}


def _plain(text: str) -> str:
    """A text that UTF-8 can hold: without lone surrogates."""
    return text.encode(errors="replace").decode()
