"""Rollouts: texts that the student writes inside a train stage, with the weights that it has at that step.

A rollout follows from the weights, the step and the run's seed, and serves that one step: nothing of it is kept in a
checkpoint, and training that was interrupted draws the same texts again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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

ROWS = 512  # texts written at once; halved when memory runs out


@dataclass(frozen=True, slots=True)
class Rollout:
    """A text in the student's tokens. It ends with the end token that was drawn, unless it was `cut`."""

    tokens: Tokens
    cut: bool


class Writer:
    """A model in training as a writer of texts, its teacher beside it where tokens are drawn from both.

    Make it before `scoring.prepare`, of the model that several processes would wrap; adapters around it are fine.
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
        self.model = _inner(student)
        self.forward, self.attention = self.model.forward, self.model.config._attn_implementation
        self.ends = end_tokens(self.model.generation_config, tokenizer)
        self.partner = _inner(teacher) if teacher is not None and writing.teacher_share else None
        with self._as_sampler():
            unmanaged = [one for one in (self.model, self.partner) if one is not None and not manages(one)]
        self.own_loop = not unmanaged
        if unmanaged and self.partner is not None:
            raise ConfigError(
                "expected models whose cache the sampler can hold, to draw tokens from teacher and student together, "
                f"found {type(unmanaged[0]).__name__}; set objective.teacher_share: 0"
            )

    def __call__(self, prompts: Sequence[Tokens], seeds: Sequence[int]) -> list[Rollout]:
        """One text a prompt, (B,), each from its own stream of random numbers. Equal prompts are computed once.

        The model is in eval mode meanwhile, and nothing is kept for gradients. Raises TrainingError for a text that
        does not fit into memory alone, ModelError where probabilities are NaN.
        """
        from orpo_distill.samplers.decode import Job, Rules, decode
        from orpo_distill.samplers.generate import decode_by_generate
        from orpo_distill.samplers.mixture import Partner

        most, context = self.writing.max_new_tokens, context_length(self.model)
        jobs = [
            Job(place, prompt, seed, most if context is None else min(most, context - len(prompt)))
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        if not jobs:
            return []
        decoding = Decoding(temperature=self.writing.temperature, max_new_tokens=most)
        partner = None if self.partner is None else Partner(self.partner, self.writing.teacher_share)
        found: dict[int, Rollout] = {}
        with self._as_sampler():
            run = decode if self.own_loop else decode_by_generate
            for drawn in run(self.model, jobs, Rules(decoding, self.ends, partner=partner), ROWS):
                if drawn.error:
                    raise TrainingError(
                        f"expected memory for a rollout of {most} tokens behind a prompt of "
                        f"{len(prompts[drawn.index])}, found: {drawn.error}; lower objective.max_new_tokens"
                    )
                end = () if drawn.end is None else (drawn.end,)
                found[drawn.index] = Rollout((*drawn.tokens, *end), cut=drawn.end is None)
        return [found[place] for place in range(len(jobs))]

    @contextmanager
    def _as_sampler(self) -> Iterator[None]:
        """Inside, the student is in eval mode and computes as it did when the writer was made."""
        model, training = self.model, self.student.training
        forward, attention = model.forward, model.config._attn_implementation
        self.student.eval()
        model.forward = self.forward
        model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            model.set_attn_implementation(attention)
            model.forward = forward
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


def _inner(model: nn.Module) -> Any:
    """The model of transformers, without what peft puts around it."""
    return getattr(model, "get_base_model", lambda: model)()
