"""The page of a comparison of methods (`compare.json`). No method is crowned here that its test does not carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from orpo_distill.errors import DataError
from orpo_distill.page.blocks import (
    Block,
    Chart,
    Code,
    Section,
    Table,
    Text,
    between,
    count,
    duration,
    number,
    percent,
)
from orpo_distill.page.contrasts import WHERE, contrast_blocks, contrast_headline, place_of, trend_section
from orpo_distill.page.drawing import MARKER_SIZE, MARKERS, WIDE, Drawing, colour, labels, series
from orpo_distill.page.rendering import Page, render

Row = Mapping[str, Any]


def comparison_page(content: Mapping[str, Any]) -> str:
    """The HTML file of a comparison; `content` is its `compare.json` (docs/compare.md). Raises DataError.

    A difference is called one only where p_holm <= 0.05 in the primary family.
    """
    try:
        return render(_page(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"expected a comparison as docs/compare.md describes it, found: {error!r}; run compare again"
        ) from error


def _page(content: Mapping[str, Any]) -> Page:
    cells, contrasts = content["cells"], content["contrasts"]
    sections = [
        Section("results", "Results", _results(cells)),
        Section("contrasts", "Contrasts", contrast_blocks(contrasts)),
        trend_section(content.get("trends") or []),
        _search(content.get("search") or []),
        Section("cost", "Cost", [_costs(cells)]),
        _warned(cells),
        _methods(content),
    ]
    return Page(
        title=str(content["name"]),
        headline=contrast_headline(contrasts),
        facts=_facts(cells),
        sections=[section for section in sections if section],
        version=str(content.get("version") or ""),
        notes=[str(note) for note in content.get("notes") or []],
    )


def _facts(cells: Sequence[Row]) -> list[tuple[str, str]]:
    def listed(key: str) -> str:
        values = list(dict.fromkeys(str(cell.get(key)) for cell in cells if cell.get(key) is not None))
        return ", ".join(values[:8]) + (f" and {len(values) - 8} more" if len(values) > 8 else "")

    names = {"task": "task", "student": "student", "budget": "budgets", "seed": "seeds"}
    return [(name, listed(key)) for key, name in names.items() if listed(key)]


def _where(row: Row) -> tuple[Any, ...]:
    """Config, task and student."""
    return tuple(row.get(key) for key in WHERE)


def _groups(cells: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Every (config, task, student), in the order they come."""
    return list(dict.fromkeys(_where(cell) for cell in cells))


def _results(cells: Sequence[Row]) -> list[Block]:
    """For every config, task and student: a row a method and budget, every seed, the mean over seeds."""
    if not cells:
        return [Text("No cell has been measured yet.", "note")]
    blocks: list[Block] = []
    seeds = sorted({cell["seed"] for cell in cells if cell.get("seed") is not None})
    for place, group in enumerate(_groups(cells)):
        own = [cell for cell in cells if _where(cell) == group]
        name = ", ".join(str(value) for value in group if value not in (None, ""))
        keys = list(dict.fromkeys((cell["method"], cell.get("budget")) for cell in own))
        rows = []
        for method, budget in keys:
            row = [cell for cell in own if (cell["method"], cell.get("budget")) == (method, budget)]
            rows.append([str(method), number(budget), *_seeds(row, seeds)])
        columns = ["method", "budget", *(f"seed {seed}" for seed in seeds), "mean", "n", "states an answer", "cut"]
        note = "Cells: accuracy with its 95% Wilson interval. Order and mean are no test: see the contrasts."
        majority = next((cell["majority"] for cell in own if cell.get("majority") is not None), None)
        note += f" Always giving the most common answer would score {percent(majority)}." if majority else ""
        blocks += [Table(f"Accuracy, {name}", columns, rows, note), _methods_chart(f"cells {place}", name, own, keys)]
    return blocks


def _seeds(cells: Sequence[Row], seeds: Sequence[Any]) -> list[str]:
    by_seed = {cell.get("seed"): cell for cell in cells}
    written = []
    for seed in seeds:
        cell = by_seed.get(seed) or by_seed.get(None, {})  # what has no seed is the same for every one
        interval = f" ({between(cell.get('low'), cell.get('high'))})" if cell.get("low") is not None else ""
        written.append((percent(cell.get("accuracy")) + interval).replace(" ", "\u00a0"))
    sizes = sorted({cell["n"] for cell in cells if cell.get("n") is not None})
    counts = "–" if not sizes else count(sizes[0]) if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return [
        *written,
        percent(_mean(cells, "accuracy")),
        counts,
        *(percent(_mean(cells, key)) for key in ("parsed", "truncated")),
    ]


def _mean(cells: Sequence[Row], key: str) -> float | None:
    values = [cell[key] for cell in cells if cell.get(key) is not None]
    return fmean(values) if values else None


