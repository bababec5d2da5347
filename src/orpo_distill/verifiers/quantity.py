"""Which number a sentence states as its answer: the one it begins with, the one behind "=", or its only one."""

from __future__ import annotations

import re

from orpo_distill.verifiers.numerals import MULTIPLIED, NUMBER, WORD, as_text, numbers_in, value_of, word_value
from orpo_distill.verifiers.statements import Reading, ambiguous

_LEAD = re.compile(
    r"(?:[\s:;,.\"'“‘`*_()\[\]{}~≈=]|-\s|(?:is|equal|to|about|approximately|approx\.?|around|roughly|exactly|only|just"
    r"|simply|therefore|thus|then|indeed|likely|probably|a total of|an average of|answer|that|now|still|also"
    r"|x|y|n|US|USD|EUR|Rs\.?)(?![\w-]))*",
    re.IGNORECASE,
)
_OPERATOR = re.compile(
    r"\s*(?:[+×÷*^=−]|/\s*[\d(.]|[-–]\s?\d|x\s*\d|(?:times|plus|minus|divided by|multiplied by)\s+[\d(.]|of \d)"
)
_CALCULATING = re.compile(r"\s*[a-zA-Z]+(?:\s[a-zA-Z]+)?\s*[-+*/x×÷−]\s*\d")
NOT_PLAIN = re.compile(
    MULTIPLIED
    + r"|\s+(?:squared|cubed|factorial)\b|[eE][-+]?\d|:\d|\s\d|\s?(?:[xyznk]|[KM]|π|√|\\?sqrt|\\?pi|i)(?![\w-])|[.,]\d"
)
_SECOND = re.compile(
    r"(?P<link>\s*(?:to|through|-|–|—|,)\s*|[^.;,()=\d]{0,30}?\b(?:or|and)\b\s*(?:\w+\s+){0,1}?)(?=[-−]?\.?\d)"
)
_EQUALS = re.compile(r"[=≈]|\bwhich (?:is|equals|gives|makes|comes to)\b|, giving\b")
_NAMED_LAST = re.compile(r"(?:^|\s)([-\d.,/]+)\s*=\s*[A-Za-z]\W*$")
_TURN = re.compile(
    r"\b(?:meaning|so|thus|therefore|hence|but|round(?:s|ed|ing)(?: up| down| off)? to|i\.e)\b(?=[^.]*\d)"
)
_QUALIFIED = re.compile(
    r"\b(?:(?:less|more|fewer|greater|higher|lower|larger|smaller) than|twice|double|triple|half|square root of)\s+$",
    re.IGNORECASE,
)
_SEVERAL_UNKNOWNS = re.compile(r"\d\s*(?:,|and|;)\s*[a-z]\s*=")


def leading(sentence: str, quote: str) -> Reading | None:
    """The number a sentence begins with."""
    lead = _LEAD.match(sentence)
    start = lead.end() if lead else 0
    number = NUMBER.match(sentence, start)
    if number is None:
        word = WORD.match(sentence, start)
        return Reading(str(word_value(word)), quote) if word else None
    if "=" in sentence and _CALCULATING.match(sentence, number.end()):
        return None
    if _OPERATOR.match(sentence, number.end()):
        unsolved = not _EQUALS.search(sentence)
        return Reading(None, quote, why="states a calculation, not its result") if unsolved else None
    return checked(sentence, number, quote)


def behind_equals(sentence: str, quote: str) -> Reading | None:
    """The number behind the last equals sign."""
    equals = [sign.end() for sign in _EQUALS.finditer(sentence)]
    if not equals:
        return None
    after = sentence[equals[-1] :]
    if reverse := _NAMED_LAST.search(sentence):
        after = reverse[1]
    if _SEVERAL_UNKNOWNS.search(sentence):
        return ambiguous(quote, "names several unknowns")
    lead = _LEAD.match(after)
    number = NUMBER.match(after, lead.end() if lead else 0)
    if number is None or _OPERATOR.match(after, number.end()):
        return None
    turn = _TURN.search(after, number.end())
    if turn:
        return leading(after[turn.end() :], quote) or only(after[turn.end() :], quote)
    return checked(after, number, quote)


def only(sentence: str, quote: str) -> Reading | None:
    """The one number of a sentence."""
    numbers = numbers_in(sentence)
    if not numbers:
        return None
    if len(numbers) > 1:
        return ambiguous(quote, "names several numbers")
    if _OPERATOR.match(sentence, numbers[0].end()):
        return None
    if _QUALIFIED.search(sentence[: numbers[0].start()]):
        return ambiguous(quote, "states a number only in relation to another")
    return checked(sentence, numbers[0], quote)


def checked(sentence: str, number: re.Match[str], quote: str) -> Reading:
    """The number as the answer, unless what follows makes it something else or names a second one."""
    rest = sentence[number.end() :]
    value = value_of(number)
    if value is None or NOT_PLAIN.match(rest):
        return Reading(None, quote, why="states something that is not a plain number")
    second = _SECOND.match(rest)
    if second:
        other = NUMBER.match(rest, second.end())
        if other is None or value_of(other) != value:
            return ambiguous(quote, "states two answers at once")
    return Reading(as_text(value, bool(number["percent"])), quote)
