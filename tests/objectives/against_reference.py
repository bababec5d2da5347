"""Scored groups for tests of the losses that compare with a reference."""

from __future__ import annotations

import torch

from orpo_distill.objectives import GivenScores, ScoredGroups


def given(*logp_sum: float, entropy: tuple[float, ...] = (0.5, 0.5, 0.5)) -> GivenScores:
    return GivenScores(torch.tensor(logp_sum), torch.tensor(entropy))


def scored(
    logp_sum: tuple[float, float, float],
    reference: GivenScores | None = None,
    teacher: GivenScores | None = None,
) -> ScoredGroups:
    """Trace 0 (4 tokens) is chosen in both pairs; traces 1 (2 tokens) and 2 (5 tokens) are rejected."""
    return ScoredGroups(
        logp_sum=torch.tensor(logp_sum, requires_grad=True),
        tokens=torch.tensor([4, 2, 5]),
        prompt_logp_sum=torch.zeros(3),
        prompt_tokens=torch.zeros(3, dtype=torch.long),
        chosen=torch.tensor([0, 0]),
        rejected=torch.tensor([1, 2]),
        mean_chosen_tokens=4.0,
        reference=reference,
        teacher=teacher,
    )
