import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orpo_distill.objectives import ScoredGroups
from orpo_distill.objectives.orpo import Orpo, log_odds, odds_ratio_loss


def reference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Equations 6 and 7 of arXiv 2403.07691 as they stand, in float64."""
    p_chosen, p_rejected = chosen.double().exp(), rejected.double().exp()
    odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    return -torch.log(torch.sigmoid(torch.log(odds_ratio)))


@pytest.mark.parametrize(
    ("p_chosen", "p_rejected", "log_odds_ratio", "loss"),
    [
        (0.8, 0.5, math.log(4), math.log(5 / 4)),
        (0.4, 0.2, math.log(8 / 3), math.log(11 / 8)),
        (0.3, 0.3, 0, math.log(2)),
    ],
)
def test_golden_values(p_chosen: float, p_rejected: float, log_odds_ratio: float, loss: float) -> None:
    """Odds are p / (1 - p): 4 against 1, 2/3 against 1/4, and equal ones.

    -log sigmoid(log r) = log(1 + 1/r) is log(5/4) = 0.2231, log(11/8) = 0.3185 and log 2.
    """
    found, found_ratio = odds_ratio_loss(torch.tensor([p_chosen]).log(), torch.tensor([p_rejected]).log(), 1e-6)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert found_ratio.item() == pytest.approx(log_odds_ratio, abs=1e-6)


nll = st.floats(math.log10(1e-9), 4).map(lambda power: 10.0**power)


@given(nll, nll)
def test_finite_with_finite_gradients_from_certain_to_hopeless(chosen: float, rejected: float) -> None:
    logps = torch.tensor([[-chosen], [-rejected]], requires_grad=True)
    loss, _ = odds_ratio_loss(logps[0], logps[1], 1e-6)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and loss.item() >= 0
    assert logps.grad is not None and torch.isfinite(logps.grad).all()
    assert logps.grad[0].item() <= 0 <= logps.grad[1].item()


@given(st.floats(1e-5, 20), st.floats(1e-5, 20))
def test_agrees_with_the_definition_in_float64(chosen: float, rejected: float) -> None:
    found, _ = odds_ratio_loss(torch.tensor([-chosen]), torch.tensor([-rejected]), 1e-6)
    expected = reference_loss(torch.tensor([-chosen]), torch.tensor([-rejected]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@given(st.floats(1e-5, 30))
def test_gradient_of_the_log_odds(x: float) -> None:
    """d/dl log(p / (1 - p)) with p = exp(l) is 1 / (1 - p)."""
    logps = torch.tensor([-x], requires_grad=True)
    log_odds(logps, 1e-6).sum().backward()
    assert logps.grad is not None
    assert logps.grad.item() == pytest.approx(-1 / math.expm1(-x), rel=1e-4)


def scored(logp_sum: list[float], tokens: list[int]) -> ScoredGroups:
    """Trace 0 is chosen in both pairs; traces 1 and 2 are rejected. Each has 3 prompt tokens of -1 nat."""
    return ScoredGroups(
        logp_sum=torch.tensor(logp_sum, requires_grad=True),
        tokens=torch.tensor(tokens),
        prompt_logp_sum=torch.full((3,), -3.0),
        prompt_tokens=torch.full((3,), 3),
        chosen=torch.tensor([0, 0]),
        rejected=torch.tensor([1, 2]),
        mean_chosen_tokens=4.0,
    )


def test_loss_is_likelihood_plus_weighted_ratio() -> None:
    """Means are log 0.8 over 2 tokens, log 0.5 over 3, log 0.8 over 1; the prompt counts with `full` only."""
    batch = scored([2 * math.log(0.8), 3 * math.log(0.5), math.log(0.8)], [2, 3, 1])
    ratio = torch.tensor([math.log(5 / 4), math.log(2)])
    total = 3 - 2 * math.log(0.8)
    full = Orpo(weight=0.5, nll_on="full", nll_reduction="batch_tokens")(batch).per_pair
    assert torch.allclose(full, total / 4 + 0.5 * ratio)
    assert torch.allclose(Orpo(weight=0.5, nll_on="full")(batch).per_pair, total / 5 + 0.5 * ratio)


def test_metrics_have_trls_names_and_are_detached() -> None:
    loss = Orpo(weight=2.0)(scored([2 * math.log(0.8), 3 * math.log(0.5), -1e-9], [2, 3, 1]))
    expected = {
        "nll_loss": [(3 - 2 * math.log(0.8)) / 5] * 2,
        "logps/chosen": [math.log(0.8)] * 2,
        "logps/rejected": [math.log(0.5), -1e-9],
        "rewards/chosen": [2 * math.log(0.8)] * 2,
        "rewards/rejected": [2 * math.log(0.5), -2e-9],
        "rewards/accuracies": [1.0, 0.0],
        "rewards/margins": [2 * math.log(1.6), 2 * math.log(0.8) + 2e-9],
        "log_odds_ratio": [-math.log(5 / 4), -math.log1p(1e6 / 4)],
        "log_odds_chosen": [math.log(4), math.log(4e-6)],
        "clamped": [0.0, 1.0],
    }
    assert set(loss.metrics) == set(expected)
    for name, values in expected.items():
        assert loss.metrics[name].tolist() == pytest.approx(values, rel=1e-4), name
        assert not loss.metrics[name].requires_grad
