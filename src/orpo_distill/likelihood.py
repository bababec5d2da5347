"""How likely a student finds texts: scored as training scores them, a prompt once with all its texts, no gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_distill import interrupt
from orpo_distill.config import TrainSection
from orpo_distill.errors import TrainingError, ran_out_of_memory
from orpo_distill.groups import Row, encode_responses
from orpo_distill.models import load_model, load_tokenizer, pick_device
from orpo_distill.packing import collate, micro_batches, packed_tokens, padded_tokens
from orpo_distill.progress import progress
from orpo_distill.records import Message, Pair
from orpo_distill.samplers.prompts import encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # texts dealt into micro-batches together


@dataclass(frozen=True, slots=True)
class Response:
    """A text that answers a prompt. `cut` at max_new_tokens, it does not end with the end-of-sequence token."""

    prompt: tuple[Message, ...]
    text: str
    cut: bool


def mean_logps(model: str, responses: Sequence[Response], train: TrainSection, label: str) -> dict[Response, float]:
    """Mean token log-probability (nats) of each response under a checkpoint, on the device and in batches of training.

    Left out are responses that are empty, longer than train.max_length with their prompt, or not finitely likely.
    Raises ModelError, and TrainingError where memory runs out.
    """
    responses = list(dict.fromkeys(response for response in responses if response.text))
    tokenizer = load_tokenizer(model, train.trust_remote_code)
    rows = _rows(responses, tokenizer, train.max_length) if responses else []
    if not rows:
        return {}
    device = pick_device()
    try:
        loaded = load_model(model, train.dtype, device, train.trust_remote_code)
        found = {responses[number]: value for number, value in _scored(loaded, rows, train, device, label)}
        del loaded
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise TrainingError(
            f"expected the likelihood of {len(rows)} texts under {model} to fit into memory, found that it does not; "
            f"lower train.tokens_per_batch (now {train.tokens_per_batch}), or leave it out with mechanisms.problems: 0"
        ) from error
    finally:
        _give_back(device)
    return {response: value for response, value in found.items() if math.isfinite(value)}


def _rows(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Each response that fits as a row without a rejected side; its number is its place among the responses."""
    prompts = list(dict.fromkeys(response.prompt for response in responses))
    prompt_tokens = dict(zip(prompts, map(tuple, encode_prompts(tokenizer, prompts)), strict=True))
    wanted = sorted({(response.text, response.cut) for response in responses})
    tokens = encode_responses(wanted, tokenizer)
    rows = []
    for number, response in enumerate(responses):
        pair = Pair("", response.prompt, response.text, "", "", "", "", "")
        row = Row(number, pair, prompt_tokens[response.prompt], tokens[response.text, response.cut], ())
        if row.length <= max_length:
            rows.append(row)
    return rows


def _scored(
    model: Any, rows: Sequence[Row], train: TrainSection, device: str, label: str
) -> Iterator[tuple[int, float]]:
    """Each row's number with its mean log-probability."""
    import torch

    from orpo_distill.scoring import prepare, score

    route = prepare(model, [max(rows, key=lambda row: row.length)])
    size = packed_tokens if route.groups else padded_tokens
    with torch.no_grad(), progress(label, len(rows)) as advance:
        for start in range(0, len(rows), CHUNK):
            for batch in micro_batches(rows[start : start + CHUNK], train.tokens_per_batch, size=size):
                if not batch:
                    continue
                interrupt.check()
                scored = score(model, collate(batch, False, device), 1.0)
                means = (scored.logp_sum / scored.tokens)[scored.chosen].tolist()
                yield from zip((row.number for row in batch), means, strict=True)
                advance(len(batch))


def _give_back(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
