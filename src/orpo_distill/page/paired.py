"""Two evaluations on the same problems: who alone is right, the difference, its interval and its test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from orpo_distill.records import Answer, Outcome, read_jsonl
from orpo_distill.statistics import mcnemar, paired_difference

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
        cells = Counter((_right(answers_a[split][key]), _right(answers_b[split][key])) for key in ids)
        only_a, only_b = cells[True, False], cells[False, True]
        low, high = paired_difference(cells[True, True], only_b, only_a, cells[False, False])
        row = {"a": a, "b": b, "split": split, "n": len(ids), "only_a": only_a, "only_b": only_b}
        difference = {"difference": (only_b - only_a) / len(ids), "low": low, "high": high}
        row |= {**difference, "p": mcnemar(only_b, only_a)}
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
