"""Open-ended tasks: the judge's win rates, in the place of accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orpo_distill.page.blocks import Block, Section, Table, Text, between, count, p_value, percent
from orpo_distill.page.files import Row, RunFiles
from orpo_distill.page.results import equals
from orpo_distill.win_rates import WIN_RATE_NOTE

BY_ROLE = (
    "This task has no right answers. In the funnel and among the traces a whole text of the teacher counts as correct "
    "and one of a student as wrong, by role."
)


def win_headline(files: RunFiles) -> str:
    """The final student against the initial one, on test."""
    policy = files.final_student
    against = {"policy": policy, "against": "student-0", "split": "test"}
    row = next((row for row in files.win_rates if against.items() <= row.items()), None)
    if row is None:
        return "No answers on test were judged yet."
    if row["win_rate"] is None:
        return f"{policy}: the judge gave no answer that can be read."
    return (
        f"{policy} wins {row['win_rate']:.1%} of {row['n']:,} comparisons with the initial student on test (95% "
        f"interval {between(row['low'], row['high'])}, exact sign test p {equals(p_value(row['p']))})."
    )


def win_section(files: RunFiles, note: str = "") -> Section:
    """Warnings, a table a split, and a note."""
    blocks: list[Block] = [Text(f"{name}: {warning}.", "warning") for name, warning in _warnings(files)]
    splits = dict.fromkeys(row["split"] for row in files.win_rates)
    blocks += [win_table(f"Win rates on {split}", {"": files.win_rates}, split) for split in splits]
    blocks.append(Text(WIN_RATE_NOTE) if splits else Text("No answers were judged yet.", "note"))
    return Section("results", "Results", [*blocks, *([Text(note, "note")] if note else [])])


def _warnings(files: RunFiles) -> list[tuple[str, str]]:
    names = [f"round-{number}/pairs" for number in files.rounds]
    found = [(name, each) for name in names for each in (files.metrics(name).get("judge") or {}).get("warnings", ())]
    for row in files.win_rates:
        found += [(f"{row['policy']} against {row['against']} on {row['split']}", each) for each in row["warnings"]]
    return found


def win_table(title: str, runs: Mapping[str, Sequence[Row]], split: str = "test", note: str = "") -> Table:
    """A row a policy and opponent, of one run (named "") or several."""
    rows = [
        [
            f"{name}: {row['policy']}" if name else str(row["policy"]),
            str(row["against"]),
            count(row["n"]),
            percent(row["win_rate"]),
            between(row["low"], row["high"]),
            f"{row['won']} / {row['n'] - row['won'] - row['lost']} / {row['lost']}",
            p_value(row["p"]),
            *(percent(row[key]) for key in ("first_shown_won", "disagreement", "nonsense_answers")),
        ]
        for name, rates in runs.items()
        for row in rates
        if row["split"] == split
    ]
    columns = ["policy", "against", "n", "win rate", "95% interval", "won / even / lost", "p", "first shown won"]
    return Table(title, [*columns, "orders disagree", "nonsense"], rows, note)
