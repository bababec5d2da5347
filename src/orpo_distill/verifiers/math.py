"""Is the stated expression equal to the gold one? Judged by math-verify (extra `math`), in a killable worker."""

from __future__ import annotations

import logging
import re
from functools import lru_cache, partial
from typing import Any, ClassVar

from orpo_distill.errors import missing_extra
from orpo_distill.records import Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.statements import OPEN, UNREAD, Reading, Statement, ambiguous, last_line, read, verdict

_LONGEST = 2000
_TWO = re.compile(r"[\d$})]\s+or\s+[-$\d\\(]")


class Math(Verifier):
    """Reads the last boxed or stated expression and compares it symbolically: 1/2 = 0.5, x(x+1) = x^2 + x, {1, 2}.

    Expressions that take sympy for ever are ended by the worker's time limit; `__call__` itself has none.
    """

    isolated: ClassVar[bool] = True

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError unless math-verify can read the gold answer."""
        if not _gold(problem.answer):
            raise ValueError(
                f"expected an expression that math-verify reads as gold answer, found {problem.answer!r}; "
                "use the verifier `exact` for answers that are words"
            )

    def prepare(self) -> None:
        """Import math-verify and sympy."""
        _gold("1")

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer that cannot be read, ConfigError without math-verify."""
        self.check_gold(problem)
        reading = read(trace, partial(_parse, problem.answer), _weak, problem.question)
        same = reading.answer is not None and _equal(_gold(problem.answer), _expressions(reading.quote))
        return verdict(trace, reading, same, problem.answer)


def _import() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise missing_extra("math-verify", "math") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call that has no time limit of its own
    return math_verify


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    return tuple(_expressions(f"${answer.strip('$ ')}$"))


def _expressions(text: str) -> list[Any]:
    """What math-verify reads in `text`: sympy objects; strings alone do not count."""
    math_verify = _import()
    found: list[Any] = []
    for form in (text, f"${text.strip('$ .')}$"):
        found = math_verify.parse(form, parsing_timeout=None, fallback_mode="no_fallback")
        if found:
            break
    return [expression for expression in found if not isinstance(expression, str)]


def _equal(gold: tuple[Any, ...], stated: list[Any]) -> bool:
    return bool(_import().verify(list(gold), stated, timeout_seconds=None))


def _parse(gold: str, statement: Statement) -> Reading | None:
    text = (f"\\boxed{{{statement.text}}}" if statement.boxed else statement.sentence).strip(" *_")
    if OPEN.match(statement.sentence):
        return ambiguous(statement.sentence, "leaves the answer open")
    if not statement.boxed and "or" not in gold and "," not in gold and _TWO.search(text):
        return ambiguous(text, "states two answers at once")
    if len(text) > _LONGEST:
        return Reading(None, text, why=f"states an expression of more than {_LONGEST} characters")
    if not _expressions(text):
        return Reading(None, text, why="states nothing that math-verify can read") if statement.boxed else None
    return Reading(statement.text if statement.boxed else text, text)


def _weak(text: str, cut: bool) -> Reading:
    """A last line that is nothing but a formula in dollars, or a text that is one short line."""
    line = last_line(text)
    formula = line.startswith(("$", "\\[", "\\(")) and line.rstrip(".").endswith(("$", "\\]", "\\)"))
    if cut or len(line) > _LONGEST or not (formula or ("\n" not in text and " " not in line)):
        return UNREAD
    return Reading(line, line) if _expressions(line) else UNREAD
