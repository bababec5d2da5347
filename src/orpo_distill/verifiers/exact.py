"""Does the stated answer equal the gold text, but for case, spaces, markup and punctuation around it?"""

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

from orpo_distill.records import Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.statements import OPEN, UNREAD, Reading, Statement, ambiguous, read, verdict

_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_EXPLANATION = re.compile(r"\s*(?:[;(]|,?\s+(?:because|since|as|which|so|and not)\b|,\s|\s[-–—]\s)")
_MAX_BARE = 80


class Exact(Verifier):
    """Reads the last stated answer, or a text that is only one short line, and compares it as text.

    An explanation behind the answer ("Paris, because ...") is left off. A statement that contains the gold answer
    among other words cannot be told.
    """

    isolated: ClassVar[bool] = False

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError for a gold answer without a letter or digit."""
        if not _normal(problem.answer):
            raise ValueError(f"expected a gold answer with letters or digits, found {problem.answer!r}")

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer without a letter or digit."""
        self.check_gold(problem)
        gold = _normal(problem.answer)
        reading = read(trace, partial(_parse, gold), partial(_weak, gold), problem.question)
        same = reading.answer is not None and _normal(reading.answer) == gold
        return verdict(trace, reading, same, problem.answer)


def _normal(text: str) -> str:
    text = _MARKUP.sub(r"\1", text) if "\\" in text else text
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'“”‘’`*_()[]{}$")


def _parse(gold: str, statement: Statement) -> Reading | None:
    line = _MARKUP.sub(r"\1", statement.text).strip(" *_`$\\")
    if not _normal(line):
        return None
    if _normal(line) == gold or _normal(statement.sentence) == gold:
        return Reading(line if _normal(line) == gold else statement.sentence.strip(), line)
    sentence = line if statement.boxed else statement.sentence
    if OPEN.match(sentence):
        return ambiguous(sentence, "leaves the answer open")
    cut = _EXPLANATION.search(sentence)
    answer = sentence[: cut.start()] if cut and cut.start() else sentence
    if _normal(answer) != gold and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", _normal(statement.text)):
        return ambiguous(sentence, "names the gold answer among other words")
    return Reading(answer.strip(" *_`\"'"), sentence) if _normal(answer) else None


def _weak(gold: str, text: str, cut: bool) -> Reading:
    """A text that is nothing but a short line."""
    if cut or "\n" in text or len(text) > _MAX_BARE:
        return UNREAD
    if _normal(text) == gold:
        return Reading(text, text)
    if OPEN.match(text):
        return ambiguous(text, "leaves the answer open")
    return Reading(text.strip(" .*_`"), text) if len(text.split()) <= 2 * len(gold.split()) + 1 else UNREAD
