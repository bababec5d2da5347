from __future__ import annotations

from math import isclose

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.statistics import majority_rate, mcnemar, paired_difference, wilson

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
