"""MiniLLM's loss against enumeration of every text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from orpo_distill.objectives.minillm import later_tokens, minillm_loss

VOCABULARY, LONGEST, END = 5, 3, 0
Text = tuple[int, ...]


def every_text() -> list[Text]:
    """Of up to three of five tokens, one of which ends a text: 1 + 4 + 4 * 4 * 5 = 85."""
    found: dict[Text, None] = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LONGEST):
        found[tokens[: tokens.index(END) + 1] if END in tokens else tokens] = None
    return list(found)


TEXTS = every_text()
OWNER = torch.tensor([owner for owner, text in enumerate(TEXTS) for _ in text])
TOKENS = torch.tensor([token for text in TEXTS for token in text])


class Model:
    """A softmax model in float64: logits by the token before and by the place, so that states share parameters."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = ((VOCABULARY + 1, VOCABULARY), (LONGEST, VOCABULARY))
        self.parameters = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def after(self, state: Text) -> Tensor:
        """Log-probabilities of the next token, (V,)."""
        by_token, by_place = self.parameters
        return (by_token[state[-1] if state else VOCABULARY] + by_place[len(state)]).log_softmax(-1)

    def scored(self) -> Tensor:
        """The distribution that each token of every text is drawn from, (M, V)."""
        return torch.stack([self.after(text[:place]) for text in TEXTS for place in range(len(text))])

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(value, self.parameters, retain_graph=True)])


@dataclass
class Case:
    """A student q, a teacher p, and the distribution a p + (1 - a) q that texts are drawn from."""

    share: float
    student: Model
    teacher: Model

    @classmethod
    def of(cls, share: float = 0.0, seed: int = 0) -> Case:
        return cls(share, Model(seed), Model(seed + 100))

    def __post_init__(self) -> None:
        self.q, self.p = self.student.scored(), self.teacher.scored().detach()
        self.mixture = (self.share * self.p.exp() + (1 - self.share) * self.q.detach().exp()).log()

    def picked(self, scored: Tensor) -> Tensor:
        return scored.gather(1, TOKENS[:, None])[:, 0]

    def texts(self, tokens: Tensor) -> Tensor:
        """Sums over each text's tokens, (85,)."""
        return tokens.new_zeros(len(TEXTS)).index_add(0, OWNER, tokens)

    def estimate(self, single: Tensor | float = 1.0, **options: object) -> Tensor:
        """The expected gradient of the loss, over every text that can be drawn."""
        divergence = (self.q.exp() * (self.q - self.p)).sum(-1)
        q, p = self.picked(self.q), self.picked(self.p)
        loss = minillm_loss(q, p, divergence, OWNER, teacher_share=self.share, **options)
        loss = loss + (single - 1.0) * divergence
        probability = self.texts(self.picked(self.mixture)).exp()
        assert probability.sum().item() == pytest.approx(1)
        return self.student.gradient((probability * self.texts(loss)).sum())

    def exact(self) -> Tensor:
        """The gradient of the sum over all texts of q(y) log(q(y) / p(y))."""
        q, p = (self.texts(self.picked(scored)) for scored in (self.q, self.p))
        return self.student.gradient((q.exp() * (q - p)).sum())


def test_there_are_85_texts() -> None:
    assert len(TEXTS) == 85


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [None, 0.2])
def test_without_a_share_of_the_teacher_the_gradient_is_that_of_the_reverse_kl_of_texts(
    seed: int, clip: float | None
) -> None:
    """Clipping never acts: the ratio is 1."""
    case = Case.of(seed=seed)
    torch.testing.assert_close(case.estimate(clip=clip), case.exact(), rtol=1e-10, atol=1e-12)


def test_length_normalisation_changes_the_gradient() -> None:
    case = Case.of()
    assert (case.estimate(length_norm=True) - case.exact()).abs().max() > 0.01


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_weights_a_token_correct_for_each_token_alone(share: float) -> None:
    """What holds: states and later tokens come from the mixture, the token itself as if from the student.

    That is the gradient of the sum over t of E[sum over y_t of q(y_t) (log(q(y_t)/p(y_t)) - V(y_1 ... y_t))], where the
    expectation is over y_1 ... y_(t-1) from the mixture, and V, the expected later returns under it, is a constant.
    """
    case = Case.of(share)

    def mixture(state: Text) -> Tensor:
        q, p = case.student.after(state).exp(), case.teacher.after(state).exp()
        return (share * p + (1 - share) * q).detach()

    def value(state: Text) -> Tensor:
        """Expected sum of log p - log q over what follows the state."""
        if len(state) == LONGEST or END in state:
            return torch.zeros((), dtype=torch.float64)
        reward = (case.teacher.after(state) - case.student.after(state)).detach()
        return sum(
            (mixture(state)[y] * (reward[y] + value((*state, y))) for y in range(VOCABULARY)),
            torch.zeros((), dtype=torch.float64),
        )

    def surrogate(state: Text, probability: Tensor) -> Tensor:
        if len(state) == LONGEST or END in state:
            return torch.zeros((), dtype=torch.float64)
        q, p = case.student.after(state), case.teacher.after(state).detach()
        later = torch.stack([value((*state, y)) for y in range(VOCABULARY)])
        here = probability * (q.exp() * (q - p - later)).sum()
        # (q - p) inside the sum is differentiated too; sum of q * d log q is 0, so that is the exact single step
        rest = [surrogate((*state, y), probability * mixture(state)[y]) for y in range(VOCABULARY)]
        return here + torch.stack(rest).sum()

    expected = case.student.gradient(surrogate((), torch.ones((), dtype=torch.float64)))
    torch.testing.assert_close(case.estimate(), expected, rtol=1e-10, atol=1e-12)
    assert (expected - case.exact()).abs().max() > 0.01


