"""How often the verifiers agree with the labels of recorded traces.

    python scripts/verifier_agreement.py DATA [--show N] [--dataset NAME]

DATA holds `<dataset>/train.jsonl.gz` (id, choices, answer) and `teacher_traces/<dataset>/*.jsonl.gz` (id, traces with
text, answer, via). One row per data set and kind of label: `agree` counts the same answer among the traces in which
both read one, `undecided` those in which the verifier reads none. `--show N` prints N disagreements of each row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_distill.records import Problem, Trace
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.choice import Choice
from orpo_distill.verifiers.yes_no import YesNo


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a gzip-compressed file, one a line."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def labelled(data: Path, dataset: str) -> Iterator[tuple[Problem, Trace, str | None, str]]:
    """Every recorded trace with its problem, its labelled answer and how the label was read."""
    problems = {
        row["id"]: Problem(row["id"], row["question"], row["answer"], tuple(row["choices"] or ()))
        for row in rows(data / dataset / "train.jsonl.gz")
    }
    for path in sorted((data / "teacher_traces" / dataset).glob("*.jsonl.gz")):
        for row in rows(path):
            for index, trace in enumerate(row["traces"]):
                found = Trace(f"{row['id']}-{index}", row["id"], "teacher", index, trace["text"])
                yield problems[row["id"]], found, trace["answer"], str(trace["via"])


@dataclass
class Row:
    """What was counted for one kind of label."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def agreement(self) -> float:
        """Share of the same answer among the traces in which both read one."""
        return self.counts["agree"] / (self.counts["agree"] + self.counts["differ"])


def compare(data: Path, dataset: str) -> tuple[dict[str, Row], float]:
    """The rows of one data set by kind of label, and the traces judged in a second of processor time."""
    items = list(labelled(data, dataset))
    verifier: Verifier = Choice() if items[0][0].choices else YesNo()
    started = time.process_time()
    verdicts = [verifier(problem, trace) for problem, trace, _, _ in items]
    seconds = time.process_time() - started
    found: dict[str, Row] = defaultdict(Row)
    for (problem, trace, label, via), verdict in zip(items, verdicts, strict=True):
        same = "agree" if verdict.answer == label else "undecided" if verdict.answer is None else "differ"
        found[via].counts.update((same, verdict.outcome))
        if same == "differ":
            text = f"label {label}, read {verdict.answer}: {verdict.reason}\n{trace.text}\n{problem.choices}\n"
            found[via].examples.append(text)
    return found, len(items) / seconds


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--dataset")
    arguments = parser.parse_args()
    names = f"{'traces':>8}{'agree':>9}{'differ':>8}{'undecided':>10}{'ambiguous':>10}{'unparseable':>12}"
    print(f"{'data set':14}{'label':12}{names}")
    found = sorted(path.name for path in (arguments.data / "teacher_traces").iterdir())
    for dataset in [arguments.dataset] if arguments.dataset else found:
        table, speed = compare(arguments.data, dataset)
        for via, row in sorted(table.items()):
            count = row.counts
            total = count["agree"] + count["undecided"] + count["differ"]
            print(
                f"{dataset:14}{via:12}{total:8}{row.agreement():9.3%}{count['differ']:8}"
                f"{count['undecided'] / total:10.1%}{count['ambiguous']:10}{count['unparseable']:12}"
            )
            print(*row.examples[: arguments.show], sep="\n", end="", file=sys.stderr)
        print(f"{dataset:14}{speed:,.0f} traces/s")


if __name__ == "__main__":
    main()
