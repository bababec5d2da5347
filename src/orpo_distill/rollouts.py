"""Rollouts: texts that the student writes inside a train stage, with the weights that it has at that step.

A rollout follows from the weights, the step and the run's seed, and serves that one step: nothing of it is kept in a
checkpoint, and training that was interrupted draws the same texts again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ConfigError, TrainingError
from orpo_distill.groups import Row, Tokens
from orpo_distill.objectives import Writing
from orpo_distill.records import derive_seed
from orpo_distill.samplers import Decoding
from orpo_distill.samplers.hf import context_length
from orpo_distill.samplers.tokens import end_tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from orpo_distill.samplers.mixture import Partner

ROWS = 512  # texts written at once; halved when memory runs out


@dataclass(frozen=True, slots=True)
class Rollout:
    """A text in the student's tokens. It ends with the end token that was drawn, unless it was `cut`."""

    tokens: Tokens
    cut: bool


class Writer:
    """A model in training as a writer of texts, its teacher beside it where tokens are drawn from both.

    Both may be prepared for scoring; the student may have adapters around it, but nothing for several processes.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        writing: Writing,
        teacher: nn.Module | None = None,
    ) -> None:
        """Raises ConfigError where the teacher is to write along and one of the two needs a cache of its own."""
        from orpo_distill.samplers.cache import manages

        self.student, self.writing = student, writing
        self.model: Any = getattr(student, "get_base_model", lambda: student)()  # without what peft puts around it
        self.teacher: Any = teacher
        self.vocabulary = len(tokenizer)  # what the teacher can read too, whatever the embeddings are padded to
        self.ends = end_tokens(self.model.generation_config, tokenizer)
        mixes = teacher is not None and writing.teacher_share > 0
        writers: list[Any] = [self.model, teacher] if mixes else [self.model]
        with self._eval_mode():
            unmanaged = [one for one in writers if not manages(one)]
        self.own_loop = not unmanaged
        if unmanaged and mixes:
            raise ConfigError(
                "expected models whose cache the sampler can hold, to draw tokens from teacher and student together, "
                f"found {type(unmanaged[0]).__name__}; set objective.teacher_share: 0"
            )

    def __call__(
        self, prompts: Sequence[Tokens], seeds: Sequence[int], read: Sequence[Tokens] | None = None
    ) -> list[Rollout]:
        """One text a prompt, (B,), each from its own stream of random numbers. Equal prompts are computed once.

        `read` has the prompts as the teacher reads them, if not as the student does. A text ends where the context of
        one of the two does. The student is in eval mode meanwhile, and nothing is kept for gradients. Raises
        TrainingError for a text that does not fit into memory alone, ModelError where probabilities are NaN.
        """
        from orpo_distill.samplers.decode import Job, Rules, decode
        from orpo_distill.samplers.generate import decode_by_generate

        read = prompts if read is None else read
        jobs = [
            Job(place, prompt, seed, self._room(prompt, other))
            for place, (prompt, seed, other) in enumerate(zip(prompts, seeds, read, strict=True))
        ]
        if not jobs:
            return []
        decoding = Decoding(temperature=self.writing.temperature, max_new_tokens=self.writing.max_new_tokens)
        partner = self._partner(dict(zip(prompts, read, strict=True)))
        rules = Rules(decoding, self.ends, partner=partner, vocabulary=self.vocabulary)
        run = decode if self.own_loop else decode_by_generate
        found: dict[int, Rollout] = {}
        with self._eval_mode():
            for drawn in run(self.model, jobs, rules, ROWS):
                if drawn.error:
                    job = jobs[drawn.index]
                    raise TrainingError(
                        f"expected memory for a rollout of {job.limit} tokens behind a prompt of {len(job.prompt)}, "
                        f"found: {drawn.error}; lower objective.max_new_tokens"
                    )
                end = () if drawn.end is None else (drawn.end,)
                found[drawn.index] = Rollout((*drawn.tokens, *end), cut=drawn.end is None)
        return [found[place] for place in range(len(jobs))]

    def _room(self, prompt: Tokens, read: Tokens) -> int:
        """The most tokens behind a prompt."""
        limits = [(context_length(self.model), prompt)]
        if self.teacher is not None:
            limits.append((context_length(self.teacher), read))
        rooms = [context - len(tokens) for context, tokens in limits if context is not None]
        return min([self.writing.max_new_tokens, *rooms])

    def _partner(self, prompts: Mapping[Tokens, Tokens]) -> Partner | None:
        from orpo_distill.samplers.mixture import Partner

        share = self.writing.teacher_share
        return Partner(self.teacher, share, prompts) if self.teacher is not None and share else None

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = self.student.training
        self.student.eval()
        try:
            yield
        finally:
            self.student.train(training)


def rollout_seeds(rows: Sequence[Row], seed: int, step: int) -> list[int]:
    """The seed of each row's rollout, (B,). Rows of one problem are counted, so that each has a text of its own."""
    before: Counter[str] = Counter()
    seeds = []
    for row in rows:
        problem = row.pair.problem_id
        seeds.append(derive_seed(seed, "rollout", step, problem, before[problem]))
        before[problem] += 1
    return seeds
