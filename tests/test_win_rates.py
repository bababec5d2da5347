"""Win rates and the judge's own figures, by hand."""

import pytest

from orpo_distill.records import Preference
from orpo_distill.statistics import wilson
from orpo_distill.win_rates import counted, win_rate


def preferences(*said: str) -> list[Preference]:
    """`wl` is: won when shown first, lost when shown last."""
    words = {"w": "won", "l": "lost", "t": "tie", "n": "nonsense", "-": "no_answer", "=": "same"}
    return [Preference("p", "a", "b", words[one[0]], words[one[1]]) for one in said]


def test_a_win_counts_one_and_no_winner_a_half() -> None:
    """3 wins, 1 loss, and a tie, a disagreement and equal texts: (3 + 3 / 2) / 7. Nonsense is in no n.

    The sign test of 3 against 1: 2 (1 + 4) / 2^4 = 0.625.
    """
    row = win_rate(preferences("ww", "ww", "ww", "ll", "tt", "wl", "==", "nw", "-w"))
    assert (row["n"], row["win_rate"], row["p"]) == (7, 4.5 / 7, 0.625)
    assert (row["low"], row["high"]) == wilson(4.5, 7)
    assert row["low"] < 4.5 / 7 < row["high"]
    results = ("won", "lost", "tie", "orders_disagree", "same", "nonsense", "no_answer")
    assert [row[name] for name in results] == [3, 1, 1, 1, 1, 1, 1]


def test_the_judges_own_figures() -> None:
    """Of 6 choices (2 in ww, 2 in wl, 1 each in nl and -w) 4 fell on the first: one in ww, two in wl, one in nl.

    Both answers are readable in ww, wl and tt. Of 7 x 2 answers 2 were not asked for and 1 did not come.
    """
    row = counted(preferences("ww", "wl", "tt", "nl", "nn", "==", "-w"))
    assert row["first_shown_won"] == pytest.approx(4 / 6)
    assert row["disagreement"] == pytest.approx(1 / 3)
    assert (row["answers"], row["nonsense_answers"]) == (11, pytest.approx(3 / 11))
    assert row["comparisons"] == 7


def test_a_judge_that_always_takes_the_first_is_warned_of() -> None:
    row = win_rate(preferences(*["wl"] * 10))
    assert (row["win_rate"], row["first_shown_won"], row["disagreement"], row["p"]) == (0.5, 1.0, 1.0, 1.0)
    (warning,) = row["warnings"]
    assert warning.startswith(
        "the order decides: the judge's two answers disagree in 100% of the comparisons; the text"
    )
    assert "shown first won 100% of its choices" in warning


def test_half_nonsense_is_warned_of_and_left_out() -> None:
    row = win_rate(preferences(*["ww", "nn"] * 5))
    assert (row["n"], row["win_rate"], row["nonsense_answers"]) == (5, 1.0, 0.5)
    assert row["warnings"] == ["the judge talks nonsense: 50% of its 20 answers name no choice"]


def test_nothing_readable_has_no_win_rate() -> None:
    row = win_rate(preferences("nn"))
    assert (row["n"], row["win_rate"], row["low"], row["p"], row["first_shown_won"]) == (0, None, None, None, None)
    assert counted([])["nonsense_answers"] is None


def test_half_wins_widen_the_interval_no_more_than_wins_and_losses() -> None:
    """Ten ties have no spread at all; Wilson's interval takes them for 5 wins and 5 losses: conservative."""
    assert win_rate(preferences(*["tt"] * 10))["low"] == pytest.approx(wilson(5, 10)[0])
