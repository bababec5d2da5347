r"""Numbers as people and models write them: 1,200 and 1.5 million, 5 1/2, 3/4, 1.2e3, eighteen, \frac{3}{4}."""

from __future__ import annotations

import re
from fractions import Fraction

SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}
MULTIPLIED = (
    r"\s+(?:hundred|thousand|million|billion|dozen|quarters?|thirds?|half|halves|fourths?|fifths?|point|and an?)\b"
)
WORD = re.compile(
    rf"(?:({'|'.join(_TENS)})[- ]({'|'.join(_ONES[1:10])})\b|({'|'.join(_WORDS)})\b(?! of\b)(?!-))(?!{MULTIPLIED})",
    re.IGNORECASE,
)

NUMBER = re.compile(
    r"(?<![\w.,^])(?P<sign>[-−–+]?)(?P<whole>\d{1,3}(?:[,\u00a0\u202f\u2009]\d{3})+(?!\d)"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d{1,40})?(?P<decimals>\.\d{1,40})?"
    r"(?<=\d)(?!\d|,\d)(?:[eE](?P<exponent>[-+]?\d{1,2})(?!\w))?"
    r"(?:(?P<mixed>\s+\d{1,9})?\s?/\s?(?P<below>\d{1,40})(?![\d.]))?"
    r"(?:\s*(?:x|×|\*|·)\s*10\s?(?:\^|\*\*)\s?\{?(?P<power>[-−]?\d{1,2})\}?)?"
    r"(?:\s*(?P<scale>thousand|million|billion|trillion)\b)?"
    r"(?:\s?(?P<percent>%|percent\b|per cent\b))?"
)
_BEGINNING = re.compile(r"[-−–+.\d](?<![\w.,^].)")
_SEPARATOR = re.compile(r"\D")
_FRACTION = re.compile(r"(?<=\d)?\s?\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)\s*(\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|operatorname)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;!: ]|\\quad|\\left|\\right|\\[()\[\]]|\^\s*\{?\\circ\}?|~|\\(?=[%$])")
_CENTS = re.compile(r"(\d+) dollars? and (\d{1,2}) cents\b")
_CURRENCY = re.compile(r"\b(?:Rs\.?|USD?|EUR)\s?(?=\$?\d)")
_SIGN = re.compile(r"(?:^\s*|(?<=\bis )|(?<=[:=] ))(?:minus|negative) (?=\$?\d)", re.IGNORECASE)
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_VULGAR = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8"}


def numbers_in(text: str) -> list[re.Match[str]]:
    """Every number of a text, as NUMBER finds them: tried only where one can begin, because NUMBER is slow to fail."""
    found = []
    at = 0
    while start := _BEGINNING.search(text, at):
        number = NUMBER.match(text, start.start())
        if number:
            found.append(number)
        at = number.end() if number else start.end()
    return found


def value_of(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero and for "2 1" before no fraction."""
    whole = match["whole"] or "0"
    digits = whole if whole.isdecimal() else _SEPARATOR.sub("", whole)
    value = Fraction(digits + match["decimals"]) if match["decimals"] else Fraction(int(digits))
    if match["below"]:
        if not (below := int(match["below"])):
            return None
        value = value + Fraction(int(match["mixed"]), below) if match["mixed"] else value / below
    if match["scale"]:
        value *= SCALES[match["scale"]]
    if power := match["exponent"] or match["power"]:
        value *= Fraction(10) ** int(power.replace("−", "-"))
    return -value if match["sign"] in ("-", "−", "–") else value


def as_text(value: Fraction, percent: bool = False) -> str:
    """A value as people write it: 18, 0.75, 1/3, 50%."""
    if value.denominator == 1:
        return f"{value.numerator}%" if percent else str(value.numerator)
    places = 0
    rest = value.denominator
    while rest > 1 and places < 50 and 10**places % rest:
        places += 1
    if 10**places % rest:
        return str(value)
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    whole = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return ("-" if value < 0 else "") + whole + ("%" if percent else "")


def unmarked(text: str) -> str:
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
    if "<<" in text:
        text = _ANNOTATION.sub("", text)
    if "Rs" in text or "US" in text or "EUR" in text:
        text = _CURRENCY.sub("", text)
    if "cents" in text:
        text = _CENTS.sub(lambda m: f"{m[1]}.{int(m[2]):02}", text)
    if "inus" in text or "egative" in text:
        text = _SIGN.sub("-", text)
    return text.replace("$", "") if "$" in text else text


def word_value(word: re.Match[str]) -> int:
    """The value of a number in words."""
    if word[1]:
        return _WORDS[word[1].lower()] + _WORDS[word[2].lower()]
    return _WORDS[word[3].lower()]
