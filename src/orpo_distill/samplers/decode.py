"""The decoding loop: one prefill a prompt, shared by its samples; rows that are done leave and waiting ones join."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from orpo_distill import progress
from orpo_distill.errors import ModelError, ran_out_of_memory
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.cache import SharedCache
from orpo_distill.samplers.draw import draw, uniforms
from orpo_distill.samplers.mixture import MixedCache, Partner

PREFILL_TOKENS = 1 << 14  # prompt tokens (with padding) in one forward pass
SEATS = 32  # rows that share one computed prompt, at most
LEAVE_SHARE = 1 / 32  # rows leave and join once this share of the batch is done
STOP_EVERY = 8  # steps between two looks for stop texts

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt's token ids, the seed of its sample and the most tokens to draw for it; `index` is the caller's name."""

    index: int
    prompt: tuple[int, ...]
    seed: int
    limit: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens drawn for a job, without the end token. `stopped`: it ended itself. `error`: there are none, why."""

    index: int
    tokens: list[int]
    stopped: bool
    error: str = ""
    end: int | None = None  # the end token, where one was drawn


@dataclass(frozen=True, slots=True)
class Stops:
    """Texts that end a row. `found` tells for each row's last tokens whether one stands there."""

    found: Callable[[list[list[int]]], list[bool]]
    tokens: int  # the most tokens that one of the texts can take


