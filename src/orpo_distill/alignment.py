"""One text in the tokens of two models: the spans that begin and end with tokens of both.

The two tokenizers' offsets into the text say where tokens end. A span is closed wherever a token of each ends at the
same place, so that both models have read the same text before every span. A boundary inside a character is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orpo_distill.errors import ConfigError
from orpo_distill.groups import Tokens, encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Starts = tuple[Sequence[int], Sequence[int]]
"""The first token of each span, among the student's tokens of a text and among the teacher's."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """The teacher's tokens of a text, and where its spans start."""

    teacher: Tokens
    starts: Starts


def align(
    texts: Sequence[tuple[str, bool]], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> dict[tuple[str, bool], Aligned]:
    """Each (text, cut) in the teacher's tokens, aligned with the student's as `groups.encode_responses` makes them.

    The tokens that end a response, of one that was not cut, are a span of their own. Raises ConfigError for a tokenizer
    that does not say where its tokens stand in a text, DataError for one without an end-of-sequence token.
    """
    if not texts:
        return {}
    found = {}
    both = zip(_encoded(texts, student), _encoded(texts, teacher), strict=True)
    for key, ((_, ends), (tokens, read)) in zip(texts, both, strict=True):
        found[key] = Aligned(tokens, shared_starts(ends, read))
    return found


def shared_starts(ends: Sequence[int], others: Sequence[int]) -> Starts:
    """The first token of each span in either tokenizer's tokens, given where in the text each token ends.

    Both end with the text, so the last one's end is the same. Of tokens that end at the same place only the last ends a
    span: those before it are parts of one character.
    """
    last, other = ({end: place for place, end in enumerate(each)} for each in (ends, others))
    shared = sorted(last.keys() & other.keys())[:-1]
    return [0, *(last[end] + 1 for end in shared)], [0, *(other[end] + 1 for end in shared)]


def _encoded(texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tokens, list[int]]]:
    """Each text's tokens and where they end, in characters; the token that ends a response ends one behind the text."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"expected a tokenizer that says where its tokens stand in a text, found {type(tokenizer).__name__}, which "
            "does not; convert it to a tokenizer.json, or take an objective that needs no more than texts, such as orpo"
        )
    encoded, end = encoding([text for text, _ in texts], tokenizer, return_offsets_mapping=True)
    found = []
    for (text, cut), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = [*(stop for _, stop in offsets[:-1]), len(text)] if ids else []
        found.append(((*ids, *(() if cut else (end,))), [*ends, *([] if cut else [len(text) + 1])]))
    return found