def _methods_chart(key: str, name: str, cells: Sequence[Row], keys: Sequence[tuple[Any, Any]]) -> Chart:
    """A mark a seed and a line for the mean, budget below budget."""
    methods = list(dict.fromkeys(method for method, _ in keys))
    budgets = list(dict.fromkeys(budget for _, budget in keys))
    drawing, said = Drawing(key, height=0.9 + 0.34 * len(methods), width=WIDE), []
    for place, budget in enumerate(budgets):
        own = {
            row + (place - (len(budgets) - 1) / 2) * 0.36: (method, values)
            for row, method in enumerate(methods)
            if (values := _accuracies(cells, method, budget))
        }
        _draw_seeds(drawing, place, {at: values for at, (_, values) in own.items()}, str(budget or "untrained"))
        said += [f"{budget or 'untrained'} {method}: {fmean(values):.1%}" for method, values in own.values()]
    majority = next((cell["majority"] for cell in cells if cell.get("majority") is not None), None)
    if majority is not None:
        drawing.axes.axvline(majority, color=colour("muted"), linewidth=1, linestyle=":", label="most common answer")
    drawing.axes.set_yticks(range(len(methods)), labels([str(method) for method in methods]))
    drawing.axes.invert_yaxis()
    drawing.axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    drawing.axes.set_xlabel("accuracy on test")
    drawing.legend()
    note = "A mark a seed; the line is their mean."
    return drawing.chart(f"Seeds, {name}", f"Mean accuracy by budget and method. {'; '.join(said)}.", note)


def _accuracies(cells: Sequence[Row], method: Any, budget: Any) -> list[float]:
    own = [cell for cell in cells if (cell["method"], cell.get("budget")) == (method, budget)]
    return [cell["accuracy"] for cell in own if cell.get("accuracy") is not None]


def _draw_seeds(drawing: Drawing, place: int, rows: Mapping[float, Sequence[float]], name: str) -> None:
    """The seeds of one budget: `rows` has the accuracies by height."""
    points = [(value, at) for at, values in rows.items() for value in values]
    if not points:
        return
    drawing.axes.plot(
        *zip(*points, strict=True),
        color=series(place),
        marker=MARKERS[place % len(MARKERS)],
        markersize=MARKER_SIZE,
        markerfacecolor="none",
        linestyle="none",
        label=labels([name])[0],
    )
    for at, values in rows.items():
        drawing.axes.plot([fmean(values)] * 2, [at - 0.17, at + 0.17], color=series(place), linewidth=2)


def _search(search: Sequence[Row]) -> Section | None:
    """Learning rates tried on validation."""
    if not search:
        return None
    rates = sorted({row["learning_rate"] for row in search})
    rows = []
    for key in dict.fromkeys(_key(row) for row in search):
        own = {row["learning_rate"]: row for row in search if _key(row) == key}
        rows.append([*(number(part) for part in key), *(_tried(own.get(rate)) for rate in rates)])
    columns = ["method", "where", "seed", *(f"{rate:g}" for rate in rates)]
    note = "Accuracy on validation by learning rate, before test was read; chosen: the one that went on."
    return Section("search", "Learning rates", [Table("Learning rates on validation", columns, rows, note)])


def _key(row: Row) -> tuple[Any, ...]:
    return row["method"], place_of({**row, "budget": None}), row.get("seed")


def _tried(row: Row | None) -> str:
    if row is None:
        return "–"
    n, correct = row.get("n"), row.get("correct")
    share = percent(correct / n) if n and correct is not None else "–"
    return f"{share}, chosen" if row.get("chosen") else share


def _costs(cells: Sequence[Row]) -> Table:
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        groups.setdefault((str(cell["method"]), place_of(cell)), []).append(cell)
    rows = []
    for (method, place), own in groups.items():
        rows.append(
            [
                method,
                place,
                count(len(own)),
                number(_mean(own, "learning_rate")),
                *(count(_mean(own, key)) for key in ("trained_tokens", "sampled_tokens", "scored_tokens")),
                duration(_mean(own, "seconds")),
            ]
        )
    tokens = ["trained tokens", "sampled tokens", "scored tokens"]
    columns = ["method", "where", "runs", "learning rate, mean", *tokens, "time"]
    return Table("Cost, means of a run", columns, rows, "Stages that runs share count in each of them.")


def warnings_of(cells: Sequence[Row]) -> dict[str, list[str]]:
    """The name of each warning with the runs that give it; their reports have the measures."""
    runs: dict[str, dict[str, None]] = {}
    for cell in cells:
        for warning in cell.get("warnings") or ():
            runs.setdefault(str(warning).partition(":")[0], {})[str(cell.get("run"))] = None
    return {name: list(found) for name, found in sorted(runs.items())}


def _warned(cells: Sequence[Row]) -> Section | None:
    rows = [[name, str(len(found)), ", ".join(found)] for name, found in warnings_of(cells).items()]
    note = "Measured in each run; its own report has the figures."
    table = Table("What runs warn of", ["warning", "runs", "which"], rows, note)
    return Section("warnings", "Warnings", [table]) if rows else None


def _methods(content: Mapping[str, Any]) -> Section:
    methods = content.get("methods") or {}
    rows = [
        [
            str(name),
            str(method.get("about") or ""),
            ", ".join(f"{key}={number(value, 6)}" for key, value in (method.get("settings") or {}).items()) or "–",
        ]
        for name, method in methods.items()
    ]
    runs = [
        [
            *(number(cell.get(key)) for key in ("method", "task", "student", "seed", "budget")),
            str(cell.get("run") or "–"),
        ]
        for cell in content["cells"]
    ]
    blocks: list[Block] = [Table("Methods", ["method", "what it is", "settings"], rows)]
    blocks.append(Code("Command", str(content.get("command") or "")))
    blocks.append(Table("Runs", ["method", "task", "student", "seed", "budget", "run folder"], runs))
    return Section("methods", "Methods, runs, command", blocks)
