"""Draw the `pair_series` lines of `scale.py`, read as a JSON list from stdin, into an SVG file. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scale", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

GREY, BLUE = "#808080", "#2f81f7"  # both readable on white and on black
LABELS = {
    "problems": "problems",
    "samples": "K, traces a problem and side",
    "characters": "characters a text",
    "characters, tokens counted": "the same, tokens counted",
}


def slope(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """The least-squares line's seconds a unit and seconds at zero."""
    count = len(xs)
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return rise, mean_y - rise * mean_x


def main() -> None:
    """One panel an axis: the points and the line through them."""
    points = json.load(sys.stdin)
    figure, panels = pyplot.subplots(1, len(LABELS), figsize=(11, 2.8), layout="constrained")
    for panel, (axis, label) in zip(panels, LABELS.items(), strict=True):
        mine: list[dict[str, Any]] = [point for point in points if point["axis"] == axis]
        xs, ys = [point[axis.partition(",")[0]] for point in mine], [point["seconds"] for point in mine]
        rise, start = slope(xs, ys)
        panel.plot([0, max(xs)], [start, start + rise * max(xs)], color=GREY, linestyle="--", linewidth=1)
        panel.plot(xs, ys, "o", color=BLUE, markersize=5)
        panel.set_xlabel(label, color=GREY)
        panel.set_ylabel("seconds", color=GREY)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.tick_params(colors=GREY)
        panel.set_facecolor("none")
        for side in panel.spines.values():
            side.set_color(GREY)
    figure.savefig(sys.argv[1], transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
