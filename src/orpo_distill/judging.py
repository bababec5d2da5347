"""A judge says which of two texts is better: what it is asked, and what its answer means.

Each two texts are shown in both orders, because judges prefer places (Zheng et al. 2023, arXiv 2306.05685, section 4);
the marks [[A]], [[B]] and [[C]] are theirs. Only what both orders say is a preference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, SerializeAsAny, field_validator

from orpo_distill.component import Options
from orpo_distill.records import FinishReason, Message, Preference, Problem, Said, Trace, derive_seed
from orpo_distill.samplers import Decoding, Greedy, Request, Sampler

RUBRIC = (
    "The better answer helps the person who asked more: it is right, answers the whole question, is clear, and is no "
    "longer than it has to be."
)
PROMPT = """Compare two answers to a question. {rubric} Their order says nothing.

[Question]
{question}

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Give your reason in a sentence or two. Then write [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] \
if neither is."""

_MARK = re.compile(r"\[\[([ABC])\]\]")
_BARE = re.compile(r"\W*([ABC])\W*")
_SAID: Sequence[Mapping[str, Said]] = (
    {"A": "won", "B": "lost", "C": "tie"},  # shown first
    {"A": "lost", "B": "won", "C": "tie"},  # shown last
)


class Judge(Options):
    """Any model that says which of two answers is better, where no gold answer can."""

    model: str
    sampler: SerializeAsAny[Sampler] = Field(default="hf", validate_default=True)
    decoding: Greedy = Decoding(temperature=0.0)
    rubric: str = RUBRIC
    prompt: str = PROMPT  # must have it answer [[A]], [[B]] or [[C]]
    pairs: bool = True  # decides which text of a pair is preferred, too; false: pairs are by role

    @field_validator("prompt")
    @classmethod
    def _shows_both(cls, prompt: str) -> str:
        if missing := [name for name in ("{question}", "{first}", "{second}") if name not in prompt]:
            raise ValueError(f"expected a prompt with {', '.join(missing)} in it, found {prompt[:60]!r}")
        return prompt

    def asks(self, question: str, first: str, second: str) -> str:
        """The prompt for two texts in this order; other braces, there or in the texts, mean nothing."""
        values = {"{rubric}": self.rubric, "{question}": question, "{first}": first, "{second}": second}
        return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], self.prompt)


@dataclass(frozen=True, slots=True)
class Match:
    """Two traces' texts on one problem, to be compared."""

    problem: Problem
    one: str
    other: str
    one_id: str
    other_id: str


def requests_of(judge: Judge, match: Match, seed: int) -> list[Request]:
    """What the judge is asked: sample 0 shows `one` first, sample 1 last. Nothing where the texts are equal."""
    if match.one == match.other:
        return []
    orders = (match.one, match.other), (match.other, match.one)
    name, question = match.problem.id, match.problem.question
    return [
        Request(name, place, (Message("user", judge.asks(question, *order)),), derive_seed(seed, "judge", name, place))
        for place, order in enumerate(orders)
    ]


def preference(match: Match, answers: Sequence[Trace]) -> Preference:
    """What the judge's answers to `requests_of` come to."""
    said: list[Said] = [said_of_one(place, answer) for place, answer in enumerate(answers)] or ["same", "same"]
    prompts = tuple(answer.prompt_id for answer in answers)
    return Preference(match.problem.id, match.one_id, match.other_id, said[0], said[1], prompts)


def said_of_one(place: int, answer: Trace) -> Said:
    """What one answer says of the text that stood at `place` (0: first, 1: last).

    It counts if it has one of the marks and no other, outside of a reasoning model's thinking, or is nothing but a
    letter. Everything else is nonsense.
    """
    if answer.finish_reason is FinishReason.ERROR:
        return "no_answer"
    text = answer.text.rpartition("</think>")[2].partition("<think>")[0]
    marks = set(_MARK.findall(text))
    if bare := _BARE.fullmatch(text):
        marks.add(bare[1])
    return _SAID[place][marks.pop()] if len(marks) == 1 else "nonsense"
