"""Mixed policy: which of a problem's K negatives come from the latest student, and which from the initial one.

Round 1 always draws from the initial student, because the latest one is the initial one. From round 2 on a seeded coin
with probability phi decides; phi = 0, 0.5, 1 are the paper's off-, mixed- and on-policy modes (arXiv 2509.25100,
section 2.3; the unit of the coin is not stated there, so it is an option).
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

from pydantic import Field

from orpo_distill.component import Options
from orpo_distill.records import derive_seed

Phi = Annotated[float, Field(ge=0, le=1)]
PhiUnit = Literal["trace", "problem", "round"]


class LinearPhi(Options):
    """phi that goes in a straight line from `start` (round 2) to `end` (the last round)."""

    start: Phi
    end: Phi


def phi_of_round(phi: float | tuple[float, ...] | LinearPhi, round_number: int, rounds: int) -> float:
    """phi in force in a round (1-based). A tuple has one value a round; round 1 has no choice to make and gives 0."""
    if round_number == 1:
        return 0.0
    if isinstance(phi, LinearPhi):
        share = (round_number - 2) / (rounds - 2) if rounds > 2 else 0.0
        return (1 - share) * phi.start + share * phi.end
    return phi[round_number - 1] if isinstance(phi, tuple) else phi


def latest_share(phi: float, unit: PhiUnit, seed: int, round_number: int, problem_id: str, samples: int) -> int:
    """How many of a problem's `samples` negatives come from the latest student: its sample indices 0 .. n-1.

    The rest come from the initial student's indices n .. samples-1. For `trace` the number is binomial(samples, phi);
    for `problem` and `round` it is 0 or all.
    """
    key = "" if unit == "round" else problem_id
    coin = random.Random(derive_seed(seed, "phi", round_number, key))
    if unit == "trace":
        return sum(coin.random() < phi for _ in range(samples))
    return samples if coin.random() < phi else 0
