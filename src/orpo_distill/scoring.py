"""Model and groups to the log-probability of every trace: the hot path of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from orpo_distill.groups import Batch
from orpo_distill.objectives import ScoredGroups


def score(model: nn.Module, batch: Batch, picks_positions: bool, mean_chosen_tokens: float) -> ScoredGroups:
    """Score each of the batch's N traces once. `picks_positions` is what the function of that name said.

    Rows are padded on the right, where a causal model needs no attention mask. Only the wanted positions go through
    the output layer; the log-softmax is in float32.
    """
    wanted = {"logits_to_keep": batch.scored} if picks_positions else {}
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, **wanted).logits
    if not picks_positions:
        logits = logits[batch.scored]
    labels = batch.input_ids.roll(-1, dims=1)[batch.scored]
    values = -cross_entropy(logits.float(), labels, reduction="none")  # (M,), M = positions wanted
    logps = torch.zeros(batch.scored.shape, device=values.device).masked_scatter(batch.scored, values)  # (N, T)
    in_prompt = batch.scored & ~batch.response
    return ScoredGroups(
        logp_sum=(logps * batch.response).sum(1),
        tokens=batch.response.sum(1),
        prompt_logp_sum=(logps * in_prompt).sum(1),
        prompt_tokens=in_prompt.sum(1),
        chosen=batch.chosen,
        rejected=batch.rejected,
        mean_chosen_tokens=mean_chosen_tokens,
    )


def picks_positions(model: nn.Module) -> bool:
    """Whether `model(..., logits_to_keep=mask)` gives the model's own logits at the mask's positions, found by trying.

    transformers' models do; one that brings its own code may not, and then all its logits are computed.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embeddings.weight.device
    input_ids = torch.arange(8, device=device).view(2, 4) % embeddings.weight.shape[0]
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=input_ids, use_cache=False).logits[mask]
            found = model(input_ids=input_ids, use_cache=False, logits_to_keep=mask).logits
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False
    finally:
        model.train(training)
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
