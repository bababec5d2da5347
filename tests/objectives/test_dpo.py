"""DPO and its relatives on given log-probabilities: worked values, limits, and the optimum that daDPO promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from orpo_distill.errors import ConfigError
from orpo_distill.loading import parse_component
from orpo_distill.objectives import Objective
from orpo_distill.objectives.dadpo import DaDpo, dadpo_loss
from orpo_distill.objectives.dpo import Dpo, dpo_loss
from orpo_distill.objectives.flex_dpo import FlexDpo
from orpo_distill.objectives.mallows_dpo import MallowsDpo, dispersion
from orpo_distill.objectives.mallows_orpo import MallowsOrpo
from orpo_distill.objectives.orpo import Orpo
from orpo_distill.objectives.sppo import Sppo
from tests.objectives.against_reference import given, scored

NATS = st.floats(-300, 0)
STUDENT, REFERENCE, TEACHER = (-8.0, -6.0, -9.0), given(-10.0, -4.0, -9.5), given(-5.0, -7.0, -6.0)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_by_hand() -> None:
    """Log-ratios are 2, -2 and 0.5, so the margins are 4 and 1.5."""
    loss = Dpo(beta=0.5)(scored(STUDENT, REFERENCE))
    assert loss.per_pair.tolist() == pytest.approx([-log_sigmoid(2.0), -log_sigmoid(0.75)])
    expected = {
        "nll_loss": [2.0, 2.0],
        "logps/chosen": [-2.0, -2.0],
        "logps/rejected": [-3.0, -1.8],
        "rewards/chosen": [1.0, 1.0],
        "rewards/rejected": [-1.0, 0.25],
        "rewards/accuracies": [1.0, 1.0],
        "rewards/margins": [2.0, 0.75],
    }
    assert set(loss.metrics) == set(expected)
    for name, values in expected.items():
        assert loss.metrics[name].tolist() == pytest.approx(values), name
        assert not loss.metrics[name].requires_grad


def test_likelihood_is_added_with_its_weight() -> None:
    """The chosen side has 2 nats a token."""
    plain = Dpo(beta=0.5)(scored(STUDENT, REFERENCE)).per_pair
    both = Dpo(beta=0.5, nll_weight=0.3)(scored(STUDENT, REFERENCE)).per_pair
    assert (both - plain).tolist() == pytest.approx([0.6, 0.6])
    assert Dpo(nll_weight=0.3, nll_on="full").scores_prompt and not Dpo(nll_on="full").scores_prompt


def test_dadpo_by_hand() -> None:
    """The teacher's log-ratios to the reference are 5, -3 and 3.5: it leads by 8 and 1.5."""
    loss = DaDpo(beta1=0.3, beta2=0.2)(scored(STUDENT, REFERENCE, TEACHER))
    logits = [0.5 * 4 - 0.2 * 8, 0.5 * 1.5 - 0.2 * 1.5]
    assert loss.per_pair.tolist() == pytest.approx([-log_sigmoid(x) for x in logits])
    assert loss.metrics["teacher_margin"].tolist() == pytest.approx([1.6, 0.3])


@drawn(st.lists(NATS, min_size=9, max_size=9))
def test_dadpo_without_beta2_is_ddpo_to_the_last_bit(nats: list[float]) -> None:
    student = (nats[0], nats[1], nats[2])
    reference, teacher = given(*nats[3:6]), given(*nats[6:])
    found = DaDpo(beta1=0.1, beta2=0.0)(scored(student, reference, teacher))
    expected = Dpo(beta=0.1)(scored(student, reference))
    assert torch.equal(found.per_pair, expected.per_pair)


@drawn(st.lists(NATS, min_size=9, max_size=9))
def test_dadpo_without_beta1_has_the_teacher_as_its_reference(nats: list[float]) -> None:
    student = (nats[0], nats[1], nats[2])
    reference, teacher = given(*nats[3:6]), given(*nats[6:])
    found = DaDpo(beta1=0.0, beta2=0.1)(scored(student, reference, teacher))
    assert torch.allclose(found.per_pair, Dpo(beta=0.1)(scored(student, teacher)).per_pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.5, 0.3), (0.4, 0.0), (0.0, 0.4)])
