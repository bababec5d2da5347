"""Is the stated number the gold number? Compared exactly: 18 = 18.0 = $18 = eighteen, 1,200 = 1200, 3/4 = 0.75."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache, partial
from typing import ClassVar

from orpo_distill.records import Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.closing import closing
from orpo_distill.verifiers.numerals import NUMBER, SCALES, unmarked, value_of
from orpo_distill.verifiers.quantity import behind_equals, leading, only
from orpo_distill.verifiers.statements import OPEN, Reading, Statement, ambiguous, read, verdict

_COUNTED_IN = re.compile(r"in (?<!\win )(thousand|million|billion|trillion)s\b")
_HEADING = re.compile(r"\s*\d+\s*[.):]\s+\S|\s*[A-Za-z]+ \d+\s*[.:)]")
_BRIEF = re.compile(r"[^\w]*(?:[a-zA-Z]\s*=\s*)?[-−\d.,/\s%–]*(?:[a-zA-Z]+[\W_]*){0,4}")
_CALCULATION = re.compile(r"\W*(?:[a-zA-Z]\s*=|\d)")


class Number(Verifier):
    """Reads the last stated number, in digits, words, fractions, percent or LaTeX, and compares it exactly.

    A percent sign may be left out: 50% is 50, and where one side carries the sign also 0.5. A comma is read as a
    thousands separator only where it is one; `1,5` is not guessed at.
    """

    isolated: ClassVar[bool] = False

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError unless the gold answer is a number."""
        _gold_values(problem.answer)

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer that is no number."""
        gold = _gold_values(problem.answer)
        reading = read(trace, _parse, partial(closing, problem.question), problem.question)
        same = reading.answer is not None and not gold.isdisjoint(_values(reading.answer, problem.question))
        return verdict(trace, reading, same, problem.answer)


@lru_cache(maxsize=4096)
def _gold_values(answer: str) -> frozenset[Fraction]:
    match = NUMBER.fullmatch(unmarked(answer).strip())
    if match is None or (value := value_of(match)) is None:
        raise ValueError(f"expected a number as gold answer, found {answer!r}; use another verifier for this task")
    return frozenset((value, value / 100) if match["percent"] else (value,))


def _values(answer: str, question: str) -> set[Fraction]:
    """The numbers that an extracted answer may stand for: "50%", or "$4 million" where the question counts millions."""
    value = _fraction(answer.rstrip("%"))
    values = {value, value / 100} if answer.endswith("%") else {value}
    return values | {value / scale for scale in _scales(question)}


_fraction = lru_cache(maxsize=4096)(Fraction)


@lru_cache(maxsize=1024)
def _scales(question: str) -> tuple[int, ...]:
    """What a question counts in: "how many dollars, in millions"."""
    return tuple(SCALES[word[1]] for word in _COUNTED_IN.finditer(question))


def _parse(statement: Statement) -> Reading | None:
    quote = statement.text if statement.boxed else statement.sentence
    plain = unmarked(quote).rstrip()
    if OPEN.match(plain):
        reading: Reading | None = ambiguous(quote, "leaves the answer open")
    elif not statement.strict:
        reading = leading(plain, quote) or behind_equals(plain, quote) or only(plain, quote)
    elif _HEADING.match(plain) or not (statement.last or _BRIEF.fullmatch(plain)):
        reading = None
    else:
        reading = leading(plain, quote) or (behind_equals(plain, quote) if _CALCULATION.match(plain) else None)
    return reading