@dataclass(frozen=True, slots=True)
class Rules:
    """How tokens are drawn, and what ends a row: a token of `ends`, or a text of `stops`."""

    decoding: Decoding
    ends: tuple[int, ...]
    stops: Stops | None = None
    partner: Partner | None = None  # a model that writes along
    vocabulary: int | None = None  # only the tokens below it: embeddings may be padded

    def draw(self, logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """A token a row, (N,), from logits (N, V) and random numbers (N,); -1 where there are no probabilities."""
        return draw(logits[:, : self.vocabulary], chance, self.decoding)


@dataclass(slots=True)
class Rows:
    """What is known of each row of the batch, on the host."""

    index: Ints  # (N,) the job
    seed: NDArray[np.uint64]  # (N,)
    limit: Ints  # (N,) most tokens to draw
    count: Ints  # (N,) tokens drawn, frozen when the row is done
    last: Ints  # (N,) the newest token
    done: NDArray[np.bool_]  # (N,)
    stopped: NDArray[np.bool_]  # (N,) done, and not for its length
    text: NDArray[np.int32]  # (N, most limit) tokens drawn

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def of(cls, jobs: Sequence[Job], width: int) -> Rows:
        n = len(jobs)
        return cls(
            index=np.array([job.index for job in jobs], np.int64),
            seed=np.array([job.seed % 2**64 for job in jobs], np.uint64),
            limit=np.array([job.limit for job in jobs], np.int64),
            count=np.zeros(n, np.int64),
            last=np.array([job.prompt[-1] for job in jobs], np.int64),
            done=np.zeros(n, np.bool_),
            stopped=np.zeros(n, np.bool_),
            text=np.zeros((n, width), np.int32),
        )

    def take(self, order: Ints) -> Rows:
        """The rows at these places, in this order."""
        return Rows(**{one.name: getattr(self, one.name)[order] for one in dataclasses.fields(self)})

    def then(self, others: Rows) -> Rows:
        """These rows, then the others."""
        names = [one.name for one in dataclasses.fields(self)]
        return Rows(**{name: np.concatenate([getattr(self, name), getattr(others, name)]) for name in names})


def decode(model: PreTrainedModel, jobs: Iterable[Job], rules: Rules, rows: int) -> Iterator[Drawn]:
    """Draw every job's tokens, `rows` at once, in any order.

    Running out of memory halves `rows` and starts the unfinished jobs again; a job that fails alone yields an error.
    """
    left = {job.index: job for job in jobs}
    while left:
        batch = Batch(model, list(left.values()), rules, rows)
        try:
            for drawn in batch.run():
                del left[drawn.index]
                yield drawn
            return
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            failed, rows = batch.newest, batch.capacity
        del batch
        torch.cuda.empty_cache()
        if rows > 1:
            rows //= 2
            progress.say(f"  out of memory: going on with {rows} rows at once (the sampler's option `rows`)")
        else:
            del left[failed]
            yield Drawn(failed, [], False, "out of memory with one row")


class Batch:
    """Rows being decoded together, and the jobs that wait for a place, those of a prompt together, longest first."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], rules: Rules, capacity: int) -> None:
        self.model, self.rules, self.capacity = model, rules, min(capacity, len(jobs))
        self.width = max(job.limit for job in jobs)
        self.rows = Rows.of([], self.width)
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.prompt, []).append(job)
        parts = [group[at : at + SEATS] for group in groups.values() for at in range(0, len(group), SEATS)]
        seats = min(self.capacity, max(map(len, parts)))
        self.cache = MixedCache(model, rules.partner, seats) if rules.partner else SharedCache(model, seats)
        self.waiting = deque(sorted(parts, key=lambda part: -len(part[0].prompt)))
        self.newest = -1
        self.steps = 0
        self.ends = np.array(rules.ends, np.int64)

    def run(self) -> Iterator[Drawn]:
        """Every job's tokens as its row leaves."""
        while True:
            self._rearrange()
            if not len(self.rows):
                return
            with self.cache.attention():
                while self.rows.done.sum() < max(1.0, LEAVE_SHARE * len(self.rows)):
                    self._step()
                    self.steps += 1
                    if self.rules.stops and self.steps % STOP_EVERY == 0:
                        self._look_for_stops(self.rules.stops)
            for row in np.flatnonzero(self.rows.done):
                tokens = self.rows.text[row, : self.rows.count[row]].tolist()
                end = tokens.pop() if tokens and tokens[-1] in self.rules.ends else None
                yield Drawn(int(self.rows.index[row]), tokens, bool(self.rows.stopped[row]), end=end)

    def _rearrange(self) -> None:
        """Drop the rows that are done, and fill their places from the jobs that wait."""
        self.rows = self.rows.take(self.cache.keep(~self.rows.done))
        groups = self._admit(self.capacity - len(self.rows))
        while groups:
            some = groups[: max(1, PREFILL_TOKENS // len(groups[0][0].prompt))]
            del groups[: len(some)]
            self.cache.add([group[0].prompt for group in some], [len(group) for group in some], self.capacity)
            self.rows = self.rows.then(Rows.of([job for group in some for job in group], self.width))

    def _admit(self, free: int) -> list[list[Job]]:
        """Whole groups while they fit; the first in an empty batch is cut to size."""
        groups: list[list[Job]] = []
        while self.waiting and free:
            group = self.waiting[0]
            if len(group) > free and (groups or free < self.capacity):
                break
            self.waiting.popleft()
            if group[free:]:
                self.waiting.appendleft(group[free:])
            groups.append(group[:free])
            free -= len(groups[-1])
            self.newest = groups[-1][-1].index
        return groups

    @torch.inference_mode()
    def _step(self) -> None:
        """Draw one token for every row. Rows that are done go along without effect."""
        rows = self.rows
        logits = self.cache.logits(rows.last, rows.count)
        chance = torch.from_numpy(uniforms(rows.seed, rows.count.astype(np.uint64))).to(logits.device)
        rows.last = self.rules.draw(logits, chance).cpu().numpy()
        if rows.last.min() < 0:
            raise no_probabilities(self.model, self.rules.partner)
        live = np.flatnonzero(~rows.done)
        rows.text[live, rows.count[live]] = rows.last[live]
        rows.count[live] += 1
        rows.stopped[live] = np.isin(rows.last[live], self.ends)
        rows.done = rows.stopped | (rows.count >= rows.limit)

    def _look_for_stops(self, stops: Stops) -> None:
        rows = self.rows
        live = np.flatnonzero(~rows.done)
        recent = STOP_EVERY + stops.tokens
        tails = [rows.text[row, max(0, rows.count[row] - recent) : rows.count[row]].tolist() for row in live]
        rows.stopped[live] = rows.done[live] = stops.found(tails)


def no_probabilities(model: PreTrainedModel, partner: Partner | None = None) -> ModelError:
    """The error for logits that are no numbers."""
    both = f" and {type(partner.model).__name__}" if partner else ""
    return ModelError(
        f"expected probabilities of the next token from {type(model).__name__}{both}, found NaN; load the weights in "
        "float32 or bfloat16 (half precision overflows), or look for broken ones"
    )
