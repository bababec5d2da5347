"""QuestionTask: what all question-answering tasks share. A concrete task adds its hub id and its verifier.

Problems come from the task's data set on the Hugging Face hub or from a local `path`:

    a folder    <split>.jsonl, <split>.jsonl.gz or <split>.parquet
    one file    split by a hash of each problem's id: 80 % train, 10 % validation, 10 % test
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from orpo_distill.component import Options
from orpo_distill.errors import DataError
from orpo_distill.records import Message, Problem, derive_seed, stable_hash
from orpo_distill.tasks import Task
from orpo_distill.tasks.fields import to_problem
from orpo_distill.tasks.rows import Row, hub_rows, read_rows, split_files
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.choice import Choice
from orpo_distill.verifiers.math import Math
from orpo_distill.verifiers.number import Number
from orpo_distill.verifiers.yes_no import YesNo

FILE_SPLITS = ("train", "validation", "test")  # of a data set that is one file

_ENDINGS: tuple[tuple[type[Verifier], str], ...] = (
    (Choice, 'finish with the letter of the right choice, like this: "The answer is (B)."'),
    (YesNo, 'finish with yes or no, like this: "The answer is yes."'),
    (Number, 'finish with the number, like this: "The answer is 18."'),
    (Math, r'finish with the result, like this: "The answer is \boxed{18}."'),
)
_OTHER_ENDING = 'finish with the answer, like this: "The answer is Paris."'


class Example(Options):
    """A worked question for few-shot prompts: `response` reasons and ends as answers should."""

    question: str
    response: str
    choices: tuple[str, ...] = ()


def default_prompt(verifier: Verifier | None) -> str:
    """Reason, then answer in the words that the verifier reads best; the question alone for an open-ended task."""
    if verifier is not None and verifier.open_ended:
        return "{question}"
    ending = next((text for kind, text in _ENDINGS if isinstance(verifier, kind)), _OTHER_ENDING)
    return f"{{question}}\n{{choices}}\n\nThink step by step, then {ending}"


class QuestionTask(Task):
    """Questions with gold answers, asked in one user message (after few-shot turns, if any)."""

    path: Path | None = None  # a folder or file to read instead of the hub's data set
    hub_id: str | None = None
    hub_config: str | None = None
    verifier: SerializeAsAny[Verifier]
    system: str = ""  # a system message; none if empty
    prompt: str = Field(default_factory=lambda data: default_prompt(data.get("verifier")))
    examples: tuple[Example, ...] = ()

    @field_validator("prompt")
    @classmethod
    def _asks_the_question(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError(f"expected a prompt with {{question}} in it, found {prompt!r}")
        return prompt

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.hub_id is None:
            raise ValueError("expected `path` (a folder or file) or `hub_id`, found neither")
        return self

    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are. Raises DataError for an empty folder or a hub data set that cannot be had."""
        if self.path is None:
            return tuple(self._hub())
        return tuple(split_files(self.path)) if self.path.is_dir() else FILE_SPLITS

    def load(self, split: str) -> list[Problem]:
        """Every problem of a split, in file order. Raises DataError (missing file, bad line, bad gold answer).

        A row without an id gets a hash of its question and choices, the same in every file and on every machine.
        """
        if self.path is None:
            return self._problems(_pick(self._hub(), split, str(self.hub_id)))
        if self.path.is_dir():
            return self._problems(read_rows(_pick(split_files(self.path), split, str(self.path))))
        _pick(dict.fromkeys(FILE_SPLITS), split, f"{self.path} (one file, split 80/10/10)")
        return [problem for problem in self._problems(read_rows(self.path)) if file_split(problem.id) == split]

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        """The prompt: optional system message, few-shot turns, then the question. Text only."""
        system = (Message("system", self.system),) if self.system else ()
        shots = (
            message
            for example in self.examples
            for message in (self._ask(example.question, example.choices), Message("assistant", example.response))
        )
        return (*system, *shots, self._ask(problem.question, problem.choices))

    def judge(self) -> Verifier:
        """The verifier of this task's answers."""
        return self.verifier

    def problem(self, fields: Mapping[str, Any]) -> Problem:
        """The problem a row holds; override it for rows that `tasks.fields` cannot read. Raises ValueError."""
        return to_problem(fields, self.verifier)

    def _hub(self) -> dict[str, list[Row]]:
        return hub_rows(str(self.hub_id), self.hub_config)

    def _ask(self, question: str, choices: Sequence[str]) -> Message:
        return Message("user", fill(self.prompt, question, choices))

    def _problems(self, rows: Sequence[Row]) -> list[Problem]:
        """Rows to problems with unique ids and gold answers that the verifier accepts."""
        places: dict[str, str] = {}
        problems = []
        for row in rows:
            try:
                problem = self.problem(row.fields)
                self.verifier.check_gold(problem)
            except ValueError as error:
                raise DataError(f"{row.where}: {error}") from error
            if not problem.id:
                problem = replace(problem, id=_made_id(problem, places))
            if problem.id in places:
                raise DataError(
                    f"{row.where}: expected a new id, found {problem.id!r}, which {places[problem.id]} has too; "
                    "make ids unique, or leave them out"
                )
            places[problem.id] = row.where
            problems.append(problem)
        return problems


def fill(prompt: str, question: str, choices: Sequence[str]) -> str:
    """A prompt template with `{question}` and `{choices}` filled in; other braces, there or here, mean nothing.

    Choices are lines of `(A) text`. Without choices, a line that holds only `{choices}` goes.
    """
    if not choices:
        prompt = re.sub(r"(?m)^\{choices\}\n|\n\{choices\}$", "", prompt)
    lines = (f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    values = {"{question}": question, "{choices}": "\n".join(lines)}
    return re.sub(r"\{question\}|\{choices\}", lambda match: values[match[0]], prompt)


def file_split(problem_id: str) -> str:
    """The split of a problem of a one-file data set: by a hash of its id, 80/10/10."""
    bucket = derive_seed("split", problem_id) % 10
    return "train" if bucket < 8 else FILE_SPLITS[bucket - 7]


def _pick(splits: Mapping[str, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise DataError(f"expected a split {split!r} in {source}, found {', '.join(splits) or 'none'}")
    return splits[split]


def _made_id(problem: Problem, taken: Mapping[str, str]) -> str:
    """A hash of question and choices; a repeated question gets a number behind it."""
    base = f"q-{stable_hash(problem.question, problem.choices)[:16]}"
    number, made = 1, base
    while made in taken:
        number += 1
        made = f"{base}-{number}"
    return made
