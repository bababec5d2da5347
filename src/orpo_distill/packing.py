"""Groups (a prompt with all its traces), dealt into micro-batches, each laid out as one packed row of tokens.

In the row every prompt stands once, followed by the distinct traces of its pairs, without padding. What a trace's
token attends to (its prompt and its own trace) is `attention`'s business; positions go on from the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orpo_distill.groups import Row, Tokens, distinct_traces

if TYPE_CHECKING:
    from torch import Tensor

Size = Callable[[Sequence[Row]], int]

SAME_LENGTH = 0.75  # traces at least this share of the longest are padded to it for attention


def packed_tokens(rows: Sequence[Row]) -> int:
    """Tokens that the rows take when they are packed: every prompt once and every distinct trace once."""
    prompts = {row.prompt for row in rows}
    return sum(map(len, prompts)) + sum(len(trace) for _, trace in distinct_traces(rows))


def padded_tokens(rows: Sequence[Row]) -> int:
    """Tokens that the rows take where every distinct trace is a row of its own behind its prompt, all padded alike."""
    traces = distinct_traces(rows)
    return len(traces) * max((len(prompt) + len(trace) for prompt, trace in traces), default=0)


def micro_batches(
    rows: Sequence[Row], tokens_per_batch: int, processes: int = 1, size: Size = packed_tokens
) -> list[list[Row]]:
    """A step's rows in micro-batches of at most `tokens_per_batch` tokens: the same number for every process.

    `size` counts the tokens of rows: `packed_tokens`, or `padded_tokens` for a model that cannot pack.

    Process i of n takes batches i, i + n, ... Groups stay whole where they fit; one that does not is cut between pairs,
    and a trace that stands in several of its parts is computed in each. A single pair may exceed the budget. Batches
    are about equally large; those to spare are empty.
    """
    pieces = sorted(_pieces(rows, tokens_per_batch, size), key=size, reverse=True)
    for passes in itertools.count(1):
        bins: list[list[Row]] = [[] for _ in range(passes * processes)]
        sizes = [0] * len(bins)
        for piece in pieces:
            place = sizes.index(min(sizes))
            bins[place] += piece
            sizes[place] = size(bins[place])
        if passes * processes >= len(pieces) or max(sizes) <= tokens_per_batch:
            return bins
    raise AssertionError("one piece a bin is the end of it")


def _pieces(rows: Sequence[Row], limit: int, size: Size) -> Iterator[list[Row]]:
    """The rows of each prompt, cut where they would exceed the limit: pairs with traces in common stay together."""
    by_prompt: dict[Tokens, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    for group in by_prompt.values():
        if size(group) <= limit:
            yield group
            continue
        while group:
            piece, group = _piece(group, limit, size)
            yield piece


def _piece(group: Sequence[Row], limit: int, size: Size) -> tuple[list[Row], list[Row]]:
    """The first row, with those that add the fewest tokens of traces while they fit; and the rows that are left."""
    left = list(group)
    piece: list[Row] = []
    traces: set[Tokens] = set()

    def adds(row: Row) -> int:
        return sum(len(trace) for trace in set(row.traces) - traces)

    while left:
        row = min(left, key=adds) if piece else left[0]
        if piece and size([*piece, row]) > limit:
            break
        traces.update(row.traces)
        left.remove(row)
        piece.append(row)
    return piece, left


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its distinct traces, longest first."""

    prompt: Tokens
    traces: list[Tokens]


@dataclass(frozen=True, slots=True)
class Bucket:
    """N traces of one prompt and of about the same length, side by side in the row."""

    prompt: slice  # the prompt's place in the row; empty for the bucket that is a prompt itself (N = 1)
    count: int  # N
    longest: int  # T, tokens of the longest
    padded: Tensor  # (N * T,) place in the row of every token of the traces padded to T; padding repeats a token
    tokens: Tensor  # (tokens,) which of the N * T are tokens, in the row's order


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: L tokens in one row, N distinct traces, G prompts, B pairs, M tokens to be scored."""

    input_ids: Tensor  # (1, L); the last token of a trace predicts nothing and is left out
    position_ids: Tensor  # (1, L)
    buckets: Sequence[Bucket]  # together every token of the row, in order
    prompts: Sequence[slice]  # (G,) each prompt's place in the row
    sources: Tensor  # (M,) the place in the row that predicts the token
    labels: Tensor  # (M,) the token
    owner: Tensor  # (M,) the trace it is part of; N + g for a token of prompt g
    prompt: Tensor  # (N,) each trace's prompt
    scored: Tensor  # (N + G,) how many tokens each trace, then each prompt, has among the M
    chosen: Tensor  # (B,) index into the N traces
    rejected: Tensor  # (B,) index into the N traces; empty where rows have no rejected side
    rollout: Tensor  # (B,) index into the N traces: what the student wrote for the pair, else its chosen side
    masks: dict[object, Tensor] = field(default_factory=dict)  # attention's, made once a batch


def collate(rows: Sequence[Row], score_prompt: bool, device: str = "cpu") -> Batch:
    """Pack the rows. `score_prompt` wants the prompt's tokens (all but the first) scored too."""
    import torch

    groups, chosen, rejected, rollout = _group(rows)
    layout = _Layout()
    prompts = [layout.add_group(group) for group in groups]
    scored = [len(trace) for group in groups for trace in group.traces]
    for group, place in zip(groups, prompts, strict=True):
        scored.append(len(group.prompt) - 1 if score_prompt else 0)
        if score_prompt:
            layout.sources += range(place.start, place.stop - 1)
            layout.labels += group.prompt[1:]

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        input_ids=tensor(layout.input_ids)[None],
        position_ids=tensor(layout.position_ids)[None],
        buckets=[
            Bucket(prompt, count, longest, tensor(padded), tensor(tokens))
            for prompt, count, longest, padded, tokens in layout.buckets
        ],
        prompts=prompts,
        sources=tensor(layout.sources),
        labels=tensor(layout.labels),
        owner=tensor([owner for owner, count in enumerate(scored) for _ in range(count)]),
        prompt=tensor([number for number, group in enumerate(groups) for _ in group.traces]),
        scored=tensor(scored),
        chosen=tensor(chosen),
        rejected=tensor(rejected),
        rollout=tensor(rollout),
    )


