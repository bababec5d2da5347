"""Is the stated number the gold number? Compared exactly: 18 = 18.0 = $18 = eighteen, 1,200 = 1200, 3/4 = 0.75."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

from orpo_distill.records import Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.statements import (
    CONCLUSION,
    OPEN,
    UNREAD,
    Reading,
    Statement,
    ambiguous,
    last_line,
    last_sentence,
    read,
    verdict,
)

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}
_MULTIPLIED = (
    r"\s+(?:hundred|thousand|million|billion|dozen|quarters?|thirds?|half|halves|fourths?|fifths?|point|and an?)\b"
)
_WORD = re.compile(
    rf"(?:({'|'.join(_TENS)})[- ]({'|'.join(_ONES[1:10])})\b|({'|'.join(_WORDS)})\b(?! of\b)(?!-))(?!{_MULTIPLIED})",
    re.IGNORECASE,
)

_NUMBER = re.compile(
    r"(?<![\w.,^])(?P<sign>[-−–+]?)(?P<whole>\d{1,3}(?:[,\u00a0\u202f\u2009]\d{3})+(?!\d)|\d{1,40})?(?P<decimals>\.\d{1,40})?"
    r"(?<=\d)(?!\d|,\d)(?:[eE](?P<exponent>[-+]?\d{1,2})(?!\w))?"
    r"(?:(?P<mixed>\s+\d{1,9})?\s?/\s?(?P<below>\d{1,40})(?![\d.]))?"
    r"(?:\s*(?:x|×|\*|·)\s*10\s?(?:\^|\*\*)\s?\{?(?P<power>[-−]?\d{1,2})\}?)?"
    r"(?:\s*(?P<scale>thousand|million|billion|trillion)\b)?"
    r"(?:\s?(?P<percent>%|percent\b|per cent\b))?"
)
_LEAD = re.compile(
    r"(?:[\s:;,.\"'“‘`*_()\[\]{}~≈=]|-\s|(?:is|equal|to|about|approximately|approx\.?|around|roughly|exactly|only|just"
    r"|simply|therefore|thus|then|indeed|likely|probably|a total of|an average of|answer|that|now|still|also"
    r"|x|y|n|US|USD|EUR|Rs\.?)(?![\w-]))*",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"\s*(?:[+×÷*/^=−]|[-–]\s?\d|x\s*\d|times\b|plus\b|minus\b|divided\b|multiplied\b)")
_CALCULATING = re.compile(r"\s*[a-zA-Z]+(?:\s[a-zA-Z]+)?\s*[-+*/x×÷−]\s*\d")
_NOT_PLAIN = re.compile(_MULTIPLIED + r"|:\d|\s\d|\s?(?:[xyznk]|[KM]|π|√|\\?sqrt|\\?pi|i)(?![\w-])|[.,]\d")
_SECOND = re.compile(
    r"(?P<link>\s*(?:to|through|-|–|—|,)\s*|[^.;,()=\d]{0,30}?\b(?:or|and)\b\s*(?:\w+\s+){0,1}?)(?=[-−]?\.?\d)"
)
_SEVERAL_UNKNOWNS = re.compile(r"\d\s*(?:,|and|;)\s*[a-z]\s*=")
_HEADING = re.compile(r"\s*\d+\s*[.):]\s+\S|\s*[A-Za-z]+ \d+\s*[.:)]")
_FRACTION = re.compile(r"(?<=\d)?\s?\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)\s*(\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|operatorname)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;!: ]|\\quad|\\left|\\right|\\[()\[\]]|\^\s*\{?\\circ\}?|~|\\(?=[%$])")
_VULGAR = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8"}
_BRIEF = re.compile(r"[^\w]*(?:[a-zA-Z]\s*=\s*)?[-−\d.,/\s%–]*(?:[a-zA-Z]+[\W_]*){0,4}")
_CALCULATION = re.compile(r"\W*(?:[a-zA-Z]\s*=|\d)")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__")


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
        reading = read(trace, _parse, _weak)
        same = reading.answer is not None and not gold.isdisjoint(_values(reading.answer))
        return verdict(trace, reading, same, problem.answer)


@lru_cache(maxsize=4096)
def _gold_values(answer: str) -> frozenset[Fraction]:
    match = _NUMBER.fullmatch(_plain(answer).strip())
    if match is None or (value := _value(match)) is None:
        raise ValueError(f"expected a number as gold answer, found {answer!r}; use another verifier for this task")
    return frozenset((value, value / 100) if match["percent"] else (value,))


def _values(answer: str) -> set[Fraction]:
    """The numbers that an extracted answer ("3/4", "50%") may stand for."""
    value = Fraction(answer.rstrip("%"))
    return {value, value / 100} if answer.endswith("%") else {value}


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero and for "2 1" before no fraction."""
    value = Fraction(re.sub(r"\D", "", match["whole"] or "0") + (match["decimals"] or ""))
    if match["below"]:
        if not (below := int(match["below"])):
            return None
        value = value + Fraction(int(match["mixed"]), below) if match["mixed"] else value / below
    value *= _SCALES.get(match["scale"] or "", 1)
    for power in (match["exponent"], match["power"]):
        value *= Fraction(10) ** int(power.replace("−", "-")) if power else 1
    return -value if match["sign"] in ("-", "−", "–") else value


