"""Health curves of training, and the warning that likelihood displacement deserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from orpo_distill.measures import ends, falls_while_margin_grows
from orpo_distill.page.blocks import Block, Chart, Charts, Section, Table, Text, count, number
from orpo_distill.page.drawing import DASHES, Drawing, colour, series
from orpo_distill.page.files import Row, RunFiles

MOST_POINTS = 240  # of a curve; longer logs are drawn as means of neighbouring steps

Run = tuple[str, list[Row]]
"""A stage's name for people, and its log."""


@dataclass(frozen=True)
class Curve:
    """A number of the log that is drawn: `keys` share the axes, each with its name."""

    title: str
    keys: dict[str, str]
    unit: str
    logarithmic: bool = False
    note: str = ""


CURVES = [
    Curve(
        "Chosen and rejected log-probability",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        "nats a token, mean",
        note="Both may fall, but the chosen side should not.",
    ),
    Curve("Margin", {"margin": "chosen - rejected"}, "nats a token"),
    Curve("Pairs ranked rightly", {"rewards/accuracies": "chosen above rejected"}, "share of pairs"),
    Curve("Loss", {"loss": "loss", "nll_loss": "likelihood term"}, "nats"),
    Curve("Gradient norm", {"grad_norm": "before clipping"}, "norm", logarithmic=True),
    Curve(
        "Most probable rejected trace",
        {"rejected_probability_max": "highest of the step"},
        "mean token probability",
        note="The odds-ratio gradient grows as 1 / (1 - P): near 1 it blows up.",
    ),
]


def health_section(files: RunFiles) -> Section | None:
    """Curves of all rounds, and of the SFT control; None if nothing was trained yet."""
    stages = [(f"round {number}", f"round-{number}/train") for number in files.rounds]
    runs = [(name, _with_margin(files.log(stage))) for name, stage in stages]
    runs = [(name, rows) for name, rows in runs if rows]
    control = _with_margin(files.log("sft/train"))
    if not runs and not control:
        return None
    blocks: list[Block] = [Text(text, "warning") for name, rows in runs for text in warnings(name, rows)]
    if not blocks and any("margin" in row for _, rows in runs for row in rows):
        blocks.append(Text("In no round did the chosen log-probability fall while the margin grew.", "note"))
    charts = [chart for curve in CURVES if (chart := _chart(curve, runs, control))]
    steps = max((len(rows) for _, rows in runs), default=len(control))
    thinned = len(runs) * steps > MOST_POINTS
    blocks += [Charts(charts), _ends(runs, control)]
    if thinned:
        blocks.append(Text("Long logs are drawn as means of neighbouring steps.", "note"))
    return Section("health", "Training health", blocks)


def _with_margin(rows: list[Row]) -> list[Row]:
    """The log with `margin`: the difference of the two log-probabilities, whatever the objective's weight is."""
    both = ("logps/chosen", "logps/rejected")
    return [
        {**row, "margin": row[both[0]] - row[both[1]]} if all(_is_number(row.get(key)) for key in both) else row
        for row in rows
    ]


def warnings(name: str, rows: Sequence[Row]) -> list[str]:
    """What a reader must know about a round's curves, in plain words."""
    found = []
    both = [[row[key] for row in rows if _is_number(row.get(key))] for key in ("logps/chosen", "logps/rejected")]
    if all(both):
        chosen, rejected = (ends(values) for values in both)
        if falls_while_margin_grows(chosen, rejected):
            found.append(
                f"In {name} the chosen log-probability fell from {chosen[0]:.3f} to {chosen[1]:.3f} nats a token while "
                f"the margin grew from {chosen[0] - rejected[0]:.3f} to {chosen[1] - rejected[1]:.3f}: the student "
                "tells good from bad texts better and yet moves away from the teacher's (likelihood displacement). "
                "Lower objective.weight or train.learning_rate, and look at the lengths and the parse rate below."
            )
    highest = max((row["rejected_probability_max"] for row in rows if "rejected_probability_max" in row), default=0)
    if highest > 0.98:
        found.append(
            f"In {name} a rejected trace reached a mean token probability of {highest:.3f}: its gradient is large, and "
            "only train.max_grad_norm holds it."
        )
    return found


def _chart(curve: Curve, runs: Sequence[Run], control: Sequence[Row]) -> Chart | None:
    drawing, said = Drawing(f"health {curve.title}", height=2.3), []
    for place, (key, name) in enumerate(curve.keys.items()):
        rows = [row for _, each in runs for row in each]
        if points := _points(rows, key, curve.logarithmic):
            style = DASHES[place % len(DASHES)]
            drawing.axes.plot(*zip(*points, strict=True), color=series(place), linestyle=style, label=name)
            said.append(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
    if said:
        only = next(iter(curve.keys))
        if control and only in ("loss", "grad_norm") and (points := _points(control, only, curve.logarithmic)):
            drawing.axes.plot(*zip(*points, strict=True), color=colour("muted"), linewidth=0.8, label="sft control")
    else:
        return None
    if curve.logarithmic:
        drawing.axes.set_yscale("log")
        drawing.axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        drawing.axes.yaxis.set_minor_formatter(lambda *_: "")
    for _, rows in runs[1:]:
        drawing.axes.axvline(rows[0]["step"] - 0.5, color=colour("muted"), linewidth=0.6, linestyle=":")
    drawing.axes.set_xlabel("optimizer step (dotted: a new round)" if len(runs) > 1 else "optimizer step")
    drawing.axes.set_ylabel(curve.unit)
    if len(drawing.axes.get_lines()) - max(0, len(runs) - 1) > 1:
        drawing.legend()
    return drawing.chart(curve.title, f"{curve.title} by optimizer step: {'; '.join(said)}.", curve.note)


def _points(rows: Sequence[Row], key: str, positive: bool) -> list[tuple[float, float]]:
    """(step, value), at most MOST_POINTS of them."""
    found = [
        (float(row["step"]), float(row[key]))
        for row in rows
        if _is_number(row.get(key)) and _is_number(row.get("step")) and (row[key] > 0 or not positive)
    ]
    size = -(-len(found) // MOST_POINTS)
    groups = [found[start : start + size] for start in range(0, len(found), size)] if size > 1 else []
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups] or found


def _ends(runs: Sequence[Run], control: list[Row]) -> Table:
    """The means of every round's first and last tenth."""
    keys = {"logps/chosen": "chosen", "logps/rejected": "rejected", "margin": "margin", "loss": "loss"}
    rows = []
    for name, log in [*runs, *([("sft control", control)] if control else [])]:
        values = [[row[key] for row in log if _is_number(row.get(key))] for key in keys]
        cells = [" to ".join(map(number, ends(each))) if each else "–" for each in values]
        rows.append([name, count(len(log)), *cells])
    note = "Means of a round's first and last tenth. Log-probabilities and margin in nats a token."
    return Table("First and last steps", ["training", "steps", *keys.values()], rows, note)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
