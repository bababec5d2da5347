"""What the report says of an open-ended task, which has no accuracy: the judge's win rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_distill.stages.judge import WIN_RATES
from orpo_distill.win_rates import COLUMNS, JUDGES_COLUMNS, against_initial, outcomes

Row = dict[str, Any]


def read_win_rates(inputs: Mapping[str, Path]) -> list[Row]:
    """The rows of every stage that compared answers."""
    paths = (path / WIN_RATES for path in inputs.values())
    return [row for path in paths if path.exists() for row in json.loads(path.read_bytes())]


def open_headline(results: Sequence[Row], rates: Sequence[Row], policy: str, split: str) -> Row:
    """The last student's win rate against the initial one; without a judge, how much it answered."""
    row = next(row for row in results if row["policy"] == policy and row["split"] == split)
    rate = against_initial(rates, policy, split)
    if rate is None:
        return {"policy": policy, "split": split, "n": row["n"]}
    kept = ("policy", "against", "split", "n", "win_rate", "low", "high", "p")
    return {key: rate[key] for key in kept}


def open_headline_text(headline: Row) -> str:
    """The result in one sentence."""
    who, split = headline["policy"], headline["split"]
    if "win_rate" not in headline:
        return f"{who}: {headline['n']} answers on {split}, not measured: no gold answers, and no judge in the config"
    if headline["win_rate"] is None:
        return f"{who}: no win rate on {split}, because the judge gave no answer that can be read"
    return (
        f"{who} wins {headline['win_rate']:.1%} of {headline['n']} comparisons with the initial student on {split} "
        f"(95% interval {headline['low']:.1%} to {headline['high']:.1%}, exact sign test p = {headline['p']:.2g})"
    )


def win_rate_table(rates: Sequence[Row], split: str) -> list[tuple[str, ...]]:
    """Rows of text; the first one is the header. None where nothing was compared."""
    table = [
        (
            row["policy"],
            row["against"],
            str(row["n"]),
            _percent(row["win_rate"]),
            "" if row["low"] is None else f"{row['low']:.1%} to {row['high']:.1%}",
            outcomes(row),
            "" if row["p"] is None else f"{row['p']:.2g}",
            *(_percent(row[name]) for name in JUDGES_COLUMNS.values()),
        )
        for row in rates
        if row["split"] == split
    ]
    return [(*COLUMNS, *JUDGES_COLUMNS), *table] if table else []


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
