"""Tasks: where problems come from, how they are asked, and which verifier judges the answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from orpo_distill.component import Component
from orpo_distill.records import Message, Problem, derive_seed
from orpo_distill.verifiers import Verifier


class Task(Component):
    """A source of problems, with gold answers unless its verifier is for open-ended tasks."""

    family = "task"
    types = {
        "gsm8k": "orpo_distill.tasks.gsm8k:Gsm8k",
        "arc_challenge": "orpo_distill.tasks.arc:ArcChallenge",
        "arc_easy": "orpo_distill.tasks.arc:ArcEasy",
        "openbookqa": "orpo_distill.tasks.openbookqa:OpenBookQA",
        "strategyqa": "orpo_distill.tasks.strategyqa:StrategyQA",
        "medqa": "orpo_distill.tasks.medqa:MedQA",
        "jsonl": "orpo_distill.tasks.jsonl:Jsonl",
    }

    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are; override it where they are others than these. Raises DataError."""
        return ("train", "validation", "test")

    @abstractmethod
    def load(self, split: str) -> list[Problem]:
        """Every problem of a split, in file order. Raises DataError (missing file, bad line, bad gold answer)."""

    @abstractmethod
    def messages(self, problem: Problem) -> tuple[Message, ...]:
        """The prompt: optional system message, few-shot turns, then the question. Text only."""

    @abstractmethod
    def judge(self) -> Verifier:
        """The verifier of this task's answers."""

    @property
    def open_ended(self) -> bool:
        """Whether nobody can say what is right: accuracy means nothing."""
        return self.judge().open_ended


def take(found: Sequence[Problem], limit: int | None, seed: int) -> list[Problem]:
    """`limit` problems, the first by a hash of (seed, id), in their own order: a larger limit only adds problems."""
    if limit is None:
        return list(found)
    drawn = sorted(found, key=lambda problem: (derive_seed(seed, "limit", problem.id), problem.id))[:limit]
    ids = {problem.id for problem in drawn}
    return [problem for problem in found if problem.id in ids]
