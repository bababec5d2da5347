"""The page that puts runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from orpo_distill.page.blocks import (
    Block,
    Code,
    Section,
    Table,
    Text,
    between,
    count,
    duration,
    number,
    p_value,
    percent,
    points,
)
from orpo_distill.page.costs import costs, total
from orpo_distill.page.files import Row, RunFiles
from orpo_distill.page.measures import measure
from orpo_distill.page.paired import compare
from orpo_distill.page.rendering import Page, render
from orpo_distill.page.results import accuracy_chart, all_results
from orpo_distill.page.settings import command, shown
from orpo_distill.page.win_rates import win_table
from orpo_distill.runs import flatten
from orpo_distill.win_rates import WIN_RATE_NOTE


@dataclass(frozen=True)
class _Run:
    name: str  # the only one of its kind on the page
    files: RunFiles
    results: Sequence[Row]

    @property
    def last(self) -> str | None:
        """The stage that evaluated the final student; None where there are no right answers."""
        return None if self.files.open_ended else self.files.evaluations.get(self.files.final_student or "")


def runs_page(paths: Sequence[Path]) -> str:
    """Several run folders on one page: results, paired comparison of their final students, costs, settings that differ.

    The first run is the one that the others are compared with. Raises what `run_page` raises.
    """
    runs = _named([RunFiles(path) for path in paths])
    measured = [run for run in runs if not run.files.open_ended]
    missing = [run.name for run in measured if run.last is None]
    page = Page(
        title=" / ".join(run.name for run in runs[:4]) + (" …" if len(runs) > 4 else ""),
        headline=f"{len(runs)} runs side by side; the others are compared with {runs[0].name}.",
        facts=[],
        sections=[_results(runs), *([_compared(runs)] if measured else []), _costs(runs), _settings(runs)],
        version=metadata.version("orpo-distill"),
        notices=[f"No evaluated student yet in: {', '.join(missing)}."] if missing else [],
    )
    return render(page)


def _named(found: Sequence[RunFiles]) -> list[_Run]:
    """The runs under their names, or under numbered ones where two have the same."""
    names = [files.name for files in found]
    return [
        _Run(f"{files.name} ({place})" if names.count(files.name) > 1 else files.name, files, all_results(files))
        for place, files in enumerate(found, start=1)
    ]


def _results(runs: Sequence[_Run]) -> Section:
    rows = [
        [
            f"{run.name}: {row['policy']}",
            count(row["n"]),
            percent(row["accuracy"]),
            between(row["low"], row["high"]),
            percent(row["parsed"]),
            percent(row["truncated"]),
        ]
        for run in runs
        for row in run.results
        if row["split"] == "test"
    ]
    columns = ["run and policy", "n", "accuracy", "95% interval", "states an answer", "cut before one"]
    judged = {run.name: run.files.win_rates for run in runs if run.files.win_rates}
    blocks: list[Block] = [win_table("Win rates on test", judged, note=WIN_RATE_NOTE)] if judged else []
    if rows or not judged:
        blocks.append(Table("Accuracy on test", columns, rows, "Wilson intervals."))
    if rows:
        blocks.append(accuracy_chart("accuracy", {run.name: run.results for run in runs}))
    return Section("results", "Results", blocks)


def _compared(runs: Sequence[_Run]) -> Section:
    first = runs[0]
    rows, apart = [], 0
    for run in runs[1:]:
        if not (first.last and run.last):
            continue
        for row in compare(first.files.path / first.last, run.files.path / run.last, first.name, run.name):
            apart += row.get("other_gold", 0)
            rows.append(
                [
                    run.name,
                    row["split"],
                    count(row["n"]),
                    points(row["difference"]),
                    between(row["low"], row["high"], signed=True),
                    f"{row['only_b']} / {row['only_a']}",
                    p_value(row["p"]),
                ]
            )
    columns = ["final student of", "split", "n", "difference, points", "95% interval", "only it / only the first"]
    note = (
        f"Against the final student of {first.name}, on the problems that both answered: Newcombe's interval, exact "
        "McNemar test, not corrected for the number of rows."
    )
    if apart:
        note += f" {apart} problems with the same id and another right answer were left out."
    blocks: list[Block] = [Table("Paired comparison", [*columns, "p"], rows, note)]
    if not rows:
        blocks = [Text("No two of these runs have answered the same problems yet.", "note")]
    blocks.append(Text("Each run is one training on one set of traces; the spread between trainings is not in here."))
    return Section("paired", "Paired comparison", blocks)


def _costs(runs: Sequence[_Run]) -> Section:
    rows = []
    for run in runs:
        measured = [measure(source) for source in run.files.sources]
        each = total(costs(run.files, measured))
        tokens = [count(each.prompt), count(each.sampled), count(each.trained)]
        rows.append([run.name, duration(each.seconds), *tokens, "–" if each.money is None else f"{each.money:.4f}"])
    columns = ["run", "time", "prompt tokens", "sampled tokens", "trained tokens", "money"]
    note = "Stages that runs share count in each of them. Money is tokens times the prices of the config."
    return Section("cost", "Cost", [Table("Cost by run", columns, rows, note)])


def _settings(runs: Sequence[_Run]) -> Section:
    """What differs between the configs, and the commands."""
    settings = [flatten(shown(run.files.config)) for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    rows = [
        [key, *(number(each.get(key), 6) if key in each else "(not set)" for each in settings)]
        for key in keys
        if len({str(each.get(key)) for each in settings}) > 1
    ]
    commands = "\n".join(command(run.files) for run in runs)
    blocks: list[Block] = [Table("Settings that differ", ["setting", *(run.name for run in runs)], rows)]
    if not rows:
        blocks = [Text("All settings are the same.")]
    return Section("settings", "Settings that differ, commands", [*blocks, Code("Commands", commands)])
