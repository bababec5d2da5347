"""ULD: universal logit distillation, for a teacher with other tokens than the student (arXiv 2402.12030).

At the beginning of each span of text (see `alignment`) both models have read the same and say what comes next, each
over a vocabulary of its own. Sorted by size, the two lists of probabilities are compared one by one, the shorter one
filled up with zeros: an optimal transport in which every token is as far from every other. Beside it stands the
likelihood.

A span of several tokens has the distribution of its first one times the probability of the others as they are, so that
the entry of its first token is the span's probability ("observed" merging, as in TRL's GOLD trainer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from orpo_distill.objectives import Loss, ScoredGroups, needed
from orpo_distill.objectives.sft import Sft

if TYPE_CHECKING:
    from torch import Tensor


class Uld(Sft):
    """Likelihood of the chosen traces plus `weight` (1.5 in the paper's code) times the distance, a mean over spans.

    Needs a local teacher, of any vocabulary.
    """

    requires = frozenset({"teacher_distribution"})

    weight: float = Field(1.5, ge=0)

    @property
    def across_tokenizers(self) -> bool:
        return True

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sorted_distance(student, teacher)

    def __call__(self, batch: ScoredGroups) -> Loss:
        compared, traces = needed(batch.compared), len(batch.tokens)
        nll = self.chosen_nll(batch)
        spans = compared.by_trace(compared.divergence.new_ones(len(compared.trace)), traces)
        distance = (compared.by_trace(compared.divergence, traces) / spans)[batch.chosen]
        metrics = {
            "nll_loss": nll,
            "logps/chosen": (batch.logp_sum / batch.tokens)[batch.chosen],
            "distance": distance,
            "tokens_a_span": (batch.tokens / spans)[batch.chosen],
        }
        return Loss(nll + self.weight * distance, {name: value.detach() for name, value in metrics.items()})


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of |q - p| over the probabilities of student and teacher, each sorted: (P,), from 0 to 2.

    Section 3.2 of arXiv 2402.12030. Given are log-probabilities (P, V) and (P, W).
    """
    from torch.nn.functional import pad

    width = max(student.shape[1], teacher.shape[1])
    ours, theirs = (
        pad(logps.exp().sort(dim=-1, descending=True).values, (0, width - logps.shape[1]))
        for logps in (student, teacher)
    )
    return (ours - theirs).abs().sum(-1)
