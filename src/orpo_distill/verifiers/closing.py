"""Which number a text ends on that says nowhere "the answer is": weaker signs, and only in texts that are not cut.

In this order: a bare number as last line, one in bold, "Total: 18", and the closing sentence of the solution, without
what is often said after it (checks, notes, offers of help). Where that sentence holds several numbers, the result of
the last calculation, the number that the question does not give and words like "a total of" must not disagree.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from orpo_distill.verifiers.numerals import NUMBER, WORD, numbers_in, unmarked, value_of, word_value
from orpo_distill.verifiers.quantity import NOT_PLAIN, behind_equals, checked, leading, only
from orpo_distill.verifiers.statements import (
    CONCLUSION,
    LONGEST,
    SENTENCE_END,
    UNREAD,
    Reading,
    ambiguous,
    last_line,
    last_sentence,
)

_ANNOUNCED = re.compile(r"^(?:A|a)\s*[:=]|^[=∴≈]")
_BARE = re.compile(r"(?:[a-zA-Z]\s*=\s*)?[^a-zA-Z=]*(?:\s?[a-zA-Z%]+){0,2}")
_DIGIT = re.compile(r"\d")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__")
_POSTSCRIPT = re.compile(
    r"[\n.!?](?:(?<=\n)[\s*_#>-]*(?:Step \d+[:.)]\s*)?|(?<=[.!?]) )(?:\*\*)?(?:Notes?\b|Verif\w+|Double[- ]check"
    r"|Check(?:ing)?(?: (?:the|our|my) \w+)?:|Let(?:'s|’s| us| me) (?:verify|check|double)"
    r"|(?:To|We can) (?:verify|check|double[- ]check)\b|(?:Brief )?Explanation:|Reasoning:|Confidence\b|Let me know\b"
    r"|I hope\b|Hope\b|Feel free\b|Is there anything\b|If you (?:have|need)\b|Please\b|(?:Do|Would) you\b|Thanks?\b"
    r"|Good luck\b|This (?:assumes|matches|confirms|checks)\b|I'm \w+ sure\b)"
)
_BULLET = re.compile(r"\s*(?:[-*•>#]+\s+|\(?\d{1,2}[.):]\s+|Step \d+\s*[:.)]\s*)+")
_ASIDE = re.compile(
    r"\([^()=]*[a-z=][^()]*\)|(?<!= )\b\d+(?:st|nd|rd|th)\b|\b\d+(?::\d+)+\b"
    r"|\b(?:[Ss]tep|[Pp]roblem|[Qq]uestion|[Pp]art|[Cc]ase) \d+\b"
)
_LABELLED = re.compile(r"[\s*_]*[A-Za-z][A-Za-z ()'’-]{0,40}[\s*_]*[:=](?=[^:=]*$)")
_LEFT_OPEN = re.compile(
    r"\b(?:if|unless|suppose|assum\w+|maybe|perhaps|might|could|cannot|can't|unable|not|depends?|either|unclear|unknown|wrong"
    r"|(?<!the )answer|would need|need to (?:find|calculate|know|determine|subtract|add|multiply|divide))\b|n't\b|\?",
    re.IGNORECASE,
)
_REASON = re.compile(r"\b(?:because|since)\b.*")
_SETTING = re.compile(
    r"(?:(?:Then|So|Thus|Therefore|Hence)\W+)?(?:Since|Because|As|After|For|In|On|With|Including|By|During|At|Over|To"
    r"|When|Of)\b[^,=]*,\s(?=.*\d)",
    re.IGNORECASE,
)
_RESULT = re.compile(r"(?:[=≈]|\bequals)\s*(?=[-−(]?[\d.])")
_TOTAL_BEFORE = re.compile(r"\b(?:altogether|in all|combined|in total)\b", re.IGNORECASE)
_TOTAL_BEHIND = re.compile(
    r"\b(?:(?:a|the|in)\s+(?:grand\s+)?total(?:\s+\w+){0,2}\s+of|together|altogether,)\s(?=\$?\d)", re.IGNORECASE
)
_CLAIM = re.compile(r"[^=:]*\d[^=:\d]*:\s[^=]*\d[^=]*=[^=]*\d\D[^=]*=")
_PICTURES = re.compile(r"[\s\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]+$")
_ORDINARY = re.compile(r"\bone\b", re.IGNORECASE)


def closing(question: str, text: str, cut: bool) -> Reading:
    """What a text without a plain statement of its answer ends on; `question` tells given numbers from found ones."""
    if cut:
        return UNREAD
    text = _without_postscript(text if text[-1:].isascii() else _PICTURES.sub("", text))
    line = last_line(text)
    bare = _ANNOUNCED.sub("", unmarked(line).strip(" .!*_`\"'()[]")).strip()
    if _BARE.fullmatch(bare) and "=" not in bare[3:]:
        reading = leading(bare, line)
        if reading and len(line) <= 40:
            return reading
    bold = [m for m in _BOLD.finditer(line) if NUMBER.search(unmarked(m[0]))]
    if len(bold) == 1 and not _BULLET.match(bold[0][1] or bold[0][2]):
        stated = unmarked(bold[0][0])
        return leading(stated, line) or only(stated, line) or UNREAD
    label = _LABELLED.match(line) if len(line) <= 80 else None
    if label and (reading := leading(unmarked(line[label.end() :]), line)):
        return reading
    return _of_sentence(question, text)


def _without_postscript(text: str) -> str:
    """`text` up to the first check, note or offer of help that follows a finished sentence."""
    said = _POSTSCRIPT.search(text)
    return (text[: said.start() + 1].rstrip() or text) if said else text


def _of_sentence(question: str, text: str) -> Reading:
    """The number of the last sentence."""
    sentence = last_sentence(text)
    bullet = _BULLET.match(sentence)
    sentence = sentence[bullet.end() :] if bullet else sentence
    if len(sentence) > LONGEST or not sentence:
        return UNREAD
    plain = unmarked(sentence)
    concluded = CONCLUSION.match(sentence) is not None
    earlier = text[: len(text) - len(sentence) - 1]
    digits = _DIGIT.search(plain) is not None
    if text.endswith("?") or not (digits or concluded or not earlier.strip()):
        return UNREAD
    if digits or "(" in plain:
        plain = _ASIDE.sub(" ", plain)
    if "=" in plain or "≈" in plain:
        if _CLAIM.match(plain):
            return ambiguous(sentence, "names several numbers")
        reading = behind_equals(plain, sentence) or UNREAD
        value = {Fraction(reading.answer.rstrip("%"))} if reading.answer else set()
        first = value and _answered_first(earlier, value, _given(question))
        return ambiguous(sentence, "begins with another number") if first else reading
    if _LEFT_OPEN.search(sentence):
        return UNREAD
    plain = _REASON.sub("", plain)
    if setting := _SETTING.match(plain):
        plain = plain[setting.end() :]
    numbers = numbers_in(plain)
    if not numbers:
        return _in_words(plain, sentence) if concluded or not earlier.strip() else UNREAD
    given = _given(question)
    results = _last_result(f"{earlier} {sentence}")
    values = {value_of(m) for m in numbers}
    if len(values) == 1:
        sure = concluded or results & values or (values.isdisjoint(given) if given else not earlier.strip())
        return checked(plain, numbers[-1], sentence) if sure and not _answered_first(earlier, values, given) else UNREAD
    return _one_of(plain, sentence, numbers, results, given)


def _one_of(
    plain: str, sentence: str, numbers: list[re.Match[str]], results: set[Fraction], given: frozenset[Fraction]
) -> Reading:
    """The number among several that the signs agree on."""
    several = ambiguous(sentence, "names several numbers")
    by_result = [m for m in numbers if value_of(m) in results]
    by_question = [m for m in numbers if given and value_of(m) not in given]
    by_cue = _by_total(plain, numbers)
    chosen = {
        value_of(found[0]) for found in (by_result, by_question, by_cue) if len({value_of(m) for m in found}) == 1
    }
    if len(chosen) != 1:
        return several
    (value,) = chosen
    number = next(m for m in numbers if value_of(m) == value)
    reading = checked(plain[: number.end()], number, sentence)
    return reading if reading.answer and not NOT_PLAIN.match(plain, number.end()) else several


def _by_total(plain: str, numbers: list[re.Match[str]]) -> list[re.Match[str]]:
    """The number called a total: the one behind "a total of", or before "in all"."""
    if behind := _TOTAL_BEHIND.search(plain):
        return [m for m in numbers if m.start() >= behind.end()][:1]
    before = _TOTAL_BEFORE.search(plain)
    return [m for m in numbers if m.end() <= before.start()][-1:] if before else []


def _in_words(plain: str, sentence: str) -> Reading:
    """A sentence whose only number is a word: "So there are five left"."""
    words = [m for m in WORD.finditer(plain) if not _ORDINARY.fullmatch(m[0])]
    return Reading(str(word_value(words[0])), sentence) if len(words) == 1 else UNREAD


def _last_result(text: str) -> set[Fraction]:
    """The number behind the last equals sign of a text, if any."""
    tail = unmarked(text[-LONGEST:])
    if "=" not in tail and "≈" not in tail and "equals" not in tail:
        return set()
    signs = list(_RESULT.finditer(tail))
    number = NUMBER.match(tail, signs[-1].end()) if signs else None
    value = value_of(number) if number else None
    return set() if value is None else {value}


@lru_cache(maxsize=1024)
def _given(question: str) -> frozenset[Fraction]:
    values = map(value_of, numbers_in(unmarked(question)))
    return frozenset(value for value in values if value is not None)


def _answered_first(earlier: str, values: set[Fraction | None] | set[Fraction], given: frozenset[Fraction]) -> bool:
    """Whether the first sentence states another number, not given and not used again: the answer, then its reasons."""
    line = earlier.partition("\n")[0]
    end = SENTENCE_END.search(line)
    first = line[: end.start()] if end else line
    if not given or "=" in first:
        return False
    numbers = numbers_in(unmarked(first))
    if len(numbers) != 1 or value_of(numbers[0]) in given or value_of(numbers[0]) in values:
        return False
    return numbers[0][0] not in unmarked(earlier[len(first) :])
