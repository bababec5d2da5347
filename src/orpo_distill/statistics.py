"""Intervals and paired tests for accuracies: how sure a difference is. Pure functions of counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of an accuracy of `correct` out of `n` (Wilson 1927, JASA 22:209).

    Never leaves [0, 1] and stays honest for few problems and for accuracies near 0 or 1. Raises ValueError unless
    0 <= correct <= n, n >= 1 and 0 < confidence < 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n >= 1, found correct={correct}, n={n}")
    z = _normal_quantile(confidence)
    rate = correct / n
    centre = rate + z * z / (2 * n)
    half = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == n else (centre + half) / scale
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models are equally good, from the problems that only one of them solves.

    Under that hypothesis each such problem is a fair coin (McNemar 1947, Psychometrika 12:153; exact binomial form).
    1.0 when there is no such problem. Raises ValueError for negative counts.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"expected counts >= 0, found {only_first} and {only_second}")
    n = only_first + only_second
    tail, term = 0, 1
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def paired_difference(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of accuracy(first) - accuracy(second) on the same problems, from the 2x2 table of who solves what.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10: the two Wilson intervals combined with the correlation
    phi of the two models, continuity-corrected. Raises ValueError for an empty table or negative counts.
    """
    a, b, c, d = both, only_first, only_second, neither
    n = a + b + c + d
    if n < 1 or min(a, b, c, d) < 0:
        raise ValueError(f"expected counts >= 0 with a sum >= 1, found {(a, b, c, d)}")
    first, second = (a + b) / n, (a + c) / n
    low_1, high_1 = wilson(a + b, n, confidence)
    low_2, high_2 = wilson(a + c, n, confidence)
    phi = _phi(a, b, c, d)
    down = _length(first - low_1, high_2 - second, phi)
    up = _length(high_1 - first, second - low_2, phi)
    difference = (b - c) / n
    return difference - down, difference + up


def majority_rate(answers: Sequence[str]) -> float:
    """The accuracy of always giving the commonest gold answer. Raises ValueError for no answers."""
    if not answers:
        raise ValueError("expected at least one answer, found none")
    return max(Counter(answers).values()) / len(answers)


def _phi(a: int, b: int, c: int, d: int) -> float:
    """Correlation of a 2x2 table; n/2 is taken off a positive numerator, not below 0 (Newcombe's method 10)."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    numerator = a * d - b * c
    corrected = max(numerator - (a + b + c + d) / 2, 0) if numerator > 0 else numerator
    return float(corrected / sqrt(margins))


def _length(x: float, y: float, phi: float) -> float:
    """The third side of a triangle with sides x and y and cosine phi between them."""
    return sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, found {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
