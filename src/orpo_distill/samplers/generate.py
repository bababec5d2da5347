"""Decoding through the model's own `generate`, for models whose cache the decoding loop cannot manage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from orpo_distill import progress
from orpo_distill.errors import ran_out_of_memory
from orpo_distill.samplers.decode import Drawn, Job, Rules, no_probabilities
from orpo_distill.samplers.draw import uniforms


class OwnDraw(LogitsProcessor):
    """Leaves `generate` one token to choose from: the one that each row's own stream of random numbers draws."""

    def __init__(self, model: PreTrainedModel, seeds: Sequence[int], width: int, rules: Rules) -> None:
        self.seeds = np.array([seed % 2**64 for seed in seeds], np.uint64)
        self.model, self.width, self.rules = model, width, rules

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = np.full_like(self.seeds, input_ids.shape[1] - self.width)
        chance = torch.from_numpy(uniforms(self.seeds, steps)).to(scores.device)
        tokens = self.rules.draw(scores, chance)
        if (tokens < 0).any():
            raise no_probabilities(self.model)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def decode_by_generate(model: PreTrainedModel, jobs: Sequence[Job], rules: Rules, rows: int) -> Iterator[Drawn]:
    """What `decode` does, wave by wave: every row of a wave waits for the longest, and prompts are not shared.

    Where the model's context ends a text, it ends all texts of the wave that are still going on, as cut for length.
    Running out of memory halves the waves; a job that fails alone yields an error.
    """
    with _without_defaults(model):
        yield from _waves(model, jobs, rules, rows)


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the checkpoint's own sampling defaults cannot leak in."""
    defaults = model.generation_config
    model.generation_config = _settings()
    try:
        yield
    finally:
        model.generation_config = defaults


def _waves(model: PreTrainedModel, jobs: Sequence[Job], rules: Rules, rows: int) -> Iterator[Drawn]:
    waiting = sorted(jobs, key=lambda job: -len(job.prompt))
    while waiting:
        wave = waiting[:rows]
        try:
            found = _wave(model, wave, rules)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            found = None
        if found is not None:
            yield from found
            del waiting[: len(wave)]
            continue
        torch.cuda.empty_cache()
        if rows > 1:
            rows = max(1, len(wave) // 2)
            progress.say(f"  out of memory: going on with {rows} rows at once (the sampler's option `rows`)")
        else:
            yield Drawn(waiting.pop(0).index, [], False, "out of memory with one row")


def _settings(**options: Any) -> GenerationConfig:
    config: Any = GenerationConfig
    settings: GenerationConfig = config(**options)
    return settings


@torch.inference_mode()
def _wave(model: PreTrainedModel, wave: Sequence[Job], rules: Rules) -> list[Drawn]:
    width = len(wave[0].prompt)
    ids = np.zeros((len(wave), width), np.int64)
    mask = np.zeros_like(ids)
    for row, job in enumerate(wave):
        ids[row, width - len(job.prompt) :] = job.prompt
        mask[row, width - len(job.prompt) :] = 1
    config = _settings(
        do_sample=False,
        max_new_tokens=min(job.limit for job in wave),
        eos_token_id=list(rules.ends) or None,
        pad_token_id=rules.ends[0] if rules.ends else 0,
    )
    generate: Any = model.generate
    output = generate(
        torch.from_numpy(ids).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([OwnDraw(model, [job.seed for job in wave], width, rules)]),
    )
    found = []
    for job, tokens in zip(wave, output[:, width:].tolist(), strict=True):
        place = next((place for place, token in enumerate(tokens) if token in rules.ends), None)
        end = None if place is None else tokens[place]
        found.append(Drawn(job.index, tokens[:place], stopped=end is not None, end=end))
    return found
