"""The real path (groups, shared traces, micro-batches) against one padded-to-nothing pair at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_distill.groups import collate
from orpo_distill.models import load_model
from orpo_distill.objectives import Objective
from orpo_distill.records import Pair
from orpo_distill.scoring import picks_positions, score
from tests.checkpoints import ARCHITECTURES, save_tiny_checkpoint
from tests.training import objective, ragged_pairs, ready_trainer, rows_of

LOSSES = [
    objective("orpo", weight=0.7),
    objective("orpo", nll_on="full", nll_reduction="batch_tokens"),
    objective("sft"),
    objective("sft", nll_on="full"),
]


def naive_nll(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token negative log-likelihoods of prompt (but its first token) and response, from full logits, row by row."""
    ids = torch.tensor([(*prompt, *response)])
    logps = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(-1)
    tokens = -logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
    return tokens[: len(prompt) - 1], tokens[len(prompt) - 1 :]


def naive_loss(model: Any, pairs: list[Pair], folder: Path, loss: Any) -> Tensor:
    """The mean loss, pair by pair, from the equations."""
    sides = []
    for row in rows_of(folder, pairs, "rejected" in loss.requires):
        prompt, chosen = naive_nll(model, row.prompt, row.chosen)
        likelihood = torch.cat([prompt, chosen]) if loss.nll_on == "full" else chosen
        ratio = torch.zeros(())
        if row.rejected:
            p_chosen = chosen.mean().neg().exp()
            p_rejected = naive_nll(model, row.prompt, row.rejected)[1].mean().neg().exp()
            odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
            ratio = loss.weight * (1 + 1 / odds_ratio).log()
        sides.append((likelihood, ratio))
    ratio = torch.stack([ratio for _, ratio in sides]).mean()
    if loss.nll_reduction == "batch_tokens":
        return torch.cat([likelihood for likelihood, _ in sides]).mean() + ratio
    return torch.stack([likelihood.mean() for likelihood, _ in sides]).mean() + ratio


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", LOSSES, ids=["orpo", "orpo-trl", "sft", "sft-full"])
def test_step_equals_one_pair_at_a_time(architecture: str, loss: Objective, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    pairs = ragged_pairs(5)
    model = load_model(str(folder), "float32", "cpu")
    expected = naive_loss(model, pairs, folder, loss)
    expected.backward()
    trainer = ready_trainer(folder, pairs, loss, tmp_path, pairs_per_batch=5)
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = trainer.training_step(trainer.model, {})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(trainer.model), gradients(model))


def test_transformers_models_pick_positions_and_others_need_not(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", "gemma3")
    model: Any = load_model(str(folder), "float32", "cpu")
    model.config.final_logit_softcapping = 2.0
    assert picks_positions(model)
    batch = collate(rows_of(folder, ragged_pairs()), score_prompt=False)
    fast, full = (score(model, batch, picks, 1.0).logp_sum for picks in (True, False))
    assert torch.allclose(fast, full, rtol=1e-5)
    assert not picks_positions(IgnoresPositions(model)) and not picks_positions(RefusesPositions(model))


class IgnoresPositions(nn.Module):
    """A model that takes `logits_to_keep` and gives other positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def forward(self, logits_to_keep: Any = None, **inputs: Any) -> Any:
        return self.model(**inputs, logits_to_keep=0 if logits_to_keep is None else logits_to_keep.flip(1))


class RefusesPositions(IgnoresPositions):
    """A model that has no such argument."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache)