def _text(value: Fraction, percent: bool = False) -> str:
    """A value as people write it: 18, 0.75, 1/3, 50%."""
    places = 0
    rest = value.denominator
    while rest > 1 and places < 50 and 10**places % rest:
        places += 1
    if 10**places % rest:
        return str(value)
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    whole = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return ("-" if value < 0 else "") + whole + ("%" if percent else "")


def _plain(text: str) -> str:
    """Without currency signs, markup and LaTeX that says nothing about the number."""
    if "\\" in text:
        text = _LATEX_SPACE.sub("", text)
        text = _LATEX_TEXT.sub(r" \1 ", text)
        text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text).replace("- ", "-")
        text = text.replace("\\times", "×").replace("\\cdot", "·").replace("\\div", "÷").replace("\\approx", "≈")
    text = text.replace("{,}", ",").replace("**", "").replace("__", "")
    if not text.isascii():
        for sign, fraction in _VULGAR.items():
            text = text.replace(sign, fraction)
        text = re.sub(r"[€£¥₹]", "", text)
    return text.replace("$", "") if "$" in text else text


def _parse(statement: Statement) -> Reading | None:
    quote = statement.text if statement.boxed else statement.sentence
    plain = _plain(quote).rstrip()
    if OPEN.match(plain):
        reading: Reading | None = ambiguous(quote, "leaves the answer open")
    elif not statement.strict:
        reading = _leading(plain, quote) or _behind_equals(plain, quote) or _only(plain, quote)
    elif _HEADING.match(plain) or not (statement.last or _BRIEF.fullmatch(plain)):
        reading = None
    else:
        reading = _leading(plain, quote) or (_behind_equals(plain, quote) if _CALCULATION.match(plain) else None)
    return reading


def _leading(sentence: str, quote: str) -> Reading | None:
    """The number a sentence begins with."""
    lead = _LEAD.match(sentence)
    start = lead.end() if lead else 0
    number = _NUMBER.match(sentence, start)
    if number is None:
        word = _WORD.match(sentence, start)
        return Reading(str(_word_value(word)), quote) if word else None
    if "=" in sentence and _CALCULATING.match(sentence, number.end()):
        return None
    if _OPERATOR.match(sentence, number.end()):
        unsolved = "=" not in sentence and "≈" not in sentence
        return Reading(None, quote, why="states a calculation, not its result") if unsolved else None
    return _checked(sentence, number, quote)


def _behind_equals(sentence: str, quote: str) -> Reading | None:
    """The number behind the last equals sign."""
    sign = max(sentence.rfind("="), sentence.rfind("≈"))
    after = sentence[sign + 1 :]
    if sign < 0:
        return None
    if _SEVERAL_UNKNOWNS.search(sentence):
        return ambiguous(quote, "names several unknowns")
    lead = _LEAD.match(after)
    number = _NUMBER.match(after, lead.end() if lead else 0)
    if number is None or _OPERATOR.match(after, number.end()):
        return None
    return _checked(after, number, quote)


def _only(sentence: str, quote: str) -> Reading | None:
    """The one number of a sentence."""
    numbers = [m for m in _NUMBER.finditer(sentence) if m[0]]
    if not numbers:
        return None
    if len(numbers) > 1:
        return ambiguous(quote, "names several numbers")
    if _OPERATOR.match(sentence, numbers[0].end()):
        return None
    return _checked(sentence, numbers[0], quote)


def _checked(sentence: str, number: re.Match[str], quote: str) -> Reading:
    """The number as the answer, unless what follows makes it something else or names a second one."""
    rest = sentence[number.end() :]
    value = _value(number)
    if value is None or _NOT_PLAIN.match(rest):
        return Reading(None, quote, why="states something that is not a plain number")
    second = _SECOND.match(rest)
    if second:
        other = _NUMBER.match(rest, second.end())
        if other is None or _value(other) != value:
            return ambiguous(quote, "states two answers at once")
    return Reading(_text(value, bool(number["percent"])), quote)


def _word_value(word: re.Match[str]) -> int:
    if word[1]:
        return _WORDS[word[1].lower()] + _WORDS[word[2].lower()]
    return _WORDS[word[3].lower()]


def _weak(text: str, cut: bool) -> Reading:
    """Where nothing is stated plainly: a bare number as last line, one in bold, or a closing "So ... 18 ..."."""
    if cut:
        return UNREAD
    line = last_line(text)
    bare = _plain(line).strip(" .!*_`\"'()[]")
    if re.fullmatch(r"(?:[a-zA-Z]\s*=\s*)?[^a-zA-Z=]*(?:\s?[a-zA-Z%]+){0,2}", bare) and "=" not in bare[3:]:
        reading = _leading(bare, line)
        if reading and len(line) <= 40:
            return reading
    bold = [m for m in _BOLD.finditer(line) if _NUMBER.search(_plain(m[0]))]
    if len(bold) == 1:
        return _leading(_plain(bold[0][0]), line) or _only(_plain(bold[0][0]), line) or UNREAD
    sentence = last_sentence(text)
    if CONCLUSION.match(sentence):
        plain = _plain(sentence)
        return _behind_equals(plain, sentence) or (_only(plain, sentence) if "=" not in plain else None) or UNREAD
    return UNREAD
