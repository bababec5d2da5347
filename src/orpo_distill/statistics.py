"""Intervals and paired tests for accuracies: how sure a difference is. Pure functions of counts and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import sqrt
from statistics import NormalDist, mean, stdev
from typing import Any

ENOUGH_SEEDS = 5  # to tell their part of the variance from the problems'
RESAMPLES = 2_000
ROUNDING = 1e-12  # sums of floats that differ by less than this share of the largest one are equal


def share(part: float, whole: int) -> float | None:
    """Part of the whole; None where there is nothing to divide by."""
    return part / whole if whole else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval and two-sided p-value against 0 (None where it cannot be computed)."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    how: str  # which interval and test
    weak: bool  # too few seeds to say how another seed would do


def wilson(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of an accuracy of `correct` (halves count) out of `n` (Wilson 1927, JASA 22:209).

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


def estimate(scores: Sequence[Sequence[float]]) -> Estimate:
    """The mean of `scores` (seeds, problems), and how sure it is. Each is a paired difference of one seed and problem.

    Problems and seeds are crossed, since every seed's student answers the same problems: from 5 seeds on both count
    (`crossed`). With 2 to 4 it is a t-interval of the seeds' means, which says how other seeds would do on these
    problems, and is weak. With one seed it is one over problems, and says nothing of seeds. Raises ValueError for no
    scores.
    """
    if not scores or not scores[0] or any(len(row) != len(scores[0]) for row in scores):
        raise ValueError("expected the same number of scores, at least one, for at least one seed")
    if len(scores) == 1:
        return over(scores[0], "problems")
    if len(scores) < ENOUGH_SEEDS or len(scores[0]) == 1:
        return over([mean(row) for row in scores], "seeds")
    return crossed(scores)


def over(values: Sequence[float], what: str, confidence: float = 0.95) -> Estimate:
    """The t-interval and one-sample t-test of values, one for each of `what` (Student 1908). Always weak.

    Where there is one value, or all are equal, there is no spread to measure with: no interval and no p-value.
    """
    count = len(values)
    error = stdev(values) / sqrt(count) if count > 1 else 0.0
    spread = error if error > ROUNDING * max(map(abs, values)) else 0.0
    return _by_t(mean(values), spread, count - 1, confidence, f"t over {count} {what}", True)


def crossed(scores: Sequence[Sequence[float]], confidence: float = 0.95) -> Estimate:
    """The t-interval and test of the mean of `scores`, at least 2 seeds by 2 problems, where both are random.

    With the mean squares A of seeds, B of problems and E of the rest of a two-way table, S by N, the variance of the
    mean is (A + B - E) / (S N), and at least A / (S N) and B / (S N), since no part is negative (Cornfield and Tukey
    1956, Annals of Mathematical Statistics 27:907). Few seeds estimate their part badly: t has as many degrees of
    freedom as that leaves (Satterthwaite 1946, Biometrics Bulletin 2:110), S - 1 where seeds are all the variance.
    """
    import numpy

    table = numpy.asarray(scores, dtype=float)  # (S, N)
    seeds, problems = table.shape
    centre = float(table.mean())
    by_seed, by_problem = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - by_seed - by_problem + centre
    degrees = seeds - 1, problems - 1, (seeds - 1) * (problems - 1)
    squares = problems * (by_seed - centre) ** 2, seeds * (by_problem - centre) ** 2, rest**2
    a, b, e = (float(each.sum()) / free for each, free in zip(squares, degrees, strict=True))
    variance = max(a, b, a + b - e)
    error = sqrt(variance / table.size)
    spread = error if error > ROUNDING * abs(table).max() else 0.0
    left = variance**2 / sum(each**2 / free for each, free in zip((a, b, e), degrees, strict=True)) if spread else 1.0
    how = f"t over {seeds} seeds x {problems} problems, crossed"
    return _by_t(centre, spread, left, confidence, how, seeds < ENOUGH_SEEDS)


def resampled(scores: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float]:
    """Percentiles of `resampled_means`: seeds are taken for many, and `crossed` is nearer its confidence for few."""
    import numpy

    low, high = numpy.quantile(resampled_means(scores), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_means(scores: Sequence[Sequence[float]]) -> Any:
    """The means of `scores` (seeds, problems) over resampled seeds and problems: (RESAMPLES,), always the same draws.

    Both are resampled, independently, because they are crossed (the pigeonhole bootstrap, Owen 2007, Annals of Applied
    Statistics 1:386).
    """
    import numpy

    table = numpy.asarray(scores, dtype=float)  # (S, N)
    of_seeds, of_problems = _resampling(*table.shape)
    return ((of_problems @ table.T) * of_seeds).sum(1)


@lru_cache(maxsize=1)
def _resampling(*shape: int) -> tuple[Any, ...]:
    """The weights of resampled rows and columns of a table, (RESAMPLES, n) for each: all contrasts have one shape."""
    import numpy

    coin = numpy.random.default_rng(0)
    return tuple(coin.multinomial(n, numpy.full(n, 1 / n), RESAMPLES) / n for n in shape)


def _by_t(centre: float, error: float, degrees: float, confidence: float, how: str, weak: bool) -> Estimate:
    """By Student's distribution; no interval and no p-value for an error of 0."""
    from scipy.stats import t

    if not error:
        return Estimate(centre, None, None, None, how, weak)
    half = float(t.ppf((1 + confidence) / 2, degrees)) * error
    return Estimate(centre, centre - half, centre + half, 2 * float(t.sf(abs(centre) / error, degrees)), how, weak)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def smallest_difference(n: int, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest difference in accuracy that McNemar's test on `n` problems finds with this power at level `alpha`.

    `discordance` is the share of problems that only one of the two models solves. Solves Connor 1987 (Biometrics
    43:207), equation 3, n = (z_alpha sqrt(d) + z_power sqrt(d - D^2))^2 / D^2, for D. None where no difference up to
    the discordance would be found. Raises ValueError unless n >= 1, 0 <= discordance <= 1 and both shares in (0, 1).
    """
    if n < 1 or not 0 <= discordance <= 1 or not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"expected n >= 1 and shares, found {n}, {discordance}, {alpha}, {power}")
    z_alpha, z_power = _normal_quantile(1 - alpha), NormalDist().inv_cdf(power)

    def needed(difference: float) -> float:
        spread = sqrt(max(0.0, discordance - difference * difference))
        return ((z_alpha * sqrt(discordance) + z_power * spread) / difference) ** 2

    low, high = 0.0, discordance
    if not discordance or needed(high) > n:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= n else (middle, high)
    return high


def slope_weights(values: Sequence[float]) -> list[Fraction]:
    """What the least-squares slope of y on `values` weighs each y with: (v - mean) / sum of squares of that.

    Exact, so that they sum to 0: where nothing differs the slope is 0, not a last bit that all problems agree on.
    Raises ValueError unless two values differ.
    """
    exact = [Fraction(value) for value in values]
    if len(set(exact)) < 2:
        raise ValueError(f"expected two different values, found {list(values)}")
    centre = sum(exact, Fraction()) / len(exact)
    spread = sum(((value - centre) ** 2 for value in exact), Fraction())
    return [(value - centre) / spread for value in exact]


def compare_paired(right: Iterable[tuple[bool, bool]]) -> dict[str, float]:
    """Two models on the same problems, from whether each is right: n, who alone is right, the difference, its test.

    `difference` is accuracy(first) - accuracy(second); `low` and `high` are its 95% interval (`paired_difference`), `p`
    is exact McNemar's. Raises ValueError for no problems.
    """
    cells = Counter(right)
    only_first, only_second, n = cells[True, False], cells[False, True], cells.total()
    low, high = paired_difference(cells[True, True], only_first, only_second, cells[False, False])
    row = {"n": n, "only_first": only_first, "only_second": only_second, "difference": (only_first - only_second) / n}
    return {**row, "low": low, "high": high, "p": mcnemar(only_first, only_second)}


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
