"""What texts and training logs measure: diversity, paired means, how a value went. Pure functions of plain values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

from orpo_distill.diversity import mean_rouge_l, words

LEAST_FOR_INTERVAL = 10  # problems; the interval is a normal one, which fewer do not bear
CHANGE = 0.05  # nats a token: a smaller change of a mean log-probability is not called one

Values = Mapping[str, float | None]
Ends = tuple[float, float]


def distinct_2(texts: Sequence[str]) -> float | None:
    """Distinct bigrams of words over all bigrams, of the texts together (Li et al. 2016, arXiv 1510.03055, section 5).

    None where no text has two words. Longer texts have less of it: compare texts of about the same length.
    """
    bigrams = [pair for text in texts for pair in itertools.pairwise(words(text))]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def diversity_of(texts: Sequence[str], answers: Sequence[str | None]) -> Values:
    """How unlike two or more texts for one problem are, with the answers that they state (None: nothing is read)."""
    return {
        "rouge_l": mean_rouge_l(texts),
        "distinct_2": distinct_2(texts),
        "unique_answers": len(set(answers)) / len(answers) if any(answers) else None,
        "words": fmean(len(words(text)) for text in texts),
    }


def paired_means(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Means of two values for each of n problems, and their mean difference (first - second).

    `low` and `high` are its 95% interval, normal over problems; None for fewer than 10. Raises ValueError for no or
    unequally many values.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("expected a problem or more, found none")
    n, mean = len(differences), fmean(differences)
    low = high = None
    if n >= LEAST_FOR_INTERVAL:
        half = NormalDist().inv_cdf(0.975) * stdev(differences) / sqrt(n)
        low, high = mean - half, mean + half
    return {
        "problems": n,
        "first": fmean(first),
        "second": fmean(second),
        "difference": mean,
        "low": low,
        "high": high,
    }


def ends(values: Sequence[float]) -> Ends:
    """Means of the first and of the last tenth of the values (at least one each). Raises ValueError for none."""
    if not values:
        raise ValueError("expected a value or more, found none")
    tenth = max(1, len(values) // 10)
    return fmean(values[:tenth]), fmean(values[-tenth:])


def falls_while_margin_grows(chosen: Ends, rejected: Ends) -> bool:
    """Whether the chosen side's log-probability fell and its lead over the rejected side's grew, each by CHANGE."""
    margins = [up - down for up, down in zip(chosen, rejected, strict=True)]
    return chosen[1] - chosen[0] < -CHANGE and margins[1] - margins[0] > CHANGE


def thinned(values: Sequence[float], most: int) -> list[float]:
    """The values as at most `most` means of neighbours, in order."""
    count = min(most, len(values))
    return [fmean(values[len(values) * i // count : len(values) * (i + 1) // count]) for i in range(count)]