def test_dadpo_reaches_the_optimum_of_its_objective(beta1: float, beta2: float) -> None:
    """Eight answers, all pairs, preferences as Bradley and Terry's model draws them from a reward.

    The minimum of the expected loss must be pi* ~ (pi_ref^beta1 pi_te^beta2)^(1/beta) exp(r/beta).
    """
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(8, generator=generator, dtype=torch.float64)
    reference, teacher = torch.randn(2, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    first, second = (~torch.eye(8, dtype=torch.bool)).nonzero().unbind(1)
    wins = torch.sigmoid(reward[first] - reward[second])  # P(first is preferred)
    delta_teacher = (teacher - reference)[first] - (teacher - reference)[second]
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratios = logits.log_softmax(-1) - reference
        loss = (wins * dadpo_loss(ratios[first], ratios[second], delta_teacher, beta1, beta2)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    beta = beta1 + beta2
    expected = ((beta1 * reference + beta2 * teacher + reward) / beta).log_softmax(-1)
    assert torch.allclose(logits.detach().log_softmax(-1), expected, atol=1e-4)


def test_flex_dpo_weighs_each_side() -> None:
    loss = FlexDpo(beta_chosen=0.5, beta_rejected=0.25)(scored(STUDENT, REFERENCE))
    assert loss.per_pair.tolist() == pytest.approx([-log_sigmoid(1.5), -log_sigmoid(0.875)])
    equal = FlexDpo(beta_chosen=0.5, beta_rejected=0.5)(scored(STUDENT, REFERENCE)).per_pair
    assert torch.allclose(equal, Dpo(beta=0.5)(scored(STUDENT, REFERENCE)).per_pair)


def test_sppo_by_hand() -> None:
    """Targets are 5 and -5 nats; the ratios 2, -2 and 0.5."""
    loss = Sppo(beta=0.1)(scored(STUDENT, REFERENCE))
    assert loss.per_pair.tolist() == pytest.approx([9.0 + 9.0, 9.0 + 5.5**2])
    assert Sppo().reference_policy == "latest" and Dpo().reference_policy == "start"


def test_sppo_is_least_where_both_sides_are_on_their_targets() -> None:
    batch = scored((-5.0, -9.0, -14.5), REFERENCE)
    Sppo(beta=0.1)(batch).per_pair[0].backward()
    assert batch.logp_sum.grad is not None and batch.logp_sum.grad.abs().max() == 0


def test_mallows_scales_the_margin_by_how_sure_the_reference_is() -> None:
    """Pair 1: entropies 0.2 and 0.4, mean 0.3; pair 2: 0.2 and 0.8, mean 0.5."""
    reference = given(-10.0, -4.0, -9.5, entropy=(0.2, 0.4, 0.8))
    loss = MallowsDpo(beta=0.5, neg_log_dispersion_mean=2.0)(scored(STUDENT, reference))
    scale = [-2 * math.log(0.3), -2 * math.log(0.5)]
    expected = [-log_sigmoid(0.5 * scale[0] * 4.0), -log_sigmoid(0.5 * scale[1] * 1.5)]
    assert loss.per_pair.tolist() == pytest.approx(expected)
    assert loss.metrics["dispersion"].tolist() == pytest.approx(scale)


def test_orpos_weight_may_follow_the_dispersion() -> None:
    """Pairs with entropies 0.5 and 0.5 have c = log 2 with phi 1: ORPO with that weight."""
    found = MallowsOrpo(weight=0.7, neg_log_dispersion_mean=1.0)(scored(STUDENT, REFERENCE))
    assert torch.allclose(found.per_pair, Orpo(weight=0.7 * math.log(2))(scored(STUDENT)).per_pair)


def test_a_reference_that_is_certain_gives_a_finite_scale() -> None:
    assert dispersion(torch.zeros(1), torch.zeros(1), 1.0).isfinite().all()
    assert dispersion(torch.ones(1), torch.ones(1), 1.0).item() == 0


@drawn(NATS, NATS, st.sampled_from([0.001, 0.1, 5.0]))
def test_finite_with_finite_gradients(chosen: float, rejected: float, beta: float) -> None:
    ratios = torch.tensor([[chosen], [rejected]], requires_grad=True)
    loss = dpo_loss(ratios[0], ratios[1], beta)
    loss.sum().backward()
    assert loss.isfinite().all() and ratios.grad is not None and ratios.grad.isfinite().all()
    assert ratios.grad[0].item() <= 0 <= ratios.grad[1].item()


@pytest.mark.parametrize("loss", [Dpo(), DaDpo(), FlexDpo(), Sppo(), MallowsDpo(), MallowsOrpo()])
def test_all_ask_for_the_scores_that_they_use(loss: Objective) -> None:
    assert loss.requires >= {"rejected", "reference_scores"}
    assert ("teacher_scores" in loss.requires) == isinstance(loss, DaDpo)
    teacher = TEACHER if "teacher_scores" in loss.requires else None
    assert loss(scored(STUDENT, REFERENCE, teacher)).per_pair.shape == (2,)
    with pytest.raises(ValueError, match="expected what the objective requires, found none"):
        loss(scored(STUDENT))


def test_weights_that_make_no_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected beta1 or beta2 above 0, found 0 for both"):
        parse_component(Objective, {"type": "dadpo", "beta1": 0, "beta2": 0}, "--objective")
