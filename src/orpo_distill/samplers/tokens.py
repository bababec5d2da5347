"""Between texts and the tokens of a local checkpoint: what the engines that run one have in common."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.prompts import encode_prompt, end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Asked(NamedTuple):
    """A request in tokens, with the most tokens to draw for it; or why its prompt cannot be asked."""

    request: Request
    prompt: tuple[int, ...]
    room: int
    error: str = ""


def encode_requests(
    tokenizer: PreTrainedTokenizerBase, requests: Iterable[Request], most: int, context: int | None
) -> list[Asked]:
    """Every request in its order; equal prompts are encoded once, and share one tuple.

    `most` is `max_new_tokens`, `context` the most tokens of prompt and text together, where there is such a limit. A
    prompt that is empty, or leaves no room in the context, has an error.
    """
    encoded: dict[tuple[Message, ...], tuple[int, ...]] = {}
    asked = []
    for one in requests:
        if one.messages not in encoded:
            encoded[one.messages] = tuple(encode_prompt(tokenizer, one.messages))
        prompt = encoded[one.messages]
        room = most if context is None else min(most, context - len(prompt))
        fits = prompt and room > 0
        takes = "at least 1" if context is None else f"1 to {context}"
        error = "" if fits else f"{len(prompt)} tokens in the prompt (the model takes {takes})"
        asked.append(Asked(one, prompt, room, error))
    return asked


def failed(asked: Asked, error: str) -> Completion:
    """The completion of a request that could not be served."""
    return Completion(asked.request, "", FinishReason.ERROR, len(asked.prompt), 0, error)


def completion(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, tokens: list[int], stopped: bool, decoding: Decoding
) -> Completion:
    """The completion of a request from its tokens, without the end token; a stop text and what follows is cut off."""
    text, count = plain_text(tokenizer, tokens), len(tokens)
    if places := [place for stop in decoding.stop if (place := text.find(stop)) >= 0]:
        text, stopped = text[: min(places)], True
        count = bisect_left(
            range(count),
            True,
            key=lambda n: any(stop in plain_text(tokenizer, tokens[:n]) for stop in decoding.stop),
        )
    reason = FinishReason.STOP if stopped else FinishReason.LENGTH
    return Completion(asked.request, text, reason, len(asked.prompt), count)


def plain_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_tokens(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a text: of the generation config, the tokenizer, and the chat template's end of a turn."""
    own: Any = getattr(generation_config, "eos_token_id", None)
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return tuple(sorted({token for token in found if token is not None}))