def test_the_bias_of_weights_a_token_is_of_the_order_of_the_teachers_share() -> None:
    bias = [(Case.of(share).estimate() - Case.of(share).exact()).norm().item() for share in (0.02, 0.01, 0.005)]
    assert bias[0] / bias[1] == pytest.approx(2, abs=0.1) and bias[1] / bias[2] == pytest.approx(2, abs=0.1)


def test_the_papers_weight_on_the_single_step_part_changes_nothing_on_average() -> None:
    """E[q/p~] = 1 over the token, of which the part at its place does not depend: left out, it is only less noisy."""
    case = Case.of(0.4)
    weight = (case.picked(case.q) - case.picked(case.mixture)).exp().detach()
    torch.testing.assert_close(case.estimate(single=weight), case.estimate(), rtol=1e-10, atol=1e-12)


def test_products_of_weights_would_be_exact() -> None:
    """Weights of a whole text, which the paper gives up for their variance."""
    case = Case.of(0.4)
    whole = case.texts((case.picked(case.q) - case.picked(case.mixture)).detach()).exp()
    drawn = case.texts(case.picked(case.mixture)).exp()
    divergence = (case.q.exp() * (case.q - case.p)).sum(-1)
    loss = case.texts(minillm_loss(case.picked(case.q), case.picked(case.p), divergence, OWNER))
    torch.testing.assert_close(case.student.gradient((drawn * whole * loss).sum()), case.exact())


def test_later_tokens_are_those_of_the_same_text() -> None:
    """Texts of three tokens, of one, and of two."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    sums, counts = later_tokens(values, torch.tensor([0, 0, 0, 1, 2, 2]))
    assert sums.tolist() == [6, 4, 0, 0, 32, 0]
    assert counts.tolist() == [2, 1, 0, 0, 1, 0]


def gradient_of(loss: Callable[[Tensor], Tensor], logps: list[float]) -> list[float]:
    q = torch.tensor(logps, requires_grad=True)
    (found,) = torch.autograd.grad(loss(q).sum(), q)
    return found.tolist()


def test_returns_of_a_text_of_three_tokens() -> None:
    """log p - log q is 1, -2 and 0.5: R is -1.5, 0.5 and 0, normalised -0.75, 0.5 and 0; each with a minus sign."""
    q, p, owner = [-1.0, -2.0, -3.0], torch.tensor([0.0, -4.0, -2.5]), torch.zeros(3, dtype=torch.long)
    nothing = torch.zeros(3)
    plain = gradient_of(lambda logps: minillm_loss(logps, p, nothing, owner), q)
    assert plain == pytest.approx([1.5, -0.5, 0])
    normalised = gradient_of(lambda logps: minillm_loss(logps, p, nothing, owner, length_norm=True), q)
    assert normalised == pytest.approx([0.75, -0.5, 0])


@pytest.mark.parametrize(
    ("q", "p", "later", "weight"),
    [
        (0.2, 0.6, 1.0, 0.2 / 0.28),  # 0.714: below 0.8, but the return is positive
        (0.2, 0.6, -1.0, 0.0),  # below 0.8, and the return would push it further down
        (0.2, 0.1, -1.0, 0.2 / 0.18),  # 1.11: within 0.2 of 1
        (0.6, 0.01, 1.0, 0.0),  # 1.245: above 1.2, and the return would push it further up
        (0.6, 0.01, -1.0, 0.6 / 0.482),  # above 1.2, but the return is negative
    ],
)
def test_importance_weights_and_where_they_are_clipped(q: float, p: float, later: float, weight: float) -> None:
    """At a share of 0.2: q / (0.2 p + 0.8 q). The first of two tokens; the second's reward is the first's return."""
    logps = torch.tensor([q, 0.5]).log().tolist()
    teacher = torch.tensor([p, 0.5]).log() + torch.tensor([0.0, later])
    owner = torch.zeros(2, dtype=torch.long)
    first, _ = gradient_of(lambda logps: minillm_loss(logps, teacher, torch.zeros(2), owner, 0.2, 0.2), logps)
    assert first == pytest.approx(-weight * later, abs=1e-6)


def test_tokens_that_one_side_finds_impossible_keep_gradients_finite() -> None:
    logps = [-1e-7, -80.0, -200.0]
    teacher, owner = torch.tensor([-300.0, -1e-7, -300.0]), torch.zeros(3, dtype=torch.long)
    for share in (0.0, 0.2):
        found = gradient_of(lambda q, share=share: minillm_loss(q, teacher, torch.zeros(3), owner, share, 0.2), logps)
        assert torch.tensor(found).isfinite().all()
