"""GKD: the teacher's distribution at every token of its own texts and of the student's (arXiv 2306.13649).

The student is held to the teacher by a generalised Jensen-Shannon divergence at each position, partly on the chosen
traces and partly on texts that it writes itself in the step, where it sees what the teacher would have done in its own
mistakes. No gradient goes through the writing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from orpo_distill.objectives import Loss, Objective, ScoredGroups, Writing, needed

if TYPE_CHECKING:
    from torch import Tensor


LEAST = -1e30  # a log-probability whose probability is 0


class Gkd(Objective):
    """The divergence, the mean over a text's tokens. Needs a local teacher with the student's vocabulary.

    `beta` 0 is the forward KL divergence (teacher to student), 1 the reverse one, as in TRL. `student_share` is the
    share of problems, of each step, whose texts are the student's of that moment instead of the chosen traces (lambda
    in the paper, a coin a batch in TRL). `reduction: batch_tokens` (TRL's) takes the mean over all tokens of the step.
    """

    requires = frozenset({"teacher_distribution"})

    beta: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)  # of both distributions in the divergence
    reduction: Literal["sequence", "batch_tokens"] = "sequence"
    student_share: float = Field(0.5, ge=0, le=1)
    sampling_temperature: float = Field(1.0, gt=0)
    max_new_tokens: PositiveInt = 256  # of the student's texts

    @property
    def writing(self) -> Writing | None:
        if not self.student_share:
            return None
        return Writing(self.max_new_tokens, self.student_share, self.sampling_temperature)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.temperature != 1:
            student = (student / self.temperature).log_softmax(-1)
            teacher = (teacher / self.temperature).log_softmax(-1)
        return jensen_shannon(student, teacher, self.beta)

    def __call__(self, batch: ScoredGroups) -> Loss:
        compared = needed(batch.compared)
        total = compared.by_trace(compared.divergence, len(batch.tokens))[batch.chosen]
        tokens = batch.tokens[batch.chosen]
        loss = total / (tokens if self.reduction == "sequence" else batch.mean_chosen_tokens)
        logps = batch.logp_sum[batch.chosen] / tokens
        teacher = compared.by_trace(compared.teacher_logp, len(batch.tokens))[batch.chosen] / tokens
        metrics = {"divergence": total / tokens, "logps/chosen": logps, "teacher_logps/chosen": teacher}
        return Loss(loss, {name: value.detach() for name, value in metrics.items()})


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta * KL(P || M) + (1 - beta) * KL(Q || M), M = beta * P + (1 - beta) * Q: (P,). Equation 1 of arXiv 2306.13649.

    P is the teacher's distribution and Q the student's, given as log-probabilities (P, V), in nats. For beta 0 it is
    KL(P || Q) and for 1 KL(Q || P), the limits of its ratio to beta and to 1 - beta.
    """
    import torch

    if beta == 0:
        return divergence_from(teacher, student)
    if beta == 1:
        return divergence_from(student, teacher)
    student, teacher = _filled(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * divergence_from(teacher, mixture) + (1 - beta) * divergence_from(student, mixture)


def divergence_from(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other), (P,), of distributions given as log-probabilities (P, V), in nats.

    An entry that `one` holds for impossible (-inf) counts as 0, the limit of p log p.
    """
    one, other = _filled(one, other)
    return (one.exp() * (one.clamp(min=LEAST) - other)).sum(-1)


def _filled(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """What both hold for impossible as LEAST, whose differences and gradients are numbers."""
    both = one.isneginf() & other.isneginf()
    return one.masked_fill(both, LEAST), other.masked_fill(both, LEAST)
