"""Samplers: prompts to text.

A sampler's options say which engine and how fast; `open(model)` loads the engine for the length of a `with` block and
gives a `Generate` function. The stage that calls it decides what to ask, and resumes; the sampler only batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field

from orpo_distill.component import Component, Options
from orpo_distill.records import FinishReason, Message


@dataclass(frozen=True, slots=True)
class Request:
    """One text to sample. `seed` makes it reproducible whatever else is sampled beside it."""

    problem_id: str
    sample_index: int
    messages: tuple[Message, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for a request. `error` is set, and `text` empty, only if `finish_reason` is ERROR."""

    request: Request
    text: str
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""


class Decoding(Options):
    """How a text is drawn. `temperature: 0` is greedy."""

    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(1.0, ge=1e-6, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    max_new_tokens: int = Field(512, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # texts that end a sample; they are cut off


def _greedy(value: Any) -> Any:
    return {"temperature": 0.0, **value} if isinstance(value, Mapping) else value


Greedy = Annotated[Decoding, BeforeValidator(_greedy)]
"""A decoding in a config whose temperature is 0 where it is not said."""

Generate = Callable[[Iterable[Request], Decoding], Iterator[Completion]]
"""Requests in, completions out in any order. A request that fails yields a completion with `error`."""


class Sampler(Component):
    """An engine that writes text for prompts."""

    family = "sampler"
    default_type = "hf"
    types = {
        "hf": "orpo_distill.samplers.hf:HF",
        "openai": "orpo_distill.samplers.openai:OpenAI",
        "recorded": "orpo_distill.samplers.recorded:Recorded",
        "scripted": "orpo_distill.samplers.scripted:Scripted",
        "vllm": "orpo_distill.samplers.vllm:VLLM",
    }

    shards: ClassVar[bool] = True  # whether several processes may share the work
    heals: ClassVar[bool] = False  # whether a sample that failed may succeed when it is asked for in a later run

    @property
    def devices(self) -> int:
        """The GPUs that each process of the engine takes, where there are some."""
        return 1

    def for_run(self, name: str, ledger: Path | None) -> Self:
        """The sampler as a run of this name uses it, with the ledger that the run names."""
        return self

    def spent(self) -> float | None:
        """The money that the run has spent on this sampler so far; None where nothing has a price."""
        return None

    def check(self) -> None:
        """Raise DataError or ConfigError for options that cannot work, such as a missing file, before any work."""

    @abstractmethod
    def open(self, model: str) -> AbstractContextManager[Generate]:
        """Load `model` (a hub id, a folder, or what the engine calls it). Raises ModelError or DataError."""
