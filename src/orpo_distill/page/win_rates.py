"""Open-ended tasks: the judge's win rates, in the place of accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orpo_distill.page.blocks import Block, Section, Table, Text, between, count, p_value, percent
from orpo_distill.page.files import Row, RunFiles
from orpo_distill.page.results import equals
from orpo_distill.win_rates import COLUMNS, JUDGES_COLUMNS, WIN_RATE_NOTE, against_initial, judge_warnings, outcomes

BY_ROLE = (
    "This task has no right answers. In the funnel and among the traces a whole text of the teacher counts as correct "
    "and one of a student as wrong, by role."
)


def win_headline(files: RunFiles) -> str:
    """The final student against the initial one, on test."""
    policy = files.final_student
    row = against_initial(files.win_rates, policy, "test")
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
    metrics = {name: files.metrics(name) for name in (f"round-{number}/pairs" for number in files.rounds)}
    blocks: list[Block] = [Text(f"{said}.", "warning") for said in judge_warnings(metrics, files.win_rates)]
    splits = dict.fromkeys(row["split"] for row in files.win_rates)
    blocks += [win_table(f"Win rates on {split}", {"": files.win_rates}, split) for split in splits]
    blocks.append(Text(WIN_RATE_NOTE) if splits else Text("No answers were judged yet.", "note"))
    return Section("results", "Results", [*blocks, *([Text(note, "note")] if note else [])])


def win_table(title: str, runs: Mapping[str, Sequence[Row]], split: str = "test", note: str = "") -> Table:
    """A row a policy and opponent, of one run (named "") or several."""
    rows = [
        [
            f"{name}: {row['policy']}" if name else str(row["policy"]),
            str(row["against"]),
            count(row["n"]),
            percent(row["win_rate"]),
            between(row["low"], row["high"]),
            outcomes(row),
            p_value(row["p"]),
            *(percent(row[key]) for key in JUDGES_COLUMNS.values()),
        ]
        for name, rates in runs.items()
        for row in rates
        if row["split"] == split
    ]
    return Table(title, [*COLUMNS, *JUDGES_COLUMNS], rows, note)
