"""Report: every result of a run in one place, `report.json` (for programs) and `report.md` (for people).

Fields of `report.json` are documented in docs/report.md. Only what the method determines stands here; times and the
environment live in other files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from orpo_distill.component import Options
from orpo_distill.records import Answer, Outcome, read_jsonl, write_text
from orpo_distill.runs import read_manifest
from orpo_distill.statistics import mcnemar, paired_difference

Row = dict[str, Any]


class ReportOptions(Options):
    """What stands in the report beside its inputs. Inputs named `evaluate:POLICY` are evaluations, in table order."""

    name: str
    rounds: int


def report(options: ReportOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `report.json` and `report.md`; return the headline."""
    evaluations = {key.partition(":")[2]: path for key, path in inputs.items() if key.startswith("evaluate:")}
    results = [row for path in evaluations.values() for row in json.loads((path / "results.json").read_bytes())]
    first, last = "student-0", f"student-{options.rounds}"
    comparisons = [
        comparison
        for policy in evaluations
        if policy != first
        for comparison in compare(evaluations[first], evaluations[policy], first, policy)
    ]
    content = {
        "name": options.name,
        "version": metadata.version("orpo-distill"),
        "headline": _headline(results, comparisons, last),
        "results": results,
        "comparisons": comparisons,
        "stages": {key: _stage(path) for key, path in inputs.items()},
    }
    write_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", render_markdown(content))
    return {"headline": content["headline"]}


def compare(first: Path, second: Path, a: str, b: str) -> list[Row]:
    """Paired comparison, a split: exact McNemar on the problems that both evaluations answered.

    `difference` is accuracy(b) - accuracy(a) with its 95% interval for paired proportions.
    """
    right_a, right_b = _right_answers(first), _right_answers(second)
    rows = []
    for split in right_b.keys() & right_a.keys():
        ids = right_a[split].keys() & right_b[split].keys()
        cells = Counter((right_a[split][key], right_b[split][key]) for key in ids)
        only_a, only_b = cells[True, False], cells[False, True]
        low, high = paired_difference(cells[True, True], only_b, only_a, cells[False, False])
        row = {"a": a, "b": b, "split": split, "n": len(ids), "only_a": only_a, "only_b": only_b}
        difference = {"difference": (only_b - only_a) / len(ids), "low": low, "high": high}
        rows.append({**row, **difference, "p": mcnemar(only_b, only_a)})
    return sorted(rows, key=lambda row: str(row["split"]))


def _right_answers(evaluation: Path) -> dict[str, dict[str, bool]]:
    """split -> problem id -> whether the answer was right (anything but CORRECT is not)."""
    right: dict[str, dict[str, bool]] = {}
    for answer in read_jsonl(evaluation / "answers.jsonl", Answer):
        right.setdefault(answer.split, {})[answer.problem_id] = answer.outcome == Outcome.CORRECT
    return right


def results_table(results: Sequence[Row], split: str = "test") -> list[tuple[str, ...]]:
    """Rows of text: policy, n, accuracy with its 95% interval, parsed, truncated. The first row is the header."""
    table: list[tuple[str, ...]] = [("policy", "n", "accuracy", "95% interval", "parsed", "truncated")]
    for row in results:
        if row["split"] == split:
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            shares = (f"{row['parsed']:.1%}", f"{row['truncated']:.1%}")
            table.append((row["policy"], str(row["n"]), f"{row['accuracy']:.1%}", interval, *shares))
    return table


def headline_text(headline: Row) -> str:
    """The result in one sentence: always the last round's, never the best one's."""
    return (
        f"{headline['policy']}: {headline['accuracy']:.1%} on test, {headline['difference']:+.1%} against the initial "
        f"student (95% interval {headline['low']:+.1%} to {headline['high']:+.1%}, exact McNemar p = "
        f"{headline['p']:.2g}, n = {headline['n']})"
    )


def render_markdown(content: Row) -> str:
    """`report.md`: the tables of `report.json`."""
    parts = [f"# {content['name']}", "", headline_text(content["headline"]) + ".", ""]
    for split in ("test", "validation"):
        table = results_table(content["results"], split)
        if len(table) > 1:
            majority = next(row["majority"] for row in content["results"] if row["split"] == split)
            parts += [f"## Accuracy on {split}", "", *markdown_table(table), ""]
            parts += [f"Always giving the most common answer would score {majority:.1%}.", ""]
    parts += ["## Against the initial student, paired", "", *markdown_table(_comparison_table(content)), ""]
    for key, stage in content["stages"].items():
        if not key.startswith("evaluate:"):
            parts += [f"## {key}", "", *markdown_table([("measure", "value"), *_flat(stage["metrics"])]), ""]
    parts += ["Intervals are 95%: Wilson for an accuracy, Newcombe's paired interval for a difference.", ""]
    return "\n".join(parts)


def _stage(folder: Path) -> Row:
    """What a stage was asked for and what it counted."""
    manifest = read_manifest(folder)
    return {"options": manifest.asked.options, "metrics": manifest.metrics, "kept": manifest.asked.kept}


def _headline(results: Sequence[Row], comparisons: Sequence[Row], policy: str) -> Row:
    row = next(row for row in results if row["policy"] == policy and row["split"] == "test")
    paired = next(row for row in comparisons if row["b"] == policy and row["split"] == "test")
    keys = ("difference", "low", "high", "p")
    return {"policy": policy, "n": row["n"], "accuracy": row["accuracy"], **{key: paired[key] for key in keys}}


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
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value))]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the header."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
