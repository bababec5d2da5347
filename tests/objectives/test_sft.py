import pytest
import torch

from orpo_distill.objectives import ScoredGroups
from orpo_distill.objectives.sft import Sft


def scored(prompt: bool) -> ScoredGroups:
    """Two chosen traces of 2 and 6 tokens at -1 and -2 nats a token, and a prompt of 4 tokens at -0.5."""
    return ScoredGroups(
        logp_sum=torch.tensor([-2.0, -12.0], requires_grad=True),
        tokens=torch.tensor([2, 6]),
        prompt_logp_sum=torch.full((2,), -2.0 if prompt else 0.0),
        prompt_tokens=torch.full((2,), 4 if prompt else 0),
        chosen=torch.tensor([0, 1]),
        rejected=torch.tensor([], dtype=torch.long),
        mean_chosen_tokens=8.0 if prompt else 4.0,
    )


@pytest.mark.parametrize(
    ("nll_on", "nll_reduction", "expected"),
    [
        ("response", "sequence", [2 / 2, 12 / 6]),
        ("response", "batch_tokens", [2 / 4, 12 / 4]),  # mean over pairs: 14 nats over 8 tokens
        ("full", "sequence", [4 / 6, 14 / 10]),
        ("full", "batch_tokens", [4 / 8, 14 / 8]),  # mean over pairs: 18 nats over 16 tokens
    ],
)
def test_likelihood(nll_on: str, nll_reduction: str, expected: list[float]) -> None:
    objective = Sft.model_validate({"nll_on": nll_on, "nll_reduction": nll_reduction})
    loss = objective(scored(objective.scores_prompt))
    assert loss.per_pair.tolist() == pytest.approx(expected)
    assert loss.metrics["nll_loss"].tolist() == pytest.approx(expected)
    assert loss.metrics["logps/chosen"].tolist() == [-1.0, -2.0]


def test_needs_no_rejected_side() -> None:
    assert "rejected" not in Sft.requires
