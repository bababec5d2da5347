"""Pairs in the student's tokens, and the order they are trained in.

Prompt and response are tokenised apart, so that no token merges across the boundary: the student is trained on exactly
the tokens that it sees and writes when it samples.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orpo_distill.errors import DataError
from orpo_distill.records import Pair, derive_seed
from orpo_distill.samplers.prompts import encode_each, end_of_response

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A pair in the student's tokens. A side that the objective does not use is empty."""

    number: int  # its line in pairs.jsonl, from 1
    pair: Pair
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    rollout: Tokens = ()  # what the student wrote for the pair in this step

    @property
    def traces(self) -> tuple[Tokens, ...]:
        """The sides that there are."""
        return tuple(trace for trace in (self.chosen, self.rejected, self.rollout) if trace)

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longest response."""
        return len(self.prompt) + max(map(len, self.traces), default=0)

    @property
    def name(self) -> str:
        """The row for people: line, problem and traces."""
        if self.rollout:
            return f"pairs.jsonl:{self.number} (problem {self.pair.problem_id}, a text that the student wrote for it)"
        rejected = f", rejected {self.pair.rejected_id or '?'}" if self.rejected else ""
        return f"pairs.jsonl:{self.number} (problem {self.pair.problem_id}, chosen {self.pair.chosen_id}{rejected})"

    def written(self, text: Tokens, keeps_chosen: bool) -> Row:
        """The row with what the student wrote for it, in the place of its chosen side or beside it."""
        return replace(self, chosen=self.chosen if keeps_chosen else text, rollout=text) if text else self


def distinct_traces(rows: Iterable[Row]) -> set[tuple[Tokens, Tokens]]:
    """The rows' traces, each behind its prompt: (prompt, trace)."""
    return {(row.prompt, trace) for row in rows for trace in row.traces}


def tokenize(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, with_rejected: bool
) -> list[Row]:
    """Every pair as a row. Raises DataError, naming the row, for one that is empty, too long or lacks a side."""
    pairs = list(pairs)
    if not pairs:
        raise DataError("expected at least one row in pairs.jsonl, found none; there is nothing to train on")
    prompts = encode_each(tokenizer, (pair.prompt for pair in pairs))
    wanted = {(pair.chosen, False) for pair in pairs}
    if with_rejected:
        wanted |= {(pair.rejected, pair.rejected_cut) for pair in pairs}
    responses = encode_responses(sorted(wanted), tokenizer)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        rejected = responses[pair.rejected, pair.rejected_cut] if with_rejected else ()
        rows.append(Row(number, pair, prompts[pair.prompt], responses[pair.chosen, False], rejected))
        _check(rows[-1], max_length, with_rejected)
    return rows


def encode_responses(
    texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[str, bool], Tokens]:
    """Tokens of each (text, cut); one that was not cut ends with the token that ends a response."""
    encoded, end = encoding([text for text, _ in texts], tokenizer)
    ids = zip(texts, encoded["input_ids"], strict=True)
    return {(text, cut): (*tokens, *(() if cut else (end,))) for (text, cut), tokens in ids}


def encoding(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, **options: bool) -> tuple[BatchEncoding, int]:
    """What the tokenizer makes of responses' texts, and the token that ends one that was not cut.

    Text that spells a special token, such as <eos>, is text. Raises DataError for a tokenizer without such a token.
    """
    end = end_of_response(tokenizer)
    if end is None:
        raise DataError("expected a tokenizer with an end-of-sequence token, found none; set its eos_token")
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(list(texts), **plain, **options), end


def _check(row: Row, max_length: int, with_rejected: bool) -> None:
    if with_rejected and not row.pair.rejected:
        raise DataError(
            f"{row.name}: expected a rejected text, found none; this objective compares two sides: make pairs with "
            "both, or train with `objective: sft`"
        )
    if not row.prompt or not row.pair.chosen:
        raise DataError(f"{row.name}: expected a prompt and a chosen text, found an empty one; remove the row")
    if row.length > max_length:
        raise DataError(
            f"{row.name}: expected at most train.max_length = {max_length} tokens, found {row.length}; "
            "raise train.max_length or lower pairs.max_response_tokens"
        )


@dataclass(frozen=True, slots=True)
class Round:
    """The optimizer steps of a round, each a list of indices into the rows, and what fitting them in took."""

    steps: list[list[int]]
    repeated: int  # times that a row was used again
    left_out: int  # rows that did not fit in


def default_steps(rows: int, pairs_per_step: int) -> int:
    """Optimizer steps that one pass over the rows takes."""
    return math.ceil(rows / pairs_per_step)


def schedule(problem_ids: Sequence[str], steps: int, pairs_per_step: int, seed: int, round_number: int) -> Round:
    """Which rows (given by their problems' ids) each of a round's `steps` optimizer steps takes.

    Problems come in a random order that only (seed, round) decides, the rows of one problem side by side, so that
    their traces are scored together. As many rows as one pass takes are used once each and spread evenly. More are
    subsampled; fewer are repeated, pass after pass, until every step has `pairs_per_step`.
    """
    count, room = len(problem_ids), steps * pairs_per_step
    coin = random.Random(derive_seed(seed, "schedule", round_number))
    if count > room:
        order = _shuffled(sorted(coin.sample(range(count), room)), problem_ids, coin)
    else:
        order = _shuffled(range(count), problem_ids, coin)
        if default_steps(count, pairs_per_step) < steps:
            while len(order) < room:
                order += _shuffled(range(count), problem_ids, coin)
            del order[room:]
    cuts = [len(order) * step // steps for step in range(steps + 1)]
    used = len(set(order))
    return Round([order[a:b] for a, b in itertools.pairwise(cuts)], len(order) - used, count - used)


def written_for(rows: Sequence[Row], share: float, seed: int, step: int) -> list[int]:
    """Which of a step's rows the student writes texts for: a coin for each problem that only (seed, step) decides."""

    def falls(problem_id: str) -> bool:
        return random.Random(derive_seed(seed, "written", step, problem_id)).random() < share

    return [place for place, row in enumerate(rows) if falls(row.pair.problem_id)]


def _shuffled(indices: Iterable[int], problem_ids: Sequence[str], coin: random.Random) -> list[int]:
    """The indices with their problems in random order."""
    by_problem: dict[str, list[int]] = {}
    for index in indices:
        by_problem.setdefault(problem_ids[index], []).append(index)
    problems = list(by_problem.values())
    coin.shuffle(problems)
    return [index for problem in problems for index in problem]


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, int]:
    """Length of each text in the student's tokens, without special tokens."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    encoded = tokenizer(
        unique, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return {text: len(ids) for text, ids in zip(unique, encoded["input_ids"], strict=True)}


def most_tokens(text: str) -> int:
    """A number that no tokenizer exceeds: a token for each byte, and one for the space that some begin with.

    Characters beyond ASCII may be normalised first, to at most 11 times their bytes (Unicode Standard Annex 15,
    section 12); one of b >= 2 bytes has at most 2 (b - 1).
    """
    beyond = 0 if text.isascii() else 2 * (len(text.encode(errors="replace")) - len(text))
    return len(text) + 11 * beyond + 1 if text else 0
