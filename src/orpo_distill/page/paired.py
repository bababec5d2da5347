"""Two evaluations on the same problems: who alone is right, the difference, its interval and its test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orpo_distill.records import Answer, Outcome, read_jsonl
from orpo_distill.statistics import compare_paired

Row = dict[str, Any]


def compare(first: Path, second: Path, a: str, b: str) -> list[Row]:
    """Paired comparison, a split: exact McNemar on the problems that both evaluations answered.

    `difference` is accuracy(b) - accuracy(a) with its 95% interval for paired proportions. Problems that have the same
    id and another gold answer are not the same: they are left out and counted as `other_gold`.
    """
    answers_a, answers_b = _answers(first), _answers(second)
    rows = []
    for split in answers_b.keys() & answers_a.keys():
        both = answers_a[split].keys() & answers_b[split].keys()
        ids = [key for key in both if answers_a[split][key].gold == answers_b[split][key].gold]
        if not ids:
            continue
        found = compare_paired((_right(answers_b[split][key]), _right(answers_a[split][key])) for key in ids)
        alone = {"only_a": found["only_second"], "only_b": found["only_first"]}
        row = {"a": a, "b": b, "split": split, "n": found["n"], **alone}
        row |= {key: found[key] for key in ("difference", "low", "high", "p")}
        rows.append(row | ({"other_gold": len(both) - len(ids)} if len(both) > len(ids) else {}))
    return sorted(rows, key=lambda row: str(row["split"]))


def _right(answer: Answer) -> bool:
    """Anything but CORRECT is not."""
    return answer.outcome == Outcome.CORRECT


def _answers(evaluation: Path) -> dict[str, dict[str, Answer]]:
    """split -> problem id -> answer."""
    found: dict[str, dict[str, Answer]] = {}
    for answer in read_jsonl(evaluation / "answers.jsonl", Answer):
        found.setdefault(answer.split, {})[answer.problem_id] = answer
    return found
