"""The page of a comparison of methods (`compare.json`). No method is crowned here that its test does not carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from orpo_distill.errors import DataError
from orpo_distill.page.blocks import (
    Block,
    Chart,
    Charts,
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
from orpo_distill.page.drawing import MARKER_SIZE, MARKERS, WIDE, Drawing, colour, labels, series
from orpo_distill.page.rendering import Page, render

Row = Mapping[str, Any]
LEVEL = 0.05
WHERE = ("block", "task", "student")  # differences are taken inside one; several configs may have the same task
FAMILIES = {"primary": "Primary contrasts, Holm-corrected", "exploratory": "Exploratory contrasts, not corrected"}


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
        Section("contrasts", "Contrasts", _contrasts(contrasts)),
        _trends(content.get("trends") or []),
        _search(content.get("search") or []),
        Section("cost", "Cost", [_costs(cells)]),
        _methods(content),
    ]
    return Page(
        title=str(content["name"]),
        headline=_headline(contrasts),
        facts=_facts(cells),
        sections=[section for section in sections if section],
        version=str(content.get("version") or ""),
        notes=[str(note) for note in content.get("notes") or []],
    )


def carried(contrast: Row) -> bool:
    """Whether the test carries the difference: primary, corrected, at 5%."""
    p = contrast.get("p_holm")
    return contrast.get("family") == "primary" and p is not None and p <= LEVEL


def _headline(contrasts: Sequence[Row]) -> str:
    primary = [contrast for contrast in contrasts if contrast.get("family") == "primary"]
    found = [contrast for contrast in primary if carried(contrast)]
    if not primary:
        return "No primary contrast was measured."
    said = f"{len(found)} of {len(primary)} primary contrasts differ at the corrected 5% level"
    if not found:
        return f"{said}: what the table shows in order may be chance."
    return f"{said}: {'; '.join(_in_words(contrast) for contrast in found)}."


def _in_words(contrast: Row) -> str:
    """Who is above whom, and by how much."""
    above, below = contrast["a"], contrast["b"]
    difference = contrast.get("difference")
    if difference is not None and difference < 0:
        above, below = below, above
    by = "" if difference is None else f" by {abs(100 * difference):.1f} points"
    weak = ", weak" if contrast.get("weak") else ""
    return f"{above} above {below}{by} ({_place(contrast)}{weak})"


def _place(row: Row, among: Sequence[Row] = ()) -> str:
    """Config, task, student and budget of a row; only those in which the rows `among` which it stands differ."""
    keys = [key for key in (*WHERE, "budget") if not among or len({other.get(key) for other in among}) > 1]
    return ", ".join(str(row[key]) for key in keys if row.get(key) not in (None, ""))


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


def _contrasts(contrasts: Sequence[Row]) -> list[Block]:
    if not contrasts:
        return [Text("No contrast has been measured yet.", "note")]
    blocks: list[Block] = []
    for family, title in FAMILIES.items():
        own = [contrast for contrast in contrasts if contrast.get("family") == family]
        if own:
            blocks += [_forest(f"forest {family}", title, own), _contrast_table(title, own)]
    intervals = sorted({str(contrast["interval"]) for contrast in contrasts if contrast.get("interval")})
    if intervals:
        blocks.append(Text(f"Intervals: {'; '.join(intervals)}.", "note"))
    return blocks


def _contrast_name(contrast: Row) -> str:
    return f"{contrast['a']} - {contrast['b']}"


def _forest(key: str, title: str, contrasts: Sequence[Row]) -> Chart:
    """Differences with their intervals; filled where the test carries them."""
    drawing, said = Drawing(key, height=0.9 + 0.24 * len(contrasts), width=WIDE), []
    for row, contrast in enumerate(contrasts):
        difference, low, high = (contrast.get(name) for name in ("difference", "low", "high"))
        if difference is None:
            continue
        ink = series(0) if carried(contrast) else colour("muted")
        if low is not None and high is not None:
            drawing.axes.plot([100 * low, 100 * high], [row, row], color=ink, linewidth=1.2)
        fill = ink if carried(contrast) else "none"
        drawing.axes.plot([100 * difference], [row], "o", color=ink, markerfacecolor=fill, markersize=5)
        said.append(f"{_contrast_name(contrast)} {points(difference)} ({between(low, high, signed=True)})")
    drawing.axes.axvline(0, color=colour("ink"), linewidth=0.8)
    places = [_place(each, contrasts) for each in contrasts]
    names = [
        _contrast_name(each) + (f" ({place})" if place else "") for each, place in zip(contrasts, places, strict=True)
    ]
    drawing.axes.set_yticks(range(len(contrasts)), labels(names))
    drawing.axes.set_ylim(len(contrasts) - 0.4, -0.6)
    drawing.axes.grid(axis="y", visible=False)
    drawing.axes.set_xlabel("difference in accuracy, points")
    note = "Filled: carried by the corrected test. Open: not, or not tested for that."
    return drawing.chart(title, f"Differences with 95% intervals. {'; '.join(said)}.", note)


def _contrast_table(title: str, contrasts: Sequence[Row]) -> Table:
    rows = [
        [
            _contrast_name(contrast),
            _place(contrast, contrasts) or _place(contrast),
            points(contrast.get("difference")),
            between(contrast.get("low"), contrast.get("high"), signed=True),
            count(contrast.get("n")),
            p_value(contrast.get("p")),
            p_value(contrast.get("p_holm")),
            "–" if contrast.get("smallest") is None else f"{100 * contrast['smallest']:.1f}",
            _finding(contrast),
            _by_seed(contrast),
        ]
        for contrast in contrasts
    ]
    columns = ["contrast", "where", "difference, points", "95% interval", "n", "p", "p, Holm"]
    note = "Smallest: the difference, in points, that this many problems could have shown with 80% power."
    return Table(title, [*columns, "smallest", "finding", "by seed (McNemar p)"], rows, note)


def _by_seed(contrast: Row) -> str:
    seeds = contrast.get("seeds") or []
    found = (f"{points(seed.get('difference'))} (p {p_value(seed.get('p'))})" for seed in seeds)
    return ", ".join(each.replace(" ", "\u00a0") for each in found) or "–"


def _finding(contrast: Row) -> str:
    weak = " (weak: few seeds)" if contrast.get("weak") else ""
    if contrast.get("family") != "primary":
        return f"exploratory{weak}"
    if contrast.get("p_holm") is None:
        return f"not tested{weak}"
    return f"{'differs' if carried(contrast) else 'no difference shown'}{weak}"


def _trends(trends: Sequence[Row]) -> Section | None:
    if not trends:
        return None
    charts, rows = [], []
    for place, trend in enumerate(trends):
        values, accuracies = trend.get("values") or [], trend.get("accuracies") or []
        steps = ", ".join(f"{number(v)}: {percent(a)}" for v, a in zip(values, accuracies, strict=True))
        interval = f"{number(trend.get('low'))} to {number(trend.get('high'))}"
        cells = [number(trend.get("slope")), interval, p_value(trend.get("p"))]
        rows.append([str(trend["key"]), _place(trend), steps, *cells])
        if chart := _trend_chart(f"trend {place}", trend):
            charts.append(chart)
    columns = ["setting", "where", "accuracy by value", "slope a unit", "95% interval", "p of the trend"]
    return Section("sweeps", "Sweeps", [Charts(charts), Table("One trend test a sweep", columns, rows)])


def _trend_chart(key: str, trend: Row) -> Chart | None:
    numbers = (int, float)
    both = zip(trend.get("values") or [], trend.get("accuracies") or [], strict=True)
    found = [(v, a) for v, a in both if isinstance(v, numbers) and isinstance(a, numbers)]
    if len(found) < 2:
        return None
    drawing = Drawing(key, height=2.4)
    drawing.axes.plot(*zip(*found, strict=True), color=series(0), marker=MARKERS[0], markersize=MARKER_SIZE)
    drawing.axes.set_xlabel(labels([str(trend["key"])])[0])
    drawing.axes.set_ylabel("accuracy")
    drawing.axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    said = ", ".join(f"{v:g}: {a:.1%}" for v, a in found)
    return drawing.chart(f"{trend['key']}, {_place(trend)}", f"Accuracy by {trend['key']}. {said}.")


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
    return row["method"], _place({**row, "budget": None}), row.get("seed")


def _tried(row: Row | None) -> str:
    if row is None:
        return "–"
    n, correct = row.get("n"), row.get("correct")
    share = percent(correct / n) if n and correct is not None else "–"
    return f"{share}, chosen" if row.get("chosen") else share


def _costs(cells: Sequence[Row]) -> Table:
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        groups.setdefault((str(cell["method"]), _place(cell)), []).append(cell)
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
