"""daDPO: DPO with a second anchor, the teacher's own distribution (arXiv 2506.15717, equations 7 to 10).

The student is held close to its reference (beta1) and to the teacher (beta2) at once. The paper's full text could not
be read; the loss follows from its objective, its gradient's delta_te and the standard derivation:

    maximise E[r] - beta1 KL(pi || pi_ref) - beta2 KL(pi || pi_te)
    optimum: pi* ~ (pi_ref^beta1 * pi_te^beta2)^(1/beta) * exp(r/beta),   beta = beta1 + beta2
    loss:    -log sigmoid(beta * delta_theta - beta2 * delta_te)

where delta_m = log[m(y+)/pi_ref(y+)] - log[m(y-)/pi_ref(y-)]. beta2 = 0 is dDPO; beta1 = 0 makes the teacher the
reference. The paper's values of beta1 and beta2 are not known; ours are equal shares of DPO's common 0.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from orpo_distill.objectives import Loss, ScoredGroups, needed
from orpo_distill.objectives.dpo import AgainstReference, log_ratios, rewards

if TYPE_CHECKING:
    from torch import Tensor


class DaDpo(AgainstReference):
    """DPO whose margin is measured against the teacher's too. Needs a teacher that can score given text."""

    requires = frozenset({"rejected", "reference_scores", "teacher_scores"})

    beta1: float = Field(0.05, ge=0)
    beta2: float = Field(0.05, ge=0)

    @model_validator(mode="after")
    def _one_is_positive(self) -> Self:
        if self.beta1 + self.beta2 <= 0:
            raise ValueError("expected beta1 or beta2 above 0, found 0 for both")
        return self

    def __call__(self, batch: ScoredGroups) -> Loss:
        chosen, rejected = log_ratios(batch, batch.reference)
        ratios = needed(batch.teacher).logp_sum - needed(batch.reference).logp_sum
        delta_teacher = ratios[batch.chosen] - ratios[batch.rejected]
        loss = dadpo_loss(chosen, rejected, delta_teacher, self.beta1, self.beta2)
        metrics = rewards(chosen, rejected, self.beta1 + self.beta2)
        return self.with_nll(batch, loss, {**metrics, "teacher_margin": self.beta2 * delta_teacher})


def dadpo_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, delta_teacher: Tensor, beta1: float, beta2: float
) -> Tensor:
    """-log sigmoid((beta1 + beta2) * (chosen - rejected) - beta2 * delta_teacher), (B,). See the module's text.

    The ratios (B,) are the student's to the reference; `delta_teacher` (B,) is the teacher's log-ratio to the reference
    of the chosen side minus that of the rejected one. All sums over texts, in nats.
    """
    from torch.nn.functional import softplus

    return softplus(-((beta1 + beta2) * (chosen_ratios - rejected_ratios) - beta2 * delta_teacher))
