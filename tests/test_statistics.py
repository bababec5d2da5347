from __future__ import annotations

import statistics
from math import isclose

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.statistics import (
    crossed,
    estimate,
    holm,
    majority_rate,
    mcnemar,
    over,
    paired_difference,
    resampled,
    slope_weights,
    smallest_difference,
    wilson,
)

counts = st.integers(0, 300)


@given(counts, counts, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_equals_scipy(correct: int, wrong: int, confidence: float) -> None:
    if not correct + wrong:
        return
    n = correct + wrong
    expected = scipy.stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    low, high = wilson(correct, n, confidence)
    assert isclose(low, expected.low, abs_tol=1e-12)
    assert isclose(high, expected.high, abs_tol=1e-12)
    assert 0 <= low <= correct / n <= high <= 1


def test_wilson_by_hand() -> None:
    """0 of n: the interval is 0 to z^2 / (n + z^2). With n = 10 and z = 1.959964: 3.841459 / 13.841459 = 0.277533."""
    low, high = wilson(0, 10)
    assert low == 0.0
    assert isclose(high, 0.277533, abs_tol=1e-6)
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_has_no_silent_number(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct <= n"):
        wilson(correct, n)


def test_confidence_is_a_probability() -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=95)


@given(counts, counts)
def test_mcnemar_equals_the_exact_binomial_test(b: int, c: int) -> None:
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert isclose(mcnemar(b, c), expected, rel_tol=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_by_hand() -> None:
    """1 against 5: two tails of (C(6,0) + C(6,1)) / 2^6 = 7 / 64, so p = 14 / 64. Equal counts: p = 1."""
    assert mcnemar(1, 5) == 14 / 64
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_mcnemar_takes_large_counts() -> None:
    assert isclose(mcnemar(4900, 5100), scipy.stats.binomtest(4900, 10000).pvalue, rel_tol=1e-9)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        mcnemar(-1, 2)


def test_paired_difference_published_example() -> None:
    """Newcombe 1998, the example 36, 12, 2, 0 of n = 50: difference 10 / 50, method 10 gives 0.0569 to 0.3404."""
    low, high = paired_difference(36, 12, 2, 0)
    assert round(low, 4) == 0.0569
    assert round(high, 4) == 0.3404


def test_paired_difference_without_correlation_by_hand() -> None:
    """Both models solve all 10 problems: a margin is 0, so phi = 0.

    Each Wilson interval is 1 - 0.277533 to 1, so both ends are sqrt(0.277533^2 + 0) away from the difference 0.
    """
    low, high = paired_difference(10, 0, 0, 0)
    assert isclose(low, -0.277533, abs_tol=1e-6)
    assert isclose(high, 0.277533, abs_tol=1e-6)


@given(counts, counts, counts, counts)
def test_paired_difference_holds_the_difference_and_flips_with_the_order(a: int, b: int, c: int, d: int) -> None:
    if not a + b + c + d:
        return
    low, high = paired_difference(a, b, c, d)
    assert -1 - 1e-9 <= low <= (b - c) / (a + b + c + d) <= high <= 1 + 1e-9
    flipped_low, flipped_high = paired_difference(a, c, b, d)
    assert isclose(low, -flipped_high, abs_tol=1e-12)
    assert isclose(high, -flipped_low, abs_tol=1e-12)


def test_paired_difference_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="sum >= 1"):
        paired_difference(0, 0, 0, 0)


def test_majority_rate() -> None:
    assert majority_rate(["A", "B", "A", "C"]) == 0.5
    with pytest.raises(ValueError, match="found none"):
        majority_rate([])


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03 in order: 3 x 0.01; 2 x 0.03; then 0.04, raised to what came before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_never_below_the_p_value_and_keeps_the_order(values: list[float]) -> None:
    corrected = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, corrected, strict=True))
    assert [q for _, q in sorted(zip(values, corrected, strict=True))] == sorted(corrected)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=4, unique=True))
def test_few_seeds_equal_scipys_t_test(points: list[int]) -> None:
    expected = scipy.stats.ttest_1samp(points, 0)
    interval = expected.confidence_interval()
    found = over(points, "seeds")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert found.weak


def test_seeds_that_agree_exactly_say_nothing_of_others() -> None:
    found = estimate([[1, 0], [0, 1], [1, 0]])
    assert (found.mean, found.low, found.high, found.p) == (0.5, None, None, None)


def test_one_seed_is_judged_over_problems() -> None:
    """The standard error of a mean; 1.966 is t's quantile with 399 degrees of freedom."""
    scores = [1.0] * 120 + [-1.0] * 60 + [0.0] * 220
    found = estimate([scores])
    error = 1.966 * statistics.stdev(scores) / 20
    assert (found.mean, found.low, found.high) == pytest.approx((0.15, 0.15 - error, 0.15 + error), abs=1e-4)
    assert found.weak
    assert estimate([[1.0]]).low is None


