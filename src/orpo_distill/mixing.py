"""Mixed policy: which of a problem's K negatives come from the latest student, and which from the initial one.

Round 1 always draws from the initial student, because the latest one is the initial one. From round 2 on a seeded coin
with probability phi decides; phi = 0, 0.5, 1 are the paper's off-, mixed- and on-policy modes (arXiv 2509.25100,
section 2.3; the unit of the coin is not stated there, so it is an option).

phi is one number, a schedule, or adaptive: the paper names a curriculum as future work, and this is ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orpo_distill.component import Options
from orpo_distill.records import derive_seed

Phi = Annotated[float, Field(ge=0, le=1)]
PhiUnit = Literal["trace", "problem", "round"]
Worth = Literal["yield", "diversity"]

PHI_FILE = "phi.json"
PHI_FORMS = (
    "a number from 0 to 1, a list of them (one a round), {start, end}, adaptive, or {adaptive: yield or diversity, "
    "start: above 0 and at most 1}"
)


class LinearPhi(Options):
    """phi that goes in a straight line from `start` (round 2) to `end` (the last round)."""

    start: Phi
    end: Phi


class AdaptivePhi(Options):
    """phi that is `start` in round 2 and then follows what the latest student's negatives are worth.

    Their worth, against the initial student's for the same problems and as many traces, is their yield (wrong traces a
    sample) or their diversity (1 - mean pairwise ROUGE-L F1 within a problem). See `adapted_phi`.
    """

    adaptive: Worth
    start: Annotated[float, Field(gt=0, le=1)] = 0.5


PhiSetting = Phi | tuple[Phi, ...] | LinearPhi | AdaptivePhi


def phi_of_round(phi: PhiSetting, round_number: int, rounds: int) -> float | None:
    """phi in force in a round (1-based). A tuple has one value a round; round 1 has no choice to make and gives 0.

    None where only the run can tell: an adaptive phi from round 3 on.
    """
    if round_number == 1:
        return 0.0
    if isinstance(phi, AdaptivePhi):
        return phi.start if round_number == 2 else None
    if isinstance(phi, LinearPhi):
        share = (round_number - 2) / (rounds - 2) if rounds > 2 else 0.0
        return (1 - share) * phi.start + share * phi.end
    return phi[round_number - 1] if isinstance(phi, tuple) else phi


def foreseen_phi(phi: PhiSetting, round_number: int, rounds: int) -> float:
    """phi of a round as far as it is known before the run: of an adaptive one, its start."""
    if isinstance(phi, AdaptivePhi) and round_number > 1:
        return phi.start
    return phi_of_round(phi, round_number, rounds) or 0.0


def adapted_phi(start: float, latest: float | None, initial: float | None, last: float) -> float:
    """start * latest / initial, at most 1, where both were measured and `initial` is above 0; else `last`.

    `latest` and `initial` are what the negatives of the two students were worth in the round before, which had the phi
    `last`. Measured against `start` every time, so that chance does not add up over the rounds.
    """
    if latest is None or not initial:
        return last
    return min(1.0, start * (latest / initial))


def phi_in_force(phi: float | None, inputs: Mapping[str, Path]) -> float:
    """`phi`, or where it is None what the stage inputs["phi"] has found out."""
    if phi is not None:
        return phi
    return float(json.loads((inputs["phi"] / PHI_FILE).read_bytes())["phi"])


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