class _Layout:
    """The packed row as it grows, group by group."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.position_ids: list[int] = []
        self.sources: list[int] = []
        self.labels: list[int] = []
        self.buckets: list[tuple[slice, int, int, list[int], list[int]]] = []

    def add_group(self, group: Group) -> slice:
        """Append a prompt and its traces; returns the prompt's place."""
        start, end = len(self.input_ids), len(self.input_ids) + len(group.prompt)
        self._add_bucket(slice(start, start), [group.prompt], 0)
        for bucket in _buckets(group.traces):
            for number, trace in enumerate(bucket):
                first = len(self.input_ids) + sum(len(other) - 1 for other in bucket[:number])
                self.sources += [end - 1, *range(first, first + len(trace) - 1)]
                self.labels += trace
            self._add_bucket(slice(start, end), [trace[:-1] for trace in bucket], len(group.prompt))
        return slice(start, end)

    def _add_bucket(self, prompt: slice, traces: Sequence[Tokens], position: int) -> None:
        longest = max(map(len, traces))
        padded: list[int] = []
        tokens: list[int] = []
        for number, trace in enumerate(traces):
            first = len(self.input_ids)
            self.input_ids += trace
            self.position_ids += range(position, position + len(trace))
            padded += [
                *range(first, first + len(trace)),
                *[min(first, len(self.input_ids) - 1)] * (longest - len(trace)),
            ]
            tokens += range(number * longest, number * longest + len(trace))
        if longest:
            self.buckets.append((prompt, len(traces), longest, padded, tokens))


def pad(batch: Batch) -> tuple[Tensor, Tensor]:
    """The batch without sharing: token ids (N, T) of each prompt with one trace, padded on the right with 0.

    Also, for each of the M labels, the place among the N * T that predicts it.
    """
    import torch

    count = len(batch.prompt)
    lengths = batch.scored.tolist()
    traces: Sequence[Tensor] = torch.split(batch.labels, lengths)[:count]
    places = [batch.prompts[number] for number in batch.prompt.tolist()]
    rows = [torch.cat([batch.input_ids[0, place], trace]) for place, trace in zip(places, traces, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    at: list[int] = []
    for number, (place, trace) in enumerate(zip(places, traces, strict=True)):
        first = number * input_ids.shape[1] + place.stop - place.start - 1
        at += range(first, first + len(trace))
    for place, length in zip(batch.prompts, lengths[count:], strict=True):
        first = places.index(place) * input_ids.shape[1]
        at += range(first, first + length)
    return input_ids, torch.tensor(at, device=input_ids.device)


def _buckets(traces: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """Runs of traces that are nearly as long as their first; `traces` come longest first."""
    bucket: list[Tokens] = []
    for trace in traces:
        if bucket and len(trace) < SAME_LENGTH * len(bucket[0]):
            yield bucket
            bucket = []
        bucket.append(trace)
    yield bucket


def _group(rows: Sequence[Row]) -> tuple[list[Group], list[int], list[int], list[int]]:
    """The rows' groups, and each row's chosen, rejected and written trace counted through all groups."""
    traces: dict[Tokens, dict[Tokens, None]] = {}
    for row in rows:
        own = traces.setdefault(row.prompt, {})
        own.update(dict.fromkeys(row.traces))
    groups = [Group(prompt, sorted(own, key=len, reverse=True)) for prompt, own in traces.items()]
    keys = [(group.prompt, trace) for group in groups for trace in group.traces]
    index = {key: number for number, key in enumerate(keys)}
    chosen = [index[row.prompt, row.chosen] for row in rows]
    rejected = [index[row.prompt, row.rejected] for row in rows if row.rejected]
    rollout = [index[row.prompt, row.rollout or row.chosen] for row in rows]
    return groups, chosen, rejected, rollout
