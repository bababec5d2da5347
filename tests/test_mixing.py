from __future__ import annotations

from statistics import fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.mixing import AdaptivePhi, LinearPhi, PhiUnit, adapted_phi, foreseen_phi, latest_share, phi_of_round

shares = st.floats(0, 1)
units = st.sampled_from(["trace", "problem", "round"])


@given(shares, st.integers(1, 20), st.integers(1, 20))
def test_round_1_is_the_initial_student(phi: float, rounds: int, number: int) -> None:
    assert phi_of_round(phi, 1, rounds) == 0.0
    if 1 < number <= rounds:
        assert phi_of_round(phi, number, rounds) == phi


def test_one_value_a_round() -> None:
    assert [phi_of_round((0.9, 0.1, 0.7), number, 3) for number in (1, 2, 3)] == [0.0, 0.1, 0.7]


@given(shares, shares, st.integers(2, 30))
def test_a_linear_schedule_starts_and_ends_where_it_says(start: float, end: float, rounds: int) -> None:
    values = [phi_of_round(LinearPhi(start=start, end=end), number, rounds) for number in range(2, rounds + 1)]
    assert values[0] == start
    assert rounds == 2 or values[-1] == end
    assert all(0 <= value <= 1 for value in values)
    assert values == sorted(values, reverse=start > end) or max(values) - min(values) < 1e-9


def test_a_linear_schedule_is_linear() -> None:
    values = [phi_of_round(LinearPhi(start=0.0, end=1.0), number, 6) for number in range(2, 7)]
    assert values == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_an_adaptive_phi_is_known_for_two_rounds_and_foreseen_at_its_start() -> None:
    phi = AdaptivePhi(adaptive="yield", start=0.4)
    assert [phi_of_round(phi, number, 4) for number in (1, 2, 3, 4)] == [0.0, 0.4, None, None]
    assert [foreseen_phi(phi, number, 4) for number in (1, 2, 3, 4)] == [0.0, 0.4, 0.4, 0.4]
    assert [foreseen_phi((0.0, 0.1, 0.7), number, 3) for number in (1, 2, 3)] == [0.0, 0.1, 0.7]


@pytest.mark.parametrize(
    ("latest", "initial", "phi"),
    [
        (0.3, 0.4, 0.375),  # 0.5 * 3 / 4
        (0.6, 0.4, 0.75),
        (0.9, 0.4, 1.0),  # 1.125 is too much
        (0.0, 0.4, 0.0),
        (0.3, 0.0, 0.7),  # nothing to compare with: as before
        (None, None, 0.7),
    ],
)
def test_phi_follows_what_the_latest_is_worth(latest: float | None, initial: float | None, phi: float) -> None:
    assert adapted_phi(0.5, latest, initial, last=0.7) == pytest.approx(phi)


@given(shares, shares, st.floats(0.01, 1), shares)
def test_an_adapted_phi_is_a_share_and_grows_with_the_worth(a: float, b: float, initial: float, start: float) -> None:
    low, high = (adapted_phi(start, worth, initial, last=0.0) for worth in sorted((a, b)))
    assert 0 <= low <= high <= 1
    assert adapted_phi(start, initial, initial, last=0.0) == start


@given(units, st.integers(0, 2**40), st.integers(2, 9), st.text(), st.integers(1, 16))
def test_phi_0_is_off_policy_and_phi_1_on_policy(unit: PhiUnit, seed: int, number: int, key: str, k: int) -> None:
    assert latest_share(0.0, unit, seed, number, key, k) == 0
    assert latest_share(1.0, unit, seed, number, key, k) == k


@given(units, shares, st.integers(0, 2**40), st.text(), st.integers(1, 16))
def test_the_coin_is_determined_by_its_seed(unit: PhiUnit, phi: float, seed: int, key: str, k: int) -> None:
    first = latest_share(phi, unit, seed, 2, key, k)
    assert first == latest_share(phi, unit, seed, 2, key, k)
    assert 0 <= first <= k
    if unit != "trace":
        assert first in (0, k)
    if unit == "round":
        assert first == latest_share(phi, unit, seed, 2, "another problem", k)


@given(shares, shares, st.text(), st.integers(1, 16))
def test_more_phi_or_more_samples_never_takes_from_the_latest(a: float, b: float, key: str, k: int) -> None:
    low, high = sorted((a, b))
    assert latest_share(low, "trace", 0, 2, key, k) <= latest_share(high, "trace", 0, 2, key, k)
    assert latest_share(a, "trace", 0, 2, key, k) <= latest_share(a, "trace", 0, 2, key, k + 1)


def test_the_number_a_problem_is_binomial_for_trace() -> None:
    """K = 8, phi = 0.3: mean 8 * 0.3 = 2.4 and variance 8 * 0.3 * 0.7 = 1.68.

    Over 4,000 problems the standard errors are sqrt(1.68 / 4000) = 0.02 and about 0.04.
    """
    found = [latest_share(0.3, "trace", 0, 2, f"problem-{i}", 8) for i in range(4000)]
    assert abs(fmean(found) - 2.4) < 0.1
    assert abs(variance(found) - 1.68) < 0.2


@pytest.mark.parametrize("unit", ["problem", "round"])
def test_the_share_of_problems_or_rounds_is_phi(unit: PhiUnit) -> None:
    """2,000 coins with phi = 0.3: standard error 0.01."""
    found = [latest_share(0.3, unit, 0, 2 + i, f"problem-{i}", 8) for i in range(2000)]
    assert abs(fmean(found) / 8 - 0.3) < 0.05


def test_coins_of_rounds_and_problems_differ() -> None:
    by_round = [latest_share(0.5, "problem", 0, number, "p", 1) for number in range(2, 40)]
    by_problem = [latest_share(0.5, "problem", 0, 2, f"p{i}", 1) for i in range(38)]
    assert len(set(by_round)) == len(set(by_problem)) == 2
