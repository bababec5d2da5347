"""The decoding loop: one prefill a prompt, shared by its samples; rows that are done leave and waiting ones join."""

from __future__ import annotations

import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from orpo_distill import progress
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.cache import empty, merge
from orpo_distill.samplers.draw import draw, uniforms

PREFILL_TOKENS = 1 << 14  # prompt tokens (with padding) in one forward pass
LEAVE_SHARE = 0.25  # rows leave and join once this share of the batch is done
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


@dataclass(slots=True)
class Rows:
    """What is known of each row of the batch, on the host."""

    index: Ints  # (N,) the job
    seed: NDArray[np.uint64]  # (N,)
    prompt: Ints  # (N,) tokens of the prompt
    limit: Ints  # (N,) most tokens to draw
    count: Ints  # (N,) tokens drawn, frozen when the row is done
    last: Ints  # (N,) the newest token
    done: NDArray[np.bool_]  # (N,)
    stopped: NDArray[np.bool_]  # (N,) done, and not for its length
    text: NDArray[np.int32]  # (N, most limit) tokens drawn

    def __len__(self) -> int:
        return len(self.index)

    @property
    def length(self) -> Ints:
        """(N,) tokens of prompt and sample together."""
        return self.prompt + self.count

    @classmethod
    def of(cls, jobs: Sequence[Job], width: int) -> Rows:
        n = len(jobs)
        return cls(
            index=np.array([job.index for job in jobs], np.int64),
            seed=np.array([job.seed % 2**64 for job in jobs], np.uint64),
            prompt=np.array([len(job.prompt) for job in jobs], np.int64),
            limit=np.array([job.limit for job in jobs], np.int64),
            count=np.zeros(n, np.int64),
            last=np.array([job.prompt[-1] for job in jobs], np.int64),
            done=np.zeros(n, np.bool_),
            stopped=np.zeros(n, np.bool_),
            text=np.zeros((n, width), np.int32),
        )

    def then(self, keep: NDArray[np.bool_], others: Rows) -> Rows:
        """The rows to keep, then the others."""
        names = [one.name for one in dataclasses.fields(self)]
        return Rows(**{name: np.concatenate([getattr(self, name)[keep], getattr(others, name)]) for name in names})


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
        except torch.OutOfMemoryError:
            failed = batch.newest
        del batch
        torch.cuda.empty_cache()
        if rows > 1:
            rows //= 2
            progress.say(f"  out of memory: going on with {rows} rows at once (the sampler's option `rows`)")
        else:
            del left[failed]
            yield Drawn(failed, [], False, "out of memory with one row")


class Batch:
    """Rows being decoded together, and the jobs that wait for a place, longest prompt first."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], rules: Rules, capacity: int) -> None:
        self.model, self.rules, self.capacity = model, rules, capacity
        self.width = max(job.limit for job in jobs)
        self.rows = Rows.of([], self.width)
        self.cache = empty(model)
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.prompt, []).append(job)
        self.waiting = deque(sorted(groups.values(), key=lambda group: -len(group[0].prompt)))
        self.newest = -1
        last_only = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.forward_options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}
        self.ends = np.array(rules.ends, np.int64)

    def run(self) -> Iterator[Drawn]:
        """Every job's tokens as its row leaves."""
        while True:
            self._rearrange()
            if not len(self.rows):
                return
            steps = 0
            while self.rows.done.sum() < max(1.0, LEAVE_SHARE * len(self.rows)):
                self._step()
                steps += 1
                if self.rules.stops and steps % STOP_EVERY == 0:
                    self._look_for_stops(self.rules.stops)
            for row in np.flatnonzero(self.rows.done):
                tokens = self.rows.text[row, : self.rows.count[row]].tolist()
                ended = bool(tokens) and tokens[-1] in self.rules.ends
                yield Drawn(int(self.rows.index[row]), tokens[:-1] if ended else tokens, bool(self.rows.stopped[row]))

    @torch.inference_mode()
    def _rearrange(self) -> None:
        """Drop the rows that are done, and fill their places from the jobs that wait."""
        keep = ~self.rows.done
        groups = self._admit(self.capacity - int(keep.sum()))
        jobs = [job for group in groups for job in group]
        parts = [(self.cache, self._tensor(np.flatnonzero(keep)))] if keep.any() else []
        parts += self._prefill(groups)
        self.rows = self.rows.then(keep, Rows.of(jobs, self.width))
        if parts:
            self.cache = merge(parts, int(self.rows.length.max()) - 1)

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

    def _prefill(self, groups: Sequence[Sequence[Job]]) -> list[tuple[Cache, Tensor]]:
        """Caches of all prompt tokens but the last, and for each the row of every job in it."""
        parts = []
        at = 0
        while at < len(groups):
            width = max(1, len(groups[at][0].prompt) - 1)
            some = groups[at : at + max(1, PREFILL_TOKENS // width)]
            at += len(some)
            ids = np.zeros((len(some), width), np.int64)
            for row, group in enumerate(some):
                ids[row, width + 1 - len(group[0].prompt) :] = group[0].prompt[:-1]
            cache = empty(self.model)
            lengths = np.array([len(group[0].prompt) - 1 for group in some])
            self._forward(ids, lengths, cache)
            parts.append((cache, self._tensor(np.repeat(np.arange(len(some)), [len(group) for group in some]))))
        return parts

    def _forward(self, ids: Ints, lengths: Ints, cache: Cache) -> Tensor:
        """Logits (N, V) float32 after the last of `ids` (N, T); `lengths` (N,) are the real tokens up to that one."""
        columns = cache.get_seq_length() + ids.shape[1]
        place = self._tensor(lengths)[:, None] - columns + torch.arange(columns, device=self.model.device)  # (N, C)
        output = self.model(
            input_ids=self._tensor(ids),
            attention_mask=(place >= 0).long(),
            position_ids=place[:, -ids.shape[1] :].clamp(min=0),
            past_key_values=cache,
            **self.forward_options,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def _step(self) -> None:
        """Draw one token for every row. Rows that are done go along without effect."""
        rows = self.rows
        logits = self._forward(rows.last[:, None], rows.length, self.cache)
        chance = torch.from_numpy(uniforms(rows.seed, rows.count.astype(np.uint64)))
        rows.last = draw(logits, chance.to(logits.device), self.rules.decoding).cpu().numpy()
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

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)
