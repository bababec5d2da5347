"""Problems: which ones are trained on, and on which the students are measured.

A train problem whose question stands in test or validation, or earlier in train, is dropped and recorded.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny

from orpo_distill.component import Options
from orpo_distill.config import ProblemsSection
from orpo_distill.errors import DataError
from orpo_distill.records import Problem, derive_seed, write_jsonl
from orpo_distill.statistics import majority_rate
from orpo_distill.tasks import Task, take


class ProblemsOptions(Options):
    """Where problems come from and which of them are taken."""

    task: SerializeAsAny[Task]
    problems: ProblemsSection


@dataclass(frozen=True, slots=True)
class Dropped:
    """A train problem that is not used, and the problem whose question it repeats."""

    id: str
    split: str
    reason: str  # in_test, in_validation, repeated
    repeats: str  # id of the other problem


def problems(options: ProblemsOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write problems.jsonl (train), validation.jsonl (empty where there is none), test.jsonl and dropped.jsonl.

    Files keep the order of the source. Metrics are counts: `train`, `train_available` (before `limit`), `validation`,
    `test` and `dropped` by reason; `test_majority_rate` where all answers are letters or yes and no. Raises DataError.
    """
    section = options.problems
    train, test = options.task.load(section.train), options.task.load(section.test)
    validation = _validation(options)
    _check_ids({section.train: train, str(section.validation): validation, section.test: test})
    kept, dropped = decontaminate(train, {"in_test": test, "in_validation": validation}, section.train)
    for split, found in ((section.train, kept), (section.test, test)):
        if not found:
            reason = f", {len(dropped)} were dropped" if found is kept and dropped else ""
            raise DataError(f"expected at least one problem in split {split!r}, found none{reason}; check the data")
    if section.holdout is not None and not validation:
        validation, kept = _held_out(kept, section)
    taken = take(kept, section.limit, section.seed)
    write_jsonl(out / "problems.jsonl", taken)
    write_jsonl(out / "test.jsonl", test)
    write_jsonl(out / "dropped.jsonl", dropped)
    write_jsonl(out / "validation.jsonl", validation)
    reasons = dict(sorted(Counter(drop.reason for drop in dropped).items()))
    counts = {
        "train": len(taken),
        "train_available": len(kept),
        "validation": len(validation),
        "test": len(test),
        "dropped": reasons,
    }
    return counts | _majority(test)


def said_dropped(reasons: Mapping[str, int]) -> str:
    """In words how many train problems were left out, and why; "" for none."""
    words = {"in_test": "in test too", "in_validation": "in validation too", "repeated": "repeated in train"}
    found = ", ".join(f"{number} {words.get(reason, reason)}" for reason, number in reasons.items())
    return f"{sum(reasons.values())} left out ({found})" if found else ""


def decontaminate(
    train: Sequence[Problem], held_out: Mapping[str, Sequence[Problem]], split: str
) -> tuple[list[Problem], list[Dropped]]:
    """Train problems without those that repeat one of `held_out` (by reason) or an earlier one, and the latter."""
    seen = [(reason, {question_key(problem): problem.id for problem in found}) for reason, found in held_out.items()]
    earlier: dict[str, str] = {}
    seen.append(("repeated", earlier))
    kept, dropped = [], []
    for problem in train:
        key = question_key(problem)
        hit = next(((reason, keys[key]) for reason, keys in seen if key in keys), None)
        if hit:
            dropped.append(Dropped(problem.id, split, *hit))
        else:
            kept.append(problem)
            earlier[key] = problem.id
    return kept, dropped


# Numbers, words, and the signs that make one sum differ from another. A minus counts before a number, a bracket or a
# single letter, so that hyphens do not.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[+*/^=<>×÷√±%]|[-−](?=\s*(?:\d|[(\\]|[^\W\d_]\b))")


def question_key(problem: Problem) -> str:
    """What two problems share if they ask the same: words, numbers and signs of question and choices.

    Case, spacing, punctuation and the order of the choices do not matter.
    """
    return "\n".join([_words(problem.question), *sorted(map(_words, problem.choices))])


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    return " ".join(_TOKEN.findall(plain)) or plain.strip()


def has_validation(options: ProblemsOptions) -> bool:
    """Whether there will be validation problems: in a split of the task, or held out of train. Raises DataError."""
    split = options.problems.validation
    if split is None or options.problems.holdout is not None:
        return split is not None
    return split in options.task.splits() and bool(options.task.load(split))


def _held_out(train: Sequence[Problem], section: ProblemsSection) -> tuple[list[Problem], list[Problem]]:
    """The train problems that become validation, and the others, whatever `limit` is. Raises DataError."""
    found = take(train, section.holdout, derive_seed(section.seed, "holdout"))
    if len(found) == len(train):
        raise DataError(
            f"expected more train problems than problems.holdout ({section.holdout}), found {len(train)}; lower it"
        )
    ids = {problem.id for problem in found}
    return found, [problem for problem in train if problem.id not in ids]


def _validation(options: ProblemsOptions) -> list[Problem]:
    """The validation problems of the task; none where a split may be missing and is. Raises DataError."""
    section, default = options.problems, ProblemsSection.model_fields["validation"].default
    may_be_missing = section.holdout is not None or section.validation == default
    if section.validation is None or (may_be_missing and section.validation not in options.task.splits()):
        return []
    return options.task.load(section.validation)


def _check_ids(splits: Mapping[str, Sequence[Problem]]) -> None:
    """Raises DataError if an id stands for two problems."""
    first: dict[str, tuple[str, Problem]] = {}
    for split, found in splits.items():
        for problem in found:
            other, same = first.setdefault(problem.id, (split, problem))
            if other == split and same is not problem:
                raise DataError(f"expected unique ids in split {split!r}, found {problem.id!r} twice; make ids unique")
            if (question_key(same), same.answer) != (question_key(problem), problem.answer):
                raise DataError(
                    f"expected an id to stand for one problem, found {problem.id!r} for different ones in splits "
                    f"{other!r} and {split!r}; make ids unique, or leave them out"
                )


def _majority(test: Sequence[Problem]) -> dict[str, float]:
    answers = [problem.answer for problem in test]
    if all(problem.choices for problem in test) or set(answers) <= {"yes", "no"}:
        return {"test_majority_rate": majority_rate(answers)}
    return {}
