"""A comparison for people: the plan before it, and its results as Markdown. No winner is named: the tests speak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from orpo_distill.compare.cells import Cell, Design, recipes, stages_of
from orpo_distill.page.comparison import warnings_of
from orpo_distill.stages.report import markdown_table

Row = dict[str, Any]
Table = list[tuple[str, ...]]


def planned(design: Design) -> list[Cell]:
    """The runs that can be known beforehand: those with equal tokens follow from what equal epochs come to."""
    cells = []
    for block in design.blocks:
        cells.append(design.baseline(block))
        for method in design.trained_methods(block):
            rates = design.rates_of(block, method)
            if design.searches:
                cells += [design.searching(block, method, rate) for rate in rates]
            cells += [design.trained(block, method, seed, rates[-1], "epochs") for seed in design.seeds_of(block)]
    return cells


def plan_table(design: Design) -> Table:
    """Runs by method, their stages, and how many of those no run before has made already."""
    seen: set[str] = set()
    rows: Table = [("method", "runs", "stages", "shared", "to be made")]
    totals = Counter[str]()
    for method, group in groupby(planned(design), key=lambda cell: (cell.block.name, cell.method)):
        counts = Counter[str]()
        for cell in group:
            keys = set(recipes(stages_of(cell)).values())
            counts.update(runs=1, stages=len(keys), new=len(keys - seen))
            seen |= keys
        totals += counts
        rows.append((" ".join(filter(None, method)), *_counted(counts)))
    rows.append(("all", *_counted(totals)))
    return rows


def _counted(counts: Mapping[str, int]) -> tuple[str, ...]:
    shared = counts["stages"] - counts["new"]
    return str(counts["runs"]), str(counts["stages"]), str(shared), str(counts["new"])


def render_markdown(content: Row) -> str:
    """`compare.md`: the tables of `compare.json`."""
    parts = [f"# {content['name']}", "", *(f"- {note}" for note in content["notes"]), ""]
    for (block, budget), rows in _tables(content["cells"]):
        parts += [f"## Accuracy on test{block}, {budget}", "", *markdown_table(_accuracies(rows)), ""]
        majority = rows[0]["majority"]
        parts += [f"n = {rows[0]['n']}; always giving the most common answer would score {majority:.1%}.", ""]
    for (block, budget), rows in _tables(content["contrasts"]):
        parts += [f"## Differences{block}, {budget}", "", *markdown_table(contrast_table(rows)), ""]
    if content["trends"]:
        parts += ["## Trends", "", *markdown_table(_trend_table(content["trends"])), ""]
    if content["search"]:
        parts += ["## Learning rates, on validation", "", *markdown_table(_search_table(content["search"])), ""]
    if warned := warnings_of(content["cells"]):
        parts += ["## What runs warn of", "", *(f"- {name}: {', '.join(runs)}" for name, runs in warned.items()), ""]
    parts += ["## Methods", ""]
    parts += [f"- `{name}`: {method['about']}" for name, method in content["methods"].items()]
    return "\n".join([*parts, ""])


def summary(content: Row) -> Iterator[Table]:
    """What is printed at the end: mean accuracies, and the differences that the paper's claims stand on."""
    for (block, budget), rows in _tables(content["cells"]):
        table = _accuracies(rows)
        table[0] = (f"method{block}, {budget}", *table[0][1:])
        yield [(row[0], row[1], *row[3:]) for row in table]
    for (block, budget), rows in _tables(content["contrasts"]):
        primary = [row for row in rows if row["family"] == "primary"]
        if primary:
            table = contrast_table(primary)
            table[0] = (f"a - b{block}, {budget}", *table[0][1:])
            yield [(*row[:5], *row[6:]) for row in table]


def _tables(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """The rows of each block and budget; those without a budget stand in every one of their block."""
    blocks = dict.fromkeys(row["block"] for row in rows)
    budgets = [budget for budget in dict.fromkeys(row["budget"] for row in rows) if budget is not None] or [None]
    for block in blocks:
        for budget in budgets:
            found = [row for row in rows if row["block"] == block and row["budget"] in (budget, None)]
            if found:
                yield (f", {block}" if block else "", f"equal {budget}" if budget else "no training"), found


def _accuracies(rows: Sequence[Row]) -> Table:
    """A row a method: every seed, their mean, and what it cost."""
    counted = ("steps", "trained tokens", "sampled", "scored", "s")
    table: Table = [("method", "mean", "by seed, with 95% interval", "rate", *counted)]
    keys = ("steps", "trained_tokens", "sampled_tokens", "scored_tokens", "seconds")
    for method, group in groupby(sorted(rows, key=_in_order(rows)), key=lambda row: str(row["method"])):
        cells = list(group)
        seeds = ", ".join(f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})" for row in cells)
        costs = (f"{_mean(cells, key):,.0f}" for key in keys)
        rate = cells[0]["learning_rate"]
        table.append((method, f"{_mean(cells, 'accuracy'):.1%}", seeds, "" if rate is None else f"{rate:g}", *costs))
    return table


def _in_order(rows: Sequence[Row]) -> Any:
    """A key that puts the rows of one method side by side, methods in the order they first come in."""
    place = {name: number for number, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    return lambda row: place[row["method"]]


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def contrast_table(rows: Sequence[Row]) -> Table:
    """Differences in accuracy with interval, test, and the smallest that one seed's problems could have shown."""
    table: Table = [
        ("a - b", "difference", "95% interval", "p", "p (Holm)", "by seed", "could have shown", "judged by")
    ]
    for row in rows:
        seeds = ", ".join(f"{each['difference']:+.1%} (p {each['p']:.2g})" for each in row["seeds"])
        smallest = "-" if row["smallest"] is None else f"{row['smallest']:.1%}"
        holm = "exploratory" if row["family"] != "primary" else _p(row["p_holm"])
        how = row["interval"] + (" (weak)" if row["weak"] else "")
        difference = f"{row['difference']:+.1%}"
        table.append((f"{row['a']} - {row['b']}", difference, _interval(row), _p(row["p"]), holm, seeds, smallest, how))
    return table


def _interval(row: Row) -> str:
    return "-" if row["low"] is None else f"{row['low']:+.1%} to {row['high']:+.1%}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _trend_table(rows: Sequence[Row]) -> Table:
    table: Table = [("setting", "budget", "accuracy by value", "slope", "95% interval", "p", "judged by")]
    for row in rows:
        values = zip(row["values"], row["accuracies"], strict=True)
        accuracies = ", ".join(f"{value}: {accuracy:.1%}" for value, accuracy in values)
        how = row["interval"] + (" (weak)" if row["weak"] else "")
        key = " ".join(filter(None, (row["block"], row["key"])))
        table.append((key, row["budget"], accuracies, f"{row['slope']:+.3f}", _range(row), _p(row["p"]), how))
    return table


def _range(row: Row) -> str:
    return "-" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"


def _search_table(rows: Sequence[Row]) -> Table:
    table: Table = [("method", "rate", "right on validation", "chosen")]
    for row in rows:
        method = " ".join(filter(None, (row["block"], row["method"])))
        table.append((method, f"{row['learning_rate']:g}", f"{row['correct']} of {row['n']}", "yes" * row["chosen"]))
    return table
