"""Objectives: losses on scored groups. One file each: a pure function on tensors, and the component that calls it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orpo_distill.component import Component

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GivenScores:
    """What another model says of the same N traces, read from a score stage. Float32, in nats, without gradients."""

    logp_sum: Tensor  # (N,) log-probability of the whole text, its end of sequence included unless it was cut
    entropy: Tensor  # (N,) mean over the text's tokens of the next-token distribution's entropy over log V, 0 to 1;
    # NaN where a server scored, which does not tell it


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
    reference: GivenScores | None = None  # set if "reference_scores" is in `requires`
    teacher: GivenScores | None = None  # set if "teacher_scores" is in `requires`


@dataclass(frozen=True, slots=True)
class Loss:
    """What an objective returns: a value a pair to be minimised, never reduced, and what is worth logging."""

    per_pair: Tensor  # (B,)
    metrics: Mapping[str, Tensor]  # name -> (B,), detached; logged as means over the pairs


INPUTS = {
    "rejected": "pairs with a rejected side",
    "reference_scores": "log-probabilities of both sides under a reference, made by a score stage",
    "teacher_scores": "the same under the teacher, which must be able to score given text",
}


class Objective(Component):
    """A loss a pair."""

    family = "objective"
    default_type = "orpo"
    types = {
        "dadpo": "orpo_distill.objectives.dadpo:DaDpo",
        "dpo": "orpo_distill.objectives.dpo:Dpo",
        "flex_dpo": "orpo_distill.objectives.flex_dpo:FlexDpo",
        "mallows_dpo": "orpo_distill.objectives.mallows_dpo:MallowsDpo",
        "mallows_orpo": "orpo_distill.objectives.mallows_orpo:MallowsOrpo",
        "orpo": "orpo_distill.objectives.orpo:Orpo",
        "sft": "orpo_distill.objectives.sft:Sft",
        "sppo": "orpo_distill.objectives.sppo:Sppo",
    }
    requires: ClassVar[frozenset[str]] = frozenset()
    """Inputs beyond the chosen side, out of INPUTS."""

    @property
    def reference_policy(self) -> Literal["start", "latest"]:
        """Whose log-probabilities the reference's are: the student that round 1, or that each round, starts from."""
        return "start"

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens must be scored too."""
        return False

    @abstractmethod
    def __call__(self, batch: ScoredGroups) -> Loss:
        """The loss of every pair of the batch."""
