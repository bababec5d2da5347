"""The divergence of GKD: golden values, limits, gradients; and what the objective makes of spans."""

import math
from math import log

import pytest
import torch
from torch import Tensor

from orpo_distill.objectives import Compared, ScoredGroups, Writing
from orpo_distill.objectives.gkd import Gkd, jensen_shannon

STUDENT, TEACHER = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()


def drawn(seed: int, rows: int = 6, words: int = 11) -> Tensor:
    return (torch.randn(rows, words, dtype=torch.float64, generator=torch.manual_seed(seed)) * 3).log_softmax(-1)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)),
        (1.0, 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)),
        (
            0.25,  # the mixture is 0.25 * (0.5, 0.5) + 0.75 * (0.9, 0.1) = (0.8, 0.2)
            0.25 * (0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)) + 0.75 * (0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2)),
        ),
    ],
)
def test_two_words_by_hand(beta: float, expected: float) -> None:
    """P = (1/2, 1/2) is the teacher's, Q = (9/10, 1/10) the student's."""
    assert jensen_shannon(STUDENT, TEACHER, beta).item() == pytest.approx(expected, rel=1e-5)


def test_its_ends_are_the_limits_of_what_lies_between() -> None:
    student, teacher = drawn(0), drawn(1)
    near = 1e-8
    forward = jensen_shannon(student, teacher, near) / near
    assert torch.allclose(forward, jensen_shannon(student, teacher, 0.0), rtol=1e-4)
    reverse = jensen_shannon(student, teacher, 1 - near) / near
    assert torch.allclose(reverse, jensen_shannon(student, teacher, 1.0), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_zero_only_for_the_same_distributions(beta: float) -> None:
    one, other = drawn(0), drawn(1)
    assert jensen_shannon(one, one, beta).abs().max() < 1e-12
    assert (jensen_shannon(one, other, beta) > 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_what_the_teacher_holds_for_impossible_is_nothing_to_follow(beta: float) -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    found = jensen_shannon(logits.log_softmax(-1), teacher, beta)
    almost = jensen_shannon(logits.log_softmax(-1), teacher.clamp(min=-80), beta)
    assert found.item() == pytest.approx(almost.item())
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert jensen_shannon(logits.log_softmax(-1), teacher, 1.0).item() == float("inf")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_both_hold_for_impossible_says_nothing(beta: float) -> None:
    """As where two models of a family mask the padding of their vocabulary."""
    logits = drawn(2, words=4).requires_grad_()
    masked = torch.cat([logits, torch.full((6, 1), -math.inf)], -1)
    teacher = torch.cat([drawn(1, words=4), torch.full((6, 1), -math.inf)], -1)
    found = jensen_shannon(masked.log_softmax(-1), teacher.log_softmax(-1), beta)
    assert torch.allclose(found, jensen_shannon(drawn(2, words=4), drawn(1, words=4), beta))
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_finite_differences(beta: float) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.manual_seed(2), requires_grad=True)
    teacher = drawn(1, 3, 5)
    assert torch.autograd.gradcheck(
        lambda x: Gkd(beta=beta, temperature=0.7).divergence(x.log_softmax(-1), teacher), logits
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_certain_models_give_finite_gradients(beta: float) -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0], [-1e4, 0.0, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 200.0], [-1e4, 0.0, 1e4]]).log_softmax(-1)
    found = jensen_shannon(logits.log_softmax(-1), teacher, beta)
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_temperature_flattens_both() -> None:
    student, teacher = drawn(0), drawn(1)
    expected = jensen_shannon((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), 0.3)
    assert torch.equal(Gkd(beta=0.3, temperature=2).divergence(student, teacher), expected)


@pytest.mark.parametrize(("reduction", "expected"), [("sequence", [6 / 3, 4 / 1]), ("batch_tokens", [6 / 2, 4 / 2])])
def test_a_pairs_loss_is_the_mean_over_its_texts_tokens(reduction: str, expected: list[float]) -> None:
    """Trace 0 has 1 token at a divergence of 4, trace 1 has 3 of 1, 2, 3: 10 over 4 tokens if pooled, 2 a pair."""
    spans = Compared(
        trace=torch.tensor([0, 1, 1, 1]),
        logp=torch.full((4,), -1.0),
        teacher_logp=torch.full((4,), -2.0),
        divergence=torch.tensor([4.0, 1.0, 2.0, 3.0]),
    )
    batch = ScoredGroups(
        logp_sum=torch.tensor([-1.0, -3.0]),
        tokens=torch.tensor([1, 3]),
        prompt_logp_sum=torch.zeros(2),
        prompt_tokens=torch.zeros(2, dtype=torch.long),
        chosen=torch.tensor([1, 0]),
        rejected=torch.tensor([], dtype=torch.long),
        mean_chosen_tokens=2.0,
        compared=spans,
    )
    found = Gkd(reduction=reduction)(batch)
    assert found.per_pair.tolist() == pytest.approx(expected)
    assert found.metrics["teacher_logps/chosen"].tolist() == [-2.0, -2.0]


def test_without_a_share_the_student_writes_nothing() -> None:
    assert Gkd(student_share=0.0).writing is None
    assert Gkd(student_share=0.3, max_new_tokens=9).writing == Writing(9, share=0.3)
