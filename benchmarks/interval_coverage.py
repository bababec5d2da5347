"""Coverage: how often a 95% interval of a difference, over seeds and problems, holds the truth.

    python benchmarks/interval_coverage.py              about a minute on one core

Tables of 5 seeds x 1,000 problems are drawn with known variances: score = 0.1 + seed + problem + rest, normal with
standard deviations `seeds`, 0.2 and 0.35 (0.4 in all is what a paired score of -1, 0 or 1 has where two methods
disagree on 16% of the problems). One JSON line for each value of `seeds`: the share of intervals that hold 0.1, and
their mean half width, of

- `crossed`: `statistics.crossed`, which `compare` uses;
- `bootstrap`: percentiles of the mean over resampled seeds and problems, as `statistics.resampled`;
- `inflated`: 1.96 standard errors of that bootstrap, the seeds' part of the variance times 5 / 4.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy

from orpo_distill.statistics import crossed, resampled, resampled_means

TRUTH, OF_PROBLEMS, OF_REST = 0.1, 0.2, 0.35
OF_SEEDS = (0.0, 0.005, 0.01, 0.02, 0.05)
SHAPE = S, N = 5, 1000
Interval = tuple[float, float]


def intervals(table: Any) -> dict[str, Interval]:
    """The 95% interval of the mean of a table (S, N) by each method."""
    found = crossed(table)
    assert found.low is not None and found.high is not None
    half = 1.96 * numpy.sqrt(resampled_means(table).var() + table.mean(1).var() / S / (S - 1))
    return {
        "crossed": (found.low, found.high),
        "bootstrap": resampled(table),
        "inflated": (found.mean - half, found.mean + half),
    }


def measure(seeds: float, tables: int) -> dict[str, Any]:
    """Coverage and half widths over so many tables."""
    coin = numpy.random.default_rng(1)
    drawn = []
    for _ in range(tables):
        table = coin.normal(TRUTH, seeds, (S, 1)) + coin.normal(0, OF_PROBLEMS, N) + coin.normal(0, OF_REST, SHAPE)
        drawn.append(intervals(table))
    line: dict[str, Any] = {"seeds": seeds, "tables": tables}
    for name in drawn[0]:
        held = sum(low < TRUTH < high for low, high in (each[name] for each in drawn))
        half = sum(high - low for low, high in (each[name] for each in drawn)) / 2
        line[name] = {"coverage": held / tables, "half_width": round(half / tables, 4)}
    return line


def main() -> None:
    """One line for each size of the seeds' part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=2_000)
    tables = parser.parse_args().tables
    for seeds in OF_SEEDS:
        print(json.dumps(measure(seeds, tables)), flush=True)


if __name__ == "__main__":
    main()
