"""Accuracy: the headline, the table with intervals and paired tests, and the chart by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orpo_distill.page.blocks import Block, Chart, Section, Table, Text, between, count, p_value, percent, points
from orpo_distill.page.drawing import DASHES, MARKER_SIZE, MARKERS, WIDE, Drawing, colour, labels, series
from orpo_distill.page.files import Row, RunFiles, place_of, round_of
from orpo_distill.page.paired import compare

INTERVALS = (
    "Intervals are 95%: Wilson for an accuracy, Newcombe's paired interval for a difference. p is the exact McNemar "
    "test on the same problems, not corrected for the number of rows."
)


def all_results(files: RunFiles) -> list[Row]:
    """The rows of every evaluation, in the order of the run; none where there are no right answers."""
    if files.open_ended:
        return []
    return [row for stage in files.evaluations.values() for row in files.results(stage)]


def comparisons(files: RunFiles) -> list[Row]:
    """Every policy against the initial student, on the problems that both answered."""
    stages = files.evaluations
    first = None if files.open_ended else stages.get("student-0")
    if first is None or not (files.path / first / "answers.jsonl").exists():
        return []
    return [
        row
        for policy, stage in stages.items()
        if policy != "student-0" and (files.path / stage / "answers.jsonl").exists()
        for row in compare(files.path / first, files.path / stage, "student-0", policy)
    ]


def whole_texts(metrics: Mapping[str, Row]) -> str | None:
    """Which stages could score whole texts only, by what each stage counted; None where none says so."""
    stages = [stage for stage, counted in metrics.items() if counted.get("same_tokens") is False]
    if not stages:
        return None
    return (
        f"Scores of whole texts ({', '.join(stages)}): the model that scored splits texts into other tokens than the "
        "student, so that only its log-probabilities of whole texts were used, and none of single tokens."
    )


def headline(results: Sequence[Row], paired: Sequence[Row], policy: str | None) -> str:
    """The run in one sentence: what its final student reached, never the best one."""
    row = next((row for row in results if row["policy"] == policy and row["split"] == "test"), None)
    if row is None:
        return "Nothing was evaluated on test yet."
    said = f"{policy} answers {row['accuracy']:.1%} of {row['n']:,} test problems rightly"
    against = next((row for row in paired if row["b"] == policy and row["split"] == "test"), None)
    if against is None:
        return f"{said} (95% interval {between(row['low'], row['high'])})."
    return (
        f"{said}: {points(against['difference'])} points against the initial student (95% interval "
        f"{between(against['low'], against['high'], signed=True)}, exact McNemar p {equals(p_value(against['p']))})."
    )


def equals(written: str) -> str:
    """A written number behind the name of what it is: `= 0.2`, or `< 0.0001` as it stands."""
    return written if written.startswith("<") else f"= {written}"


def results_section(results: Sequence[Row], paired: Sequence[Row], note: str | None) -> Section:
    """Tables for test and validation, and the chart by round; `note` is what else a reader must know."""
    if not results:
        return Section("results", "Results", [Text("No evaluation has finished yet.", "note")])
    blocks: list[Block] = []
    splits = [split for split in ("test", "validation") if any(row["split"] == split for row in results)]
    for split in splits:
        blocks.append(results_table(results, paired, split))
        if split == "test":
            blocks.append(accuracy_chart("accuracy", {"": results}, splits))
    blocks.append(
        Text(f"{INTERVALS} One run on one set of sampled traces: what another set would give is not in them.")
    )
    if note:
        blocks.append(Text(note, "note"))
    return Section("results", "Results", blocks)


def results_table(results: Sequence[Row], paired: Sequence[Row], split: str) -> Table:
    """A row a policy: accuracy with its interval, and the paired difference to the initial student."""
    against = {row["b"]: row for row in paired if row["split"] == split}
    rows = []
    for row in results:
        if row["split"] != split:
            continue
        pair = against.get(row["policy"], {})
        rows.append(
            [
                str(row["policy"]),
                count(row["n"]),
                percent(row["accuracy"]),
                between(row["low"], row["high"]),
                points(pair.get("difference")),
                between(pair.get("low"), pair.get("high"), signed=True),
                p_value(pair.get("p")),
                f"{pair['only_b']} / {pair['only_a']}" if pair else "–",
                percent(row["parsed"]),
                percent(row["truncated"]),
            ]
        )
    columns = ["policy", "n", "accuracy", "95% interval", "difference, points", "95% interval", "p"]
    columns += ["only it / only student-0", "states an answer", "cut before one"]
    majority = next((row.get("majority") for row in results if row["split"] == split), None)
    note = "Differences are against the initial student."
    if majority is not None:
        note += f" Always giving the most common answer would score {percent(majority)}."
    return Table(f"Accuracy on {split}", columns, rows, note)


def accuracy_chart(key: str, runs: Mapping[str, Sequence[Row]], splits: Sequence[str] = ("test",)) -> Chart:
    """Accuracy by rounds of training, with intervals; other policies and the majority answer as level lines.

    One run (named "") is drawn with all its splits, several only on test.
    """
    drawing, said = Drawing(key, height=2.9, width=WIDE), []
    place, most = 0, 0.0
    for name, results in runs.items():
        for split in splits:
            rows = [row for row in results if row["split"] == split and place_of(str(row["policy"])) is not None]
            if not rows:
                continue
            label = name or split
            _draw_rounds(drawing, rows, place, labels([label])[0])
            listed = ", ".join(f"{row['policy']} {row['accuracy']:.1%}" for row in rows)
            said.append(f"{label}: {listed}")
            most = max([most, *(place_of(str(row["policy"])) or 0 for row in rows)])
            place += 1
    if list(runs) == [""]:
        said += _draw_levels(drawing, runs[""])
    axes = drawing.axes
    axes.set_xlabel("rounds of training")
    axes.set_ylabel("accuracy")
    axes.set_xticks(range(int(most) + 1))
    axes.set_xlim(-0.3, most + 0.3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    drawing.legend()
    note = "Bars: 95% intervals."
    if any(round_of(policy) is None and place_of(policy) is not None for policy in _policies(runs)):
        note += " The warm-up stands at one half, a student moved on by alpha as far behind its round."
    return drawing.chart("Accuracy by round", f"Accuracy by rounds of training. {'; '.join(said)}.", note)


def _policies(runs: Mapping[str, Sequence[Row]]) -> set[str]:
    return {str(row["policy"]) for results in runs.values() for row in results}


def _draw_rounds(drawing: Drawing, rows: Sequence[Row], place: int, label: str) -> None:
    shift = 0.05 * ((place + 1) // 2) * (-1 if place % 2 else 1)  # bars of different series side by side
    xs = [(place_of(str(row["policy"])) or 0) + shift for row in rows]
    ys = [row["accuracy"] for row in rows]
    below = [max(0.0, y - row["low"]) for y, row in zip(ys, rows, strict=True)]
    above = [max(0.0, row["high"] - y) for y, row in zip(ys, rows, strict=True)]
    drawing.axes.errorbar(
        xs,
        ys,
        yerr=[below, above],
        color=series(place),
        marker=MARKERS[place % len(MARKERS)],
        markersize=MARKER_SIZE,
        linestyle=DASHES[place % len(DASHES)],
        capsize=3,
        elinewidth=1,
        label=label,
    )


def _draw_levels(drawing: Drawing, results: Sequence[Row]) -> list[str]:
    """Policies without rounds, and the majority answer: level lines on test. What was drawn, in words."""
    rows = [row for row in results if row["split"] == "test"]
    levels = [(str(row["policy"]), row["accuracy"]) for row in rows if place_of(str(row["policy"])) is None]
    if rows and rows[0].get("majority") is not None:
        levels.append(("most common answer", rows[0]["majority"]))
    for place, (name, value) in enumerate(levels):
        drawing.axes.axhline(
            value, color=colour("muted"), linewidth=1, linestyle=DASHES[1 + place % 3], label=labels([name])[0]
        )
    return [f"{name} {value:.1%}" for name, value in levels]
