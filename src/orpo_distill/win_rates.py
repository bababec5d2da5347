"""What a judge's preferences come to: win rates with intervals, and how far the judge can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orpo_distill.records import INITIAL, Preference
from orpo_distill.statistics import mcnemar, share, wilson

RESULTS = ("won", "lost", "tie", "orders_disagree", "nonsense", "no_answer", "same")
UNSTEADY = 0.5  # share of comparisons in which the orders disagree, above which a judge is warned of
NONSENSE = 0.1  # share of its answers
Row = dict[str, Any]

COLUMNS = ("policy", "against", "n", "win rate", "95% interval", "won / even / lost", "p")
JUDGES_COLUMNS = {
    "first shown won": "first_shown_won",
    "orders disagree": "disagreement",
    "nonsense": "nonsense_answers",
}
"""Headings of a table of win rates; behind COLUMNS the shares that say how far to trust the judge."""

WIN_RATE_NOTE = (
    "A win rate is the share of answers that the judge prefers in both orders; ties, disagreements of the two orders "
    "and equal texts count half, comparisons with an answer of the judge that cannot be read are left out of n. "
    "Intervals are 95%, Wilson's; p is the exact sign test of wins against losses. The last three columns are the "
    "judge's: how many of its choices fell on the text shown first, how many comparisons it decides by the order, how "
    "many of its answers name no choice."
)


def counted(preferences: Sequence[Preference]) -> Row:
    """Comparisons by result, and the judge's own figures. Shares are None where there is nothing to divide by.

    `first_shown_won`: share of its choices that fell on the text shown first (0.5 without a bias). `disagreement`:
    share of comparisons, both of whose answers are readable, in which the orders disagree. `nonsense_answers`: share of
    its answers that name no choice.
    """
    results = Counter(each.result for each in preferences)
    said = Counter(
        (place, one) for each in preferences for place, one in enumerate((each.shown_first, each.shown_last))
    )
    first = said[0, "won"] + said[1, "lost"]
    nonsense = said[0, "nonsense"] + said[1, "nonsense"]
    answers = said.total() - 2 * results["same"] - said[0, "no_answer"] - said[1, "no_answer"]
    readable = results["won"] + results["lost"] + results["tie"] + results["orders_disagree"]
    counts: Row = {
        "comparisons": len(preferences),
        **{name: results[name] for name in RESULTS},
        "first_shown_won": share(first, first + said[0, "lost"] + said[1, "won"]),
        "disagreement": share(results["orders_disagree"], readable),
        "answers": answers,
        "nonsense_answers": share(nonsense, answers),
    }
    return {**counts, "warnings": warnings(counts)}


def win_rate(preferences: Sequence[Preference]) -> Row:
    """The share of comparisons that are won, those without a winner at one half, with its 95% interval; and `counted`.

    Without a winner are ties, disagreements of the orders and equal texts; unreadable ones are left out of `n`. The
    interval is Wilson's, which is too wide rather than too narrow here: scores of 0, 1/2 and 1 vary no more than 0 and
    1 with the same mean. `p` is the exact sign test of wins against losses. All are None for n = 0.
    """
    counts = counted(preferences)
    wins, losses = counts["won"], counts["lost"]
    even = counts["tie"] + counts["orders_disagree"] + counts["same"]
    n = wins + losses + even
    score = wins + even / 2
    low, high = wilson(score, n) if n else (None, None)
    return {
        "n": n,
        "win_rate": share(score, n),
        "low": low,
        "high": high,
        "p": mcnemar(wins, losses) if n else None,
        **counts,
    }


def warnings(counts: Row) -> list[str]:
    """What should make one doubt the judge, in words."""
    found = []
    if (counts["disagreement"] or 0) > UNSTEADY:
        won = "" if counts["first_shown_won"] is None else f"; the text shown first won {counts['first_shown_won']:.0%}"
        found.append(
            f"the order decides: the judge's two answers disagree in {counts['disagreement']:.0%} of the comparisons"
            f"{won} of its choices (50% without a bias)"
        )
    if (counts["nonsense_answers"] or 0) > NONSENSE:
        found.append(
            f"the judge talks nonsense: {counts['nonsense_answers']:.0%} of its {counts['answers']} answers name no "
            "choice"
        )
    return found


def against_initial(rates: Iterable[Row], policy: str | None, split: str) -> Row | None:
    """A policy's win rate against the initial student; None where they were not compared."""
    wanted = {"policy": policy, "against": INITIAL, "split": split}
    return next((row for row in rates if wanted.items() <= row.items()), None)


def compared(row: Row) -> str:
    """Whose answers a win rate is about."""
    return f"{row['policy']} against {row['against']} on {row['split']}"


def outcomes(row: Row) -> str:
    """How many comparisons were won, had no winner and were lost."""
    return f"{row['won']} / {row['n'] - row['won'] - row['lost']} / {row['lost']}"


def judge_warnings(metrics: Mapping[str, Row], rates: Iterable[Row]) -> list[str]:
    """What makes one doubt the judge, of pairs (by stage) and of answers, each with where it was found."""
    places = [(stage, (counted.get("judge") or {}).get("warnings", ())) for stage, counted in metrics.items()]
    places += [(compared(row), row["warnings"]) for row in rates]
    return [f"{place}: {warning}" for place, found in places for warning in found]
