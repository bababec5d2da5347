"""Report: every result of a run in one place, `report.json` for programs, `report.md` and `report.html` for people.

Fields of `report.json` are documented in docs/report.md. Only what the method determines stands in it and in
`report.md`; `report.html` also shows times and the environment, so it is no output of the stage: its bytes are in no
content id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from orpo_distill.component import Options
from orpo_distill.errors import OrpoDistillError
from orpo_distill.page import run_page
from orpo_distill.page.paired import compare
from orpo_distill.page.results import whole_texts
from orpo_distill.progress import say
from orpo_distill.records import write_text
from orpo_distill.runs import read_manifest
from orpo_distill.stages.open_report import open_headline, open_headline_text, read_win_rates, win_rate_table
from orpo_distill.win_rates import WIN_RATE_NOTE, judge_warnings

Row = dict[str, Any]


class ReportOptions(Options):
    """What stands in the report beside its inputs. Inputs named `evaluate:POLICY` are evaluations, in table order."""

    name: str
    rounds: int


def report(options: ReportOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `report.html`; return the headline."""
    evaluations = {key.partition(":")[2]: path for key, path in inputs.items() if key.startswith("evaluate:")}
    results = [row for path in evaluations.values() for row in json.loads((path / "results.json").read_bytes())]
    first, last = "student-0", _chosen(inputs) or f"student-{options.rounds}"
    split = "test" if any(row["split"] == "test" for row in results) else "validation"
    if all(row["accuracy"] is not None for row in results):
        comparisons = [
            comparison
            for policy in evaluations
            if policy != first
            for comparison in compare(evaluations[first], evaluations[policy], first, policy)
        ]
        headline = _headline(results, comparisons, last, split)
        measured: Row = {"headline": headline, "results": results, "comparisons": comparisons}
    else:
        rates = read_win_rates(inputs)
        measured = {"headline": open_headline(results, rates, last, split), "results": results, "win_rates": rates}
    content = {
        "name": options.name,
        "version": metadata.version("orpo-distill"),
        **measured,
        "mechanisms": _measured(inputs.get("mechanisms")),
        "stages": {key: _stage(path) for key, path in inputs.items()},
    }
    write_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", render_markdown(content))
    _write_page(out)
    return {"headline": content["headline"]}


def _write_page(out: Path) -> None:
    """`report.html` of the run folder that `out` stands in. What is wrong with it is said, and stops no run."""
    try:
        write_text(out / "report.html", run_page(out.parent))
    except OrpoDistillError as error:
        say(f"  no report.html: {error}; then write it with: orpo-distill report {out.parent}")


def results_table(content: Row, split: str = "test") -> list[tuple[str, ...]]:
    """Rows of text: policy, n, accuracy with its 95% interval, parsed, truncated. The first row is the header.

    Of an open-ended task, win rates instead.
    """
    if "win_rates" in content:
        return win_rate_table(content["win_rates"], split)
    table: list[tuple[str, ...]] = [("policy", "n", "accuracy", "95% interval", "parsed", "truncated")]
    for row in content["results"]:
        if row["split"] == split:
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            shares = (f"{row['parsed']:.1%}", f"{row['truncated']:.1%}")
            table.append((row["policy"], str(row["n"]), f"{row['accuracy']:.1%}", interval, *shares))
    return table


def headline_text(headline: Row) -> str:
    """The result in one sentence: always the final student's, never the best one's."""
    if "accuracy" not in headline:
        return open_headline_text(headline)
    return (
        f"{headline['policy']}: {headline['accuracy']:.1%} on {headline['split']}, {headline['difference']:+.1%} "
        f"against the initial student (95% interval {headline['low']:+.1%} to {headline['high']:+.1%}, exact McNemar "
        f"p = {headline['p']:.2g}, n = {headline['n']})"
    )


