"""How likely a model finds texts: scored as training scores them, a prompt once with all its texts, no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from orpo_distill import interrupt
from orpo_distill.config import TrainSection
from orpo_distill.errors import ConfigError, TrainingError, ran_out_of_memory
from orpo_distill.groups import Row, encode_responses
from orpo_distill.models import Dtype, load_model, load_tokenizer, pick_device
from orpo_distill.packing import Batch, collate, micro_batches, packed_tokens, padded_tokens
from orpo_distill.progress import progress
from orpo_distill.records import Message, Pair
from orpo_distill.samplers.hf import context_length
from orpo_distill.samplers.prompts import encode_each

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # texts dealt into micro-batches together


@dataclass(frozen=True, slots=True)
class Response:
    """A text that answers a prompt. `cut` at max_new_tokens, it does not end with the end-of-sequence token."""

    prompt: tuple[Message, ...]
    text: str
    cut: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads texts. With `autocast` its arithmetic is bfloat16 on an accelerator or CPU alike."""

    dtype: Dtype
    tokens_per_batch: int
    autocast: bool = False
    trust_remote_code: bool = False

    @classmethod
    def as_trained(cls, train: TrainSection) -> Self:
        """As training reads them."""
        return cls(train.dtype, train.tokens_per_batch, train.autocast, train.trust_remote_code)


def mean_logps(model: str, responses: Sequence[Response], train: TrainSection, label: str) -> dict[Response, float]:
    """Mean token log-probability (nats) of each response under a checkpoint, on the device and in batches of training.

    Left out are responses that are empty, longer than train.max_length or the model's context with their prompt, or not
    finitely likely. Raises ModelError, and TrainingError where memory runs out.
    """
    responses = list(dict.fromkeys(response for response in responses if response.text))
    tokenizer = load_tokenizer(model, train.trust_remote_code)
    rows = [row for row in rows_of(responses, tokenizer) if row.length <= train.max_length]
    found: dict[Response, float] = {}
    if rows:
        with _memory_explained(
            model, len(rows), train.tokens_per_batch, ", or leave it out with mechanisms.problems: 0"
        ):
            for batch, scored in _scored(model, rows, Reading.as_trained(train), label, _means, leave_out=True):
                found |= {responses[row.number]: value for row, value in zip(batch, scored, strict=True)}
    return {response: value for response, value in found.items() if math.isfinite(value)}


def scores(
    model: str, rows: Sequence[Row], reading: Reading, label: str, done: Collection[int] = ()
) -> Iterator[tuple[int, tuple[float, int, float]]]:
    """Each row's number with its chosen side's `logp_sum, tokens, entropy` as in `records.Score`, batch by batch.

    Batches depend on the rows alone, and those whose rows are all in `done` (by number) are left out: what is resumed
    gives what an uninterrupted run gives. Raises ModelError, TrainingError where memory runs out, ConfigError for a row
    that is longer than the model's context.
    """
    with _memory_explained(model, len(rows), reading.tokens_per_batch):
        for batch, scored in _scored(model, rows, reading, label, _sums, done):
            for row, (logp_sum, tokens, entropy) in zip(batch, scored, strict=True):
                yield row.number, (logp_sum, int(tokens), entropy)


def rows_of(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Each response as a row without a rejected side; its number is its place among the responses."""
    if not responses:
        return []
    prompts = encode_each(tokenizer, (response.prompt for response in responses))
    wanted = sorted({(response.text, response.cut) for response in responses})
    tokens = encode_responses(wanted, tokenizer)
    rows = []
    for number, response in enumerate(responses):
        pair = Pair("", response.prompt, response.text, "", "", "", "", "")
        rows.append(Row(number, pair, prompts[response.prompt], tokens[response.text, response.cut], ()))
    return rows


def _means(model: Any, batch: Batch) -> Tensor:
    from orpo_distill.scoring import score

    scored = score(model, batch, 1.0)
    return (scored.logp_sum / scored.tokens)[scored.chosen]


def _sums(model: Any, batch: Batch) -> Tensor:
    from orpo_distill.scoring import measure

    return measure(model, batch)[:, batch.chosen].T


def _scored(
    name: str,
    rows: Sequence[Row],
    reading: Reading,
    label: str,
    score: Callable[[Any, Batch], Tensor],
    done: Collection[int] = (),
    leave_out: bool = False,
) -> Iterator[tuple[list[Row], list[Any]]]:
    """Each batch of rows that is not wholly done, with what `score` gives for each of its rows.

    Rows beyond the model's context are left out with `leave_out`, else refused.
    """
    import torch

    from orpo_distill.scoring import prepare

    device = pick_device()
    model: Any = load_model(name, reading.dtype, device, reading.trust_remote_code)
    try:
        limit = context_length(model)
        within = [row for row in rows if limit is None or row.length <= limit]
        if len(within) < len(rows) and not leave_out:
            longest = max(row.length for row in rows)
            raise ConfigError(
                f"expected texts within the context of {name}, {limit} tokens, found one of {longest} tokens with its "
                "prompt; lower train.max_length or pairs.max_response_tokens"
            )
        if not (rows := within):
            return
        route = prepare(model, [max(rows, key=lambda row: row.length)])
        size = packed_tokens if route.groups else padded_tokens
        autocast = torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=reading.autocast)
        with torch.no_grad(), autocast, progress(label, len(rows), len(done)) as advance:
            for start in range(0, len(rows), CHUNK):
                for batch in micro_batches(rows[start : start + CHUNK], reading.tokens_per_batch, size=size):
                    if all(row.number in done for row in batch):
                        continue
                    interrupt.check()
                    yield batch, score(model, collate(batch, False, device)).tolist()
                    advance(len(batch))
    finally:
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _memory_explained(model: str, texts: int, tokens_per_batch: int, otherwise: str = "") -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise TrainingError(
            f"expected the likelihood of {texts} texts under {model} to fit into memory, found that it does not; lower "
            f"train.tokens_per_batch (now {tokens_per_batch}){otherwise}"
        ) from error
