"""A pilot: the real pipeline up to pairs on a few problems, and what that foretells for the whole.

It runs in the experiment's own run folder with a smaller `problems.limit`; the full run then only adds problems, so
nothing that the pilot sampled is sampled (or paid for) again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from orpo_distill.config import Config
from orpo_distill.experiment import run
from orpo_distill.runs import read_manifest


def pilot(config: Config, count: int, redo: Sequence[str] = (), keep: Sequence[str] = ()) -> str:
    """Run up to round 1's pairs on `count` problems. Returns the forecast in words."""
    limit = config.problems.limit
    problems = config.problems.model_copy(update={"limit": min(count, limit) if limit else count})
    folder = run(config.model_copy(update={"problems": problems}), "round-1/pairs", redo, keep)
    counted = read_manifest(folder / "problems").metrics
    pairs = read_manifest(folder / "round-1" / "pairs").metrics
    taken, available = counted["train"], counted["train_available"]
    whole = min(limit or available, available)
    seconds = sum(json.loads((folder / "times.json").read_bytes()).values())
    names = [name for name in ("teacher", "student-0") if (folder / name).exists()]
    traces = sum(read_manifest(folder / name).metrics["traces"] for name in names)
    paired = pairs["paired_problems"]
    return "\n".join(
        [
            f"problems: {taken} of {whole}",
            f"with both sides: {paired} ({paired / taken:.0%})",
            f"pairs: {pairs['pairs']}, sampled traces for each: {traces / max(1, pairs['pairs']):.1f}",
            f"sampling, verifying and pairing took {seconds:.0f} s; for all {whole} problems about "
            f"{seconds * whole / taken:.0f} s (training and evaluation not included)",
        ]
    )
