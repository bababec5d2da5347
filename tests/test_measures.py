"""Diversity, paired means, courses of a value: golden values, each derived in its docstring."""

from __future__ import annotations

from math import sqrt
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.measures import distinct_2, diversity_of, ends, falls_while_margin_grows, paired_means, thinned

values = st.lists(st.floats(-10, 0), min_size=1, max_size=60)


def test_distinct_2_counts_bigrams_over_all_texts() -> None:
    """ "a b a b" has ab, ba, ab; "A b!" has ab: 2 distinct of 4. A word alone has none."""
    assert distinct_2(["a b a b", "A b!"]) == 0.5
    assert distinct_2(["a b", "c"]) == 1.0
    assert distinct_2(["a", ""]) is None


def test_diversity_of_two_texts() -> None:
    """LCS "so the answer is", 4 of 5 words each: F1 = 0.8. Bigrams 4 + 4, 3 of them shared: 5 of 8 distinct."""
    found = diversity_of(["So the answer is 4", "So the answer is 5."], ["4", "5"])
    assert found == {"rouge_l": 0.8, "distinct_2": 0.625, "unique_answers": 1.0, "words": 5.0}
    assert diversity_of(["x 4", "y 4", "z 5"], ["4", "4", "5"])["unique_answers"] == pytest.approx(2 / 3)


def test_the_same_text_is_not_diverse() -> None:
    assert diversity_of(["one two three"] * 2, ["3", "3"]) == {
        "rouge_l": 1.0,
        "distinct_2": 0.5,
        "unique_answers": 0.5,
        "words": 3.0,
    }


def test_paired_means_and_their_interval() -> None:
    """Differences 0 and 2, six of each: mean 1, standard deviation sqrt(12/11), half-width 1.96 of it / sqrt(12)."""
    found = paired_means([1.0, 3.0] * 6, [1.0, 1.0] * 6)
    half = 1.959964 * sqrt(12 / 11) / sqrt(12)
    assert (found["problems"], found["first"], found["second"], found["difference"]) == (12, 2.0, 1.0, 1.0)
    assert (found["low"], found["high"]) == (pytest.approx(1 - half), pytest.approx(1 + half))


def test_few_problems_have_no_interval() -> None:
    found = paired_means([1.0] * 9, [0.0] * 9)
    assert (found["difference"], found["low"], found["high"]) == (1.0, None, None)
    with pytest.raises(ValueError, match="a problem or more"):
        paired_means([], [])


def test_ends_are_the_outer_tenths() -> None:
    """Of 0 .. 39 the first four have mean 1.5, the last four 37.5; of three values each end is one."""
    assert ends(list(range(40))) == (1.5, 37.5)
    assert ends([1.0, 5.0, 3.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="a value or more"):
        ends([])


@pytest.mark.parametrize(
    ("chosen", "rejected", "named"),
    [
        ((-0.5, -0.8), (-0.7, -1.5), True),  # falls by 0.3, margin from 0.2 to 0.7
        ((-0.5, -0.54), (-0.7, -1.5), False),  # falls by less than 0.05
        ((-0.5, -0.8), (-0.7, -1.03), False),  # the margin grows by 0.03
        ((-0.8, -0.5), (-0.9, -1.5), False),  # rises
    ],
)
def test_chosen_falls_while_the_margin_grows(
    chosen: tuple[float, float], rejected: tuple[float, float], named: bool
) -> None:
    assert falls_while_margin_grows(chosen, rejected) is named


@given(values, st.integers(1, 30))
def test_thinning_keeps_the_mean_of_each_part(found: list[float], most: int) -> None:
    thin = thinned(found, most)
    assert len(thin) == min(most, len(found))
    assert min(found) - 1e-9 <= min(thin) <= max(thin) <= max(found) + 1e-9
    if len(found) <= most:
        assert thin == found
    if len(found) % most == 0:
        assert fmean(thin) == pytest.approx(fmean(found))
