"""Judge single texts: for users who want to see why a verifier decides as it does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason, Problem, Trace
from orpo_distill.verification import Item, verify_all
from orpo_distill.verifiers import Verifier

TEXT_FIELDS = ("text", "answer", "question")


def judge_lines(verifier: Verifier, lines: Iterable[str]) -> Iterator[str]:
    """A JSON line out (`correct, answer, outcome, reason`) for each JSON line in.

    A line in has `text` and `answer` (gold), optionally `question`, `choices` and `finish_reason` (stop or length).
    Raises DataError with the line's number.
    """
    for verdict in verify_all(verifier, _items(verifier, lines)):
        found = {
            "correct": verdict.correct,
            "answer": verdict.answer,
            "outcome": verdict.outcome,
            "reason": verdict.reason,
        }
        yield json.dumps(found)


def _items(verifier: Verifier, lines: Iterable[str]) -> Iterator[Item]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _item(verifier, json.loads(line), str(number))
            except DataError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"line {number}: expected JSON with text and answer (and question, choices, finish_reason if you "
                    f"like), found: {error}"
                ) from error


def _item(verifier: Verifier, case: Any, name: str) -> Item:
    if not isinstance(case, dict):
        raise ValueError(f"{type(case).__name__} {str(case)[:40]!r}")
    for field in TEXT_FIELDS:
        found = case.get(field, "" if field == "question" else None)
        if not isinstance(found, str):
            raise ValueError(f"no {field}" if found is None else f"{field} {str(found)[:40]!r}, which is no text")
    problem = Problem(name, case.get("question", ""), case["answer"], tuple(case.get("choices") or ()))
    verifier.check_gold(problem)
    return problem, Trace(name, name, "", 0, case["text"], FinishReason(case.get("finish_reason", "stop")))
