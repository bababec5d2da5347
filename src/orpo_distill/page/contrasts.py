"""What a comparison's page says of differences: each with its interval and test, and one trend test a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo_distill.page.blocks import (
    Block,
    Chart,
    Charts,
    Section,
    Table,
    Text,
    between,
    count,
    number,
    p_value,
    percent,
    points,
)
from orpo_distill.page.drawing import MARKER_SIZE, MARKERS, WIDE, Drawing, colour, labels, series

Row = Mapping[str, Any]
LEVEL = 0.05
WHERE = ("block", "task", "student")  # differences are taken inside one; several configs may have the same task
FAMILIES = {"primary": "Primary contrasts, Holm-corrected", "exploratory": "Exploratory contrasts, not corrected"}


def carried(contrast: Row) -> bool:
    """Whether the test carries the difference: primary, corrected, at 5%."""
    p = contrast.get("p_holm")
    return contrast.get("family") == "primary" and p is not None and p <= LEVEL


def contrast_headline(contrasts: Sequence[Row]) -> str:
    """How many primary contrasts differ, and which."""
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
    return f"{above} above {below}{by} ({place_of(contrast)}{weak})"


def place_of(row: Row, among: Sequence[Row] = ()) -> str:
    """Config, task, student and budget of a row; only those in which the rows `among` which it stands differ."""
    keys = [key for key in (*WHERE, "budget") if not among or len({other.get(key) for other in among}) > 1]
    return ", ".join(str(row[key]) for key in keys if row.get(key) not in (None, ""))


def contrast_blocks(contrasts: Sequence[Row]) -> list[Block]:
    """A chart and a table a family."""
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
    places = [place_of(each, contrasts) for each in contrasts]
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
            place_of(contrast, contrasts) or place_of(contrast),
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
    note = "Smallest: the difference, in points, that one seed's problems could have shown with 80% power."
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


def trend_section(trends: Sequence[Row]) -> Section | None:
    """A chart a sweep, and their tests."""
    if not trends:
        return None
    charts, rows = [], []
    for place, trend in enumerate(trends):
        values, accuracies = trend.get("values") or [], trend.get("accuracies") or []
        steps = ", ".join(f"{number(v)}: {percent(a)}" for v, a in zip(values, accuracies, strict=True))
        interval = f"{number(trend.get('low'))} to {number(trend.get('high'))}"
        how = str(trend.get("interval") or "–") + (" (weak)" if trend.get("weak") else "")
        cells = [number(trend.get("slope")), interval, p_value(trend.get("p")), how]
        rows.append([str(trend["key"]), place_of(trend), steps, *cells])
        if chart := _trend_chart(f"trend {place}", trend):
            charts.append(chart)
    columns = ["setting", "where", "accuracy by value", "slope a unit", "95% interval", "p of the trend", "judged by"]
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
    return drawing.chart(f"{trend['key']}, {place_of(trend)}", f"Accuracy by {trend['key']}. {said}.")
