"""Objectives: losses on scored groups. One file each: a pure function on tensors, and the component that calls it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from orpo_distill.component import Component

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GivenScores:
    """What another model says of the same N traces, read from a score stage. Float32, in nats, without gradients."""

    logp_sum: Tensor  # (N,) log-probability of the whole text, its end of sequence included unless it was cut
    entropy: Tensor  # (N,) mean over the text's tokens of the next-token distribution's entropy over log V, 0 to 1;
    # NaN where a server scored, which does not tell it


@dataclass(frozen=True, slots=True)
class Compared:
    """P spans of the N traces, trace by trace and in the text's order, as student and teacher see them. Float32, nats.

    A span is a token; where the teacher has other tokens, the shortest text that begins and ends with tokens of both.
    """

    trace: Tensor  # (P,) the trace that the span is part of
    logp: Tensor  # (P,) log-probability of the span under the student
    teacher_logp: Tensor  # (P,) the same under the teacher, without gradients
    divergence: Tensor  # (P,) what `Objective.divergence` says of the distributions that the span was picked from

    def by_trace(self, values: Tensor, traces: int) -> Tensor:
        """Values of the spans (P,), summed for each trace: (N,)."""
        return values.new_zeros(traces).index_add(0, self.trace, values)


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
    rollout: Tensor | None = None  # (B,) index of what the student wrote for the pair, else of the chosen side
    mean_rollout_tokens: float = 1.0  # mean over all pairs of the optimizer step of the tokens of that
    compared: Compared | None = None  # set if "teacher_distribution" is in `requires`


@dataclass(frozen=True, slots=True)
class Loss:
    """What an objective returns: a value a pair to be minimised, never reduced, and what is worth logging."""

    per_pair: Tensor  # (B,)
    metrics: Mapping[str, Tensor]  # name -> (B,), detached; logged as means over the pairs


def needed(given: T | None) -> T:
    """What the objective's `requires` asks for."""
    if given is None:
        raise ValueError("expected what the objective requires, found none in the batch")
    return given


INPUTS = {
    "rejected": "pairs with a rejected side",
    "reference_scores": "log-probabilities of both sides under a reference, made by a score stage",
    "teacher_scores": "the same under the teacher, which must be able to score given text",
    "teacher_distribution": "the teacher's whole next-token distribution, from a local checkpoint",
}


@dataclass(frozen=True, slots=True)
class Writing:
    """How the student in training writes texts of its own, anew in every step."""

    max_new_tokens: int
    share: float = 1.0  # of a step's problems: a coin each decides whether texts are written for its pairs
    temperature: float = 1.0
    teacher_share: float = 0.0  # alpha: each token is drawn from alpha * teacher + (1 - alpha) * student
    keeps_chosen: bool = False  # score the chosen side too; otherwise the text takes its place


class Objective(Component):
    """A loss a pair."""

    family = "objective"
    default_type = "orpo"
    types = {
        "dadpo": "orpo_distill.objectives.dadpo:DaDpo",
        "dpo": "orpo_distill.objectives.dpo:Dpo",
        "flex_dpo": "orpo_distill.objectives.flex_dpo:FlexDpo",
        "gkd": "orpo_distill.objectives.gkd:Gkd",
        "mallows_dpo": "orpo_distill.objectives.mallows_dpo:MallowsDpo",
        "mallows_orpo": "orpo_distill.objectives.mallows_orpo:MallowsOrpo",
        "minillm": "orpo_distill.objectives.minillm:MiniLlm",
        "orpo": "orpo_distill.objectives.orpo:Orpo",
        "sft": "orpo_distill.objectives.sft:Sft",
        "sppo": "orpo_distill.objectives.sppo:Sppo",
        "uld": "orpo_distill.objectives.uld:Uld",
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

    @property
    def writing(self) -> Writing | None:
        """How the student writes texts of its own while it is trained, if it does."""
        return None

    @property
    def across_tokenizers(self) -> bool:
        """Whether the teacher's tokens may differ from the student's, so that spans of text are compared."""
        return False

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How far the student's distributions are from the teacher's: (P,), with gradients to the student.

        Called, on parts of a batch, where "teacher_distribution" is in `requires`. `student` (P, V) and `teacher`
        (P, W) are log-probabilities, float32, of what comes next. Where a span has several tokens they are those of its
        first one, plus the log-probability of the others: so the entry of the token that is there is the span's own.
        """
        raise NotImplementedError(f"{type(self).__name__} requires teacher_distribution and has no `divergence`")

    @abstractmethod
    def __call__(self, batch: ScoredGroups) -> Loss:
        """The loss of every pair of the batch."""