def test_crossed_by_hand() -> None:
    """Seeds 0, 2 and problems -1, 1 about their mean 1, no rest: [[-1, 1], [1, 3]], so A = B = 2 * 2 = 4 and E = 0.

    The variance is 8 / 4, its degrees of freedom 8^2 / (4^2 / 1 + 4^2 / 1) = 2, t's quantile there 4.302653.
    """
    found = crossed([[-1.0, 1.0], [1.0, 3.0]])
    half = 4.302653 * 2**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half), abs=1e-5)


@given(st.lists(st.integers(-50, 50), min_size=5, max_size=8, unique=True))
def test_where_only_seeds_differ_it_is_their_t_interval(points: list[int]) -> None:
    found, expected = crossed([[point] * 30 for point in points]), over(points, "seeds")
    assert (found.low, found.high, found.p) == pytest.approx((expected.low, expected.high, expected.p), abs=1e-9)


def test_where_seeds_do_not_differ_it_is_the_problems() -> None:
    """Every seed scores alike: A = 0 and E = 0, so the variance is that of 1,000 problems."""
    scores = [1.0] * 300 + [-1.0] * 200 + [0.0] * 500
    found, expected = crossed([scores] * 6), over(scores, "problems")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_seeds_that_differ_widen_the_interval() -> None:
    steady = [[1.0] * 60 + [-1.0] * 40] * 6
    moody = [[1.0] * (60 + shift) + [-1.0] * (40 - shift) for shift in (-30, -20, -10, 10, 20, 30)]
    one, other = crossed(steady), crossed(moody)
    assert one.mean == pytest.approx(other.mean)
    assert other.high - other.low > 1.3 * (one.high - one.low)


def test_resampled_by_hand() -> None:
    """Seeds that agree, half of 400 problems at 1 and half at -1: the mean's standard error is 1 / 20."""
    low, high = resampled([[1.0, -1.0] * 200] * 5)
    assert (low, high) == pytest.approx((-1.96 / 20, 1.96 / 20), abs=0.01)


@pytest.mark.parametrize("of_seeds", [0.0, 0.01, 0.02, 0.05])
def test_the_crossed_interval_holds_the_truth_in_95_of_100_cases(of_seeds: float) -> None:
    """5 seeds x 1,000 problems with known variances, as in benchmarks/interval_coverage.py.

    800 tables give the share to 0.008, one standard error.
    """
    import numpy

    coin, held = numpy.random.default_rng(2), 0
    for _ in range(800):
        seed, problem = coin.normal(0, of_seeds, (5, 1)), coin.normal(0, 0.2, 1000)
        found = crossed(0.1 + seed + problem + coin.normal(0, 0.35, (5, 1000)))
        held += found.low < 0.1 < found.high
    assert 0.925 < held / 800 < 0.98


def test_a_smaller_difference_would_have_been_missed() -> None:
    """By simulation: with the difference found, McNemar's test at that level rejects in about 80 of 100 samples."""
    import numpy

    n, discordance, alpha = 400, 0.2, 0.0125
    difference = smallest_difference(n, discordance, alpha)
    assert difference is not None
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    drawn = numpy.random.default_rng(0).multinomial(n, shares, 2000)
    power = sum(mcnemar(int(more), int(less)) < alpha for more, less, _ in drawn) / len(drawn)
    assert 0.74 < power < 0.84


def test_nothing_can_be_shown_without_discordance() -> None:
    assert smallest_difference(100, 0.0) is None
    assert smallest_difference(5, 0.1) is None
    with pytest.raises(ValueError, match="expected n >= 1"):
        smallest_difference(0, 0.1)


def test_seeds_that_agree_have_no_interval() -> None:
    """A width of 0 would read as certainty. 0.1 + 0.2 is 0.30000000000000004."""
    for differences in ([0.25, 0.25], [0.1 + 0.2, 0.3], [0.0, 0.0, 0.0]):
        found = over(differences, "seeds")
        assert (found.low, found.high, found.p) == (None, None, None)


def test_what_is_only_rounding_is_no_spread() -> None:
    """0.1 + 0.2 differs from 0.3 in its last bit."""
    found = crossed([[0.1 + 0.2, 0.3, 0.3]] * 5)
    assert (found.low, found.high, found.p) == (None, None, None)


def test_weights_of_a_slope_sum_to_nothing() -> None:
    assert sum(slope_weights([0.7, 0.8, 0.9])) == 0
    assert [float(weight) for weight in slope_weights([0, 1, 2])] == [-0.5, 0, 0.5]
    with pytest.raises(ValueError, match="two different values"):
        slope_weights([1, 1.0])
