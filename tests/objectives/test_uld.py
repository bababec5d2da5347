"""The sorted distance of ULD: golden values and gradients."""

import pytest
import torch

from orpo_distill.objectives import Compared, ScoredGroups
from orpo_distill.objectives.uld import Uld, sorted_distance


def test_by_hand() -> None:
    """(0.7, 0.2, 0.1) against (0.6, 0.4): 0.1 + 0.2 + 0.1, whatever the order of the words."""
    student = torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]).log()
    teacher = torch.tensor([[0.4, 0.6], [0.6, 0.4]]).log()
    assert sorted_distance(student, teacher).tolist() == pytest.approx([0.4, 0.4])
    assert sorted_distance(teacher, student).tolist() == pytest.approx([0.4, 0.4])


def test_from_nothing_to_two() -> None:
    certain, spread = torch.tensor([[0.0, -1e4]]), torch.full((1, 1000), 1e-3).log()
    assert sorted_distance(certain, certain).item() == 0
    assert sorted_distance(certain, spread).item() == pytest.approx(2, abs=0.01)


def test_gradients_are_those_of_finite_differences() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    teacher = torch.randn(4, 9, dtype=torch.float64, generator=torch.manual_seed(1)).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: sorted_distance(x.log_softmax(-1), teacher), logits)


def test_likelihood_and_distance_a_span() -> None:
    """Trace 0: 6 nats over 3 tokens, distances 0.5 and 1.5 of its two spans."""
    spans = Compared(torch.tensor([0, 0]), torch.zeros(2), torch.zeros(2), torch.tensor([0.5, 1.5]))
    batch = ScoredGroups(
        logp_sum=torch.tensor([-6.0]),
        tokens=torch.tensor([3]),
        prompt_logp_sum=torch.zeros(1),
        prompt_tokens=torch.zeros(1, dtype=torch.long),
        chosen=torch.tensor([0]),
        rejected=torch.tensor([], dtype=torch.long),
        mean_chosen_tokens=3.0,
        compared=spans,
    )
    found = Uld(weight=0.5)(batch)
    assert found.per_pair.tolist() == pytest.approx([2 + 0.5 * 1.0])
    assert found.metrics["tokens_a_span"].tolist() == pytest.approx([1.5])
