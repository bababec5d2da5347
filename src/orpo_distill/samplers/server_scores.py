"""Log-probabilities of given tokens from a server, bought through the ledger as samples are.

The prompt of `/v1/completions` may be token ids: prompt and text are then split exactly where training splits them, and
the end of sequence is a token like any other. A server tells their log-probabilities in one of two ways, and draws one
more token, which is not used:

    prompt_logprobs    "prompt_logprobs": 0             vLLM
    echo               "echo": true, "logprobs": 1      vLLM, SGLang, OpenAI's legacy completions
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from orpo_distill.errors import ModelError
from orpo_distill.ledger import Bought
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.replies import Declined, Reply, answered, believed

if TYPE_CHECKING:
    from orpo_distill.samplers.openai import OpenAI

Way = Literal["prompt_logprobs", "echo"]
Told = list[tuple[Any, Any]]  # each token's text and log-probability, as a reply has them

FIELDS: Mapping[Way, Mapping[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 0},
    "echo": {"echo": True, "logprobs": 1},
}
ONE_TOKEN = Decoding(temperature=1.0, max_new_tokens=1)  # 1.0: some servers tell log-probabilities after tempering
NEVER = -9999.0  # what vLLM writes for minus infinity
MOST = 1e-3  # of a log-probability: 0, and what low precision may add
NOT_IMPLEMENTED = 501  # the status that a reply without log-probabilities stands for
OTHERWISE = (
    "take the other way, score with a checkpoint (teacher.scoring: local) or choose an objective that needs texts alone"
)


class Scored(NamedTuple):
    """What a server says of a row of tokens: how it reads them, and how likely each is behind those before it."""

    text: str
    logps: list[float]  # in nats, of each token but the first


def server_scores(sampler: OpenAI, model: str, way: Way, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Scored]]:
    """The number of each row of token ids, with what the server says of it, as replies come.

    Requests are single ones, also where the sampler buys in batches. Raises ModelError where the server cannot, or once
    all others are there if it failed for some; RunError where the budget ends first.
    """
    options = sampler.model_copy(update={"api": "completions", "batch": False, "seeds": False})
    requests = [Request(str(number), 0, (), 0) for number in range(len(rows))]
    failures = []
    with options.buying(lambda decoding: ScoreAsking(options, model, decoding, way, rows)) as generate:
        for completion in generate(requests, ONE_TOKEN):
            if completion.error:
                failures.append(completion.error)
            else:
                yield int(completion.request.problem_id), Scored(**json.loads(completion.text))
    if failures:
        raise _unusable(options, way, f"{len(failures)} of {len(rows)} requests failed, the first with {failures[0]}")


class ScoreAsking(Asking):
    """Asks for the log-probabilities of rows of tokens. A request's problem id is the number of its row."""

    def __init__(
        self, options: OpenAI, model: str, decoding: Decoding, way: Way, rows: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(options, model, decoding)
        self._way, self._rows = way, rows

    def asks(self, requests: Iterable[Request]) -> Iterator[Ask]:
        """One for each row."""
        for request in requests:
            row = self._rows[int(request.problem_id)]
            body = {"model": self._model, "prompt": list(row), "temperature": 1.0, "max_tokens": 1}
            body = {**self._options.extra_body, **body, **FIELDS[self._way]}
            yield Ask(self._asked(body), body, len(row), len(row), {request.sample_index: request})

    def reply(self, content: bytes, ask: Ask, samples: int) -> Reply:
        """What the ledger is to keep of an answer: a `Scored` as JSON. Raises Malformed, or Declined if it has none."""
        choices, said = answered(content, ask.most_prompt, self.most_completion)
        usage = believed(said, ask.most_prompt, range(self.most_completion + 1))
        if not choices:
            return Reply((), usage)
        row = ask.body["prompt"]
        told = READERS[self._way](choices[0], row)
        numbers = [logp for _, logp in told[1:] if isinstance(logp, int | float)]
        logps = [logp for logp in numbers if logp <= MOST]  # NaN is not
        if len(told) != len(row) or len(logps) != len(row) - 1:
            words = f"log-probabilities of {len(logps)} of the {len(row) - 1} tokens behind the first"
            if odd := [logp for logp in numbers if not logp <= MOST]:
                words += f"; of one it says {odd[0]}"
            raise Declined({"message": words, "code": NOT_IMPLEMENTED}, usage, billed=usage is None)
        text = "".join(text for text, _ in told if isinstance(text, str))
        return Reply((json.dumps(Scored(text, logps)._asdict()),), usage)

    def unusable(self, found: str) -> ModelError:
        """The error for a server that cannot score."""
        return _unusable(self._options, self._way, found)

    def completion(self, request: Request, bought: Bought) -> Completion:
        """What the ledger keeps, as it is."""
        return Completion(request, bought.choice, FinishReason.STOP, bought.prompt_tokens, bought.completion_tokens)


def _unusable(options: OpenAI, way: Way, found: str) -> ModelError:
    return options.unusable(found, f"score given texts (teacher.scoring: {way})", OTHERWISE)


def _prompted(choice: Mapping[str, Any], row: Sequence[int]) -> Told:
    """From `prompt_logprobs`: null, then for each place {"token id": {"logprob": ..., "decoded_token": ...}}."""
    places = choice.get("prompt_logprobs")
    if not isinstance(places, list) or len(places) != len(row):
        return []
    there = (place if isinstance(place, dict) else {} for place in places)
    found = (place.get(str(token)) for place, token in zip(there, row, strict=True))
    return [(one.get("decoded_token"), one.get("logprob")) if isinstance(one, dict) else ("", None) for one in found]


def _echoed(choice: Mapping[str, Any], row: Sequence[int]) -> Told:
    """From `logprobs`: {"tokens": [...], "token_logprobs": [null, ...]}, of the row and of the token that was drawn."""
    told = choice.get("logprobs")
    texts, logps = (told.get(name) for name in ("tokens", "token_logprobs")) if isinstance(told, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(logps, list) or len(logps) not in (len(row), len(row) + 1):
        return []
    return list(zip(texts, logps, strict=False))[: len(row)]


READERS: Mapping[Way, Callable[[Mapping[str, Any], Sequence[int]], Told]] = {
    "prompt_logprobs": _prompted,
    "echo": _echoed,
}
