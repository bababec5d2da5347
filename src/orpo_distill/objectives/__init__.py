"""Objectives: losses on scored groups. One file each: a pure function on tensors, and the component that calls it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from orpo_distill.component import Component

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """N traces scored once each, and B pairs that point into them. All sums are float32, in nats."""

    logp_sum: Tensor  # (N,) log-probability of the response's tokens, summed
    tokens: Tensor  # (N,) number of response tokens, at least 1
    prompt_logp_sum: Tensor  # (N,) the same over the prompt's tokens but the first; 0 unless `scores_prompt`
    prompt_tokens: Tensor  # (N,) number of prompt tokens that were scored; 0 unless `scores_prompt`
    chosen: Tensor  # (B,) index into the N traces
    rejected: Tensor  # (B,) index into the N traces; empty unless "rejected" is in `requires`
    mean_chosen_tokens: float  # mean over all pairs of the optimizer step of the chosen side's scored tokens


@dataclass(frozen=True, slots=True)
class Loss:
    """What an objective returns: a value a pair to be minimised, never reduced, and what is worth logging."""

    per_pair: Tensor  # (B,)
    metrics: Mapping[str, Tensor]  # name -> (B,), detached; logged as means over the pairs


class Objective(Component):
    """A loss a pair."""

    family = "objective"
    default_type = "orpo"
    types = {
        "orpo": "orpo_distill.objectives.orpo:Orpo",
        "sft": "orpo_distill.objectives.sft:Sft",
    }
    requires: ClassVar[frozenset[str]] = frozenset()
    """Inputs beyond the chosen side: "rejected" (pairs need a rejected side)."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens must be scored too."""
        return False

    @abstractmethod
    def __call__(self, batch: ScoredGroups) -> Loss:
        """The loss of every pair of the batch."""