def render_markdown(content: Row) -> str:
    """`report.md`: the tables of `report.json`."""
    parts = [f"# {content['name']}", "", headline_text(content["headline"]) + ".", ""]
    if said := whole_texts({key: stage["metrics"] for key, stage in content["stages"].items()}):
        parts += [said, ""]
    parts += _win_rates(content) if "win_rates" in content else _accuracies(content)
    parts += _mechanisms(content["mechanisms"])
    for key, stage in content["stages"].items():
        if not key.startswith("evaluate:"):
            parts += [f"## {key}", "", *markdown_table([("measure", "value"), *_flat(stage["metrics"])]), ""]
    if "comparisons" in content:
        parts += ["Intervals are 95%: Wilson for an accuracy, Newcombe's paired interval for a difference.", ""]
    return "\n".join(parts)


def _accuracies(content: Row) -> list[str]:
    parts = []
    for split in ("test", "validation"):
        table = results_table(content, split)
        if len(table) > 1:
            majority = next(row["majority"] for row in content["results"] if row["split"] == split)
            parts += [f"## Accuracy on {split}", "", *markdown_table(table), ""]
            parts += [f"Always giving the most common answer would score {majority:.1%}.", ""]
    return [*parts, "## Against the initial student, paired", "", *markdown_table(_comparison_table(content)), ""]


def _win_rates(content: Row) -> list[str]:
    metrics = {name: stage["metrics"] for name, stage in content["stages"].items()}
    parts = [
        line for warning in judge_warnings(metrics, content["win_rates"]) for line in (f"**Warning.** {warning}.", "")
    ]
    for split in ("test", "validation"):
        table = results_table(content, split)
        parts += [f"## Win rates on {split}", "", *markdown_table(table), ""] if table else []
    return [*parts, WIN_RATE_NOTE, ""] if parts else []


def _measured(folder: Path | None) -> Row:
    """`mechanisms.json`; empty without that stage."""
    measured: Row = json.loads((folder / "mechanisms.json").read_bytes()) if folder else {}
    return measured


def _mechanisms(measured: Row) -> list[str]:
    """What the stage `mechanisms` measured; nothing without it."""
    parts = [line for warning in measured.get("warnings", ()) for line in (f"**Warning.** {warning}.", "")]
    for table in measured.get("tables", ()):
        rows = markdown_table([table["columns"], *table["rows"]]) if table["rows"] else []
        parts += [f"## {table['title']}", "", table["note"], "", *([*rows, ""] if rows else [])]
    return parts


def _chosen(inputs: Mapping[str, Path]) -> str:
    """The policy that the stage `extrapolate/chosen` took; empty without that stage."""
    folder = inputs.get("extrapolate/chosen")
    return str(read_manifest(folder).metrics["policy"]) if folder else ""


def _stage(folder: Path) -> Row:
    """What a stage was asked for and what it counted."""
    manifest = read_manifest(folder)
    return {"options": manifest.asked.options, "metrics": manifest.metrics, "kept": manifest.asked.kept}


def _headline(results: Sequence[Row], comparisons: Sequence[Row], policy: str, split: str) -> Row:
    row = next(row for row in results if row["policy"] == policy and row["split"] == split)
    paired = next(row for row in comparisons if row["b"] == policy and row["split"] == split)
    keys = ("difference", "low", "high", "p")
    return {
        "policy": policy,
        "split": split,
        "n": row["n"],
        "accuracy": row["accuracy"],
        **{key: paired[key] for key in keys},
    }


def _comparison_table(content: Row) -> list[tuple[str, ...]]:
    header = (
        "policy",
        "split",
        "n",
        "difference",
        "95% interval",
        "only it right",
        "only student-0 right",
        "McNemar p",
    )
    return [header] + [
        (
            row["b"],
            row["split"],
            str(row["n"]),
            f"{row['difference']:+.1%}",
            f"{row['low']:+.1%} to {row['high']:+.1%}",
            str(row["only_b"]),
            str(row["only_a"]),
            f"{row['p']:.2g}",
        )
        for row in content["comparisons"]
    ]


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for name, item in value.items() for row in _flat(item, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for number, item in enumerate(value, start=1) for row in _flat(item, f"{key}.{number}")]
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value))]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header. None for no rows."""
    if not rows:
        return []
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
