"""Does the stated yes or no equal the gold one? A yes or no that only stands in a sentence does not count."""

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

from orpo_distill.records import Problem, Trace, Verdict
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.statements import (
    CONCLUSION,
    LONGEST,
    OPEN,
    UNREAD,
    Reading,
    Statement,
    ambiguous,
    last_line,
    last_sentence,
    read,
    taken_back,
    verdict,
)

_ANSWERS = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
_SIGNS = r"[\s:;,\"'“”‘’`*_(\[{$\\–—-]*"
_LEAD = (
    rf"{_SIGNS}(?:(?:option|choice|letter|(?-i:an?)(?!\))|is|that|simply|most|likely|probably|definitely|clearly|therefore|thus|so"
    r"|indeed|also|still|the|resounding|clear|straightforward|definitive|definite|and|simple|technically|generally|actually|essentially|almost"
    r"|to be"
    rf"|certainly|ultimately|unequivocally|text|mathrm|textbf|either)\b{_SIGNS})*"
)
_LETTER = r"(?:\(?(?P<{0}>[ABab])\)|(?-i:(?P<{1}>[AB]))(?![\w'’]))"
_NO_NOUN = (
    r"(?!\s+(?:longer|one|more|less|fewer|doubt|matter|evidence|such|way|single|known|specific|clear|definitive"
    r"|definite|simple|straightforward|direct|right|correct|exact|different|better|worse|need|reason|other)\b)"
)
_WORD = rf"(?P<word>[Yy]es|YES|[Tt]rue|TRUE|[Ff]alse|FALSE|(?:[Nn]o|NO){_NO_NOUN})(?![\w-])"
_STATED = re.compile(
    rf"{_LEAD}(?:{_LETTER.format('paired', 'paired_bare')}?[\s.,:;\"'“”‘’*_)–—-]*{_WORD}"
    rf"|{_LETTER.format('alone', 'alone_bare')}"
    r"(?=\W*$|\s*[.,;:()\"'”’*_}–—-]|\s+(?:because|since|as|is|which|or|and|for)\b))",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"(?:\b(?:or|and|otherwise|else|but)\b|/)[\s,(\"'“]*(?:(?:the answer|it) (?:is|would be) )?"
    r"(?:\(?([ab])\)[\s,\"'“]*)?[\"'“]*(?:(yes|no|true|false)(?=\W*(?:$|[.,;)\"'”]|if\b|when\b)))?",
    re.IGNORECASE,
)
_REFUTED = re.compile(
    r"[\s\"'”’)*,.]*(?:(?:which|but (?:this|that|it)|this|that|is|would be|cannot be|can't be)\s+)+"
    r"(?:not|incorrect|wrong|false|untrue)\b",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"[\s\"'”’)*,.]*(?:(?:is|as)\s+(?:not|incorrect|wrong|false)\b|could\b|might\b|may\b)", re.IGNORECASE
)
_AFFIRMED = re.compile(
    r"([AB])(?:\)(?<=\([AB]\))|\b(?:(?<=ption [AB])|(?<=hoice [AB])|(?<=nswer [AB])))"
    r"(?:[\s,:\"'“”–—-]*(?:yes|no)\b)?[\s,\"'”]*"
    r"(?:(?:is|as|must be|would be|being)\s+(?:therefore\s+|thus\s+|also\s+)?(?:the\s+)?(?:most\s+|more\s+)?"
    r"|(?:as\s+)?(?:the|our|my)\s+)?(?:correct|right|best|accurate|appropriate|likely|answer)\b",
)
_PAIR = re.compile(r"\(?\b([AB])\)[\s,:–—-]*[\"'“*]*(yes|no)\b", re.IGNORECASE)
_FIRST = re.compile(
    rf"[\s\"'“*_#-]*(?:{_LETTER.format('letter', 'bare')}[\s.:,–—-]*)?[\"'“*_]*(?P<word>yes|no|true|false)"
    r"[\"'”*_]*(?:\s*[,.;:!–—]|\s+-\s|\s*$|\s*\n)",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"[\"”]\s+(?:is|was|means|refers|completes)\b"
    r"(?! (?:the |a |therefore |thus |most )*(?:correct|right|best|answer|appropriate|accurate))"
)
_BESIDE = re.compile(r"\s*,\s*[\"“]?(yes|no)\W*", re.IGNORECASE)
_CLOSING = re.compile(
    r"(?:.*[-–—,;:]\s*)?(?:(?:so|therefore|thus|hence)\b[^:.]{0,80}:|so|therefore|thus|hence|\W*conclusion|verdict"
    r"|based on [^,.]{1,80}|to answer yes or no|i(?:'d|’d| would) say|it(?:'s|’s| is)|yes\s?(?:/|or)\s?no\)?)[\s,:*_]+"
    r"(?:definitely |clearly |a |probably )*(?P<word>yes|no)",
    re.IGNORECASE,
)
_SAID_FIRST = re.compile(r"[\s*_\"“]*(yes|no)\b[\s*_\"”]*[.,:;!–—-]", re.IGNORECASE)
_ONLY_LETTER = re.compile(r"[\s\"'*_(]*(?P<letter>[AB])[\s\"'*_).]*")


class YesNo(Verifier):
    """Reads the last stated yes or no; true and false count as such.

    A letter alone, "(B)", is read by the problem's choices; where it has none, (A) is yes and (B) is no.
    """

    isolated: ClassVar[bool] = False

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError unless the gold answer is yes or no (or true or false)."""
        _gold(problem)

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer that is neither yes nor no."""
        gold = _gold(problem)
        letters = _letters(problem.choices)
        reading = read(trace, partial(_parse, letters), partial(_weak, letters), problem.question)
        return verdict(trace, reading, reading.answer == gold, gold)


def _gold(problem: Problem) -> str:
    answer = problem.answer.strip().lower()
    if problem.choices and answer not in _ANSWERS:
        answer = _letters(problem.choices).get(answer.upper(), answer)
    if answer not in _ANSWERS:
        raise ValueError(f"expected yes or no as gold answer, found {problem.answer!r}; use another verifier")
    return _ANSWERS[answer]


def _letters(choices: tuple[str, ...]) -> dict[str, str]:
    if not choices:
        return {"A": "yes", "B": "no"}
    words = (_ANSWERS.get(choice.strip(" .").lower()) for choice in choices)
    return {letter: word for letter, word in zip("AB", words, strict=False) if word}


def _parse(letters: dict[str, str], statement: Statement) -> Reading | None:
    stated = _STATED.match(statement.text)
    if stated is None:
        if not OPEN.match(statement.sentence):
            return None
        later = _last_affirmed(letters, statement.source, statement.end)
        return later or ambiguous(statement.sentence, "leaves the answer open")
    rest = statement.text[stated.end() :]
    rest = rest if statement.boxed else rest.partition(". ")[0]
    quote = statement.text[: stated.end() + len(rest)]
    if _REJECTED.match(rest) or _SUBJECT.match(rest):
        return None
    if _REFUTED.match(rest):
        return ambiguous(quote, "takes the answer back")
    letter = (stated["paired"] or stated["paired_bare"] or stated["alone"] or stated["alone_bare"] or "").upper()
    if not stated["word"]:
        answer = letters.get(letter)
        reading = Reading(answer, quote) if answer else Reading(None, quote, why="states a letter that is no choice")
    else:
        reading = _agreed(letters, letter, stated["word"], quote)
    if (second := _BESIDE.fullmatch(rest)) and reading.answer not in (None, second[1].lower()):
        return ambiguous(quote, "states both answers")
    others = (other[2] or letters.get((other[1] or "").upper()) for other in _OTHER.finditer(rest))
    if any(_ANSWERS[other.lower()] != reading.answer for other in others if other):
        return ambiguous(quote, "states both answers")
    later = _last_affirmed(letters, statement.source, statement.start)
    if later is not None and reading.answer is not None and later.answer != reading.answer:
        return ambiguous(later.quote, f"says {reading.answer}, and then that the other letter is right")
    return reading


def _last_affirmed(letters: dict[str, str], text: str, start: int) -> Reading | None:
    """The last letter that is called right: "option (B) is the correct answer"."""
    found = list(_AFFIRMED.finditer(text, start))
    if not found or (answer := letters.get(found[-1][1])) is None:
        return None
    last = found[-1]
    bracket = last.start() > start and text[last.start() - 1] == "(" and last[0][1] == ")"
    return Reading(answer, text[last.start() - bracket : last.end()])


def _agreed(letters: dict[str, str], letter: str | None, word: str, quote: str) -> Reading:
    """The word as the answer, unless the letter before it says the opposite."""
    answer = _ANSWERS[word.lower()]
    if letter and letters.get(letter.upper(), answer) != answer:
        return ambiguous(quote, "the letter contradicts the word")
    return Reading(answer, quote)


def _weak(letters: dict[str, str], text: str, cut: bool) -> Reading:
    """Where nothing is stated plainly: "So, no." at the end, "(B) no" in a conclusion, "No, because" at the start."""
    if not cut:
        sentence = last_sentence(text)
        conclusion = CONCLUSION.match(sentence)
        start = conclusion.end() if conclusion else 0
        for part in (sentence[start:].lstrip(" ,"), last_line(text)):
            first = _FIRST.match(part[:LONGEST])
            if first:
                found = _agreed(letters, _letter_of(first), first["word"], part)
                return found if conclusion or not _contradicts(text, part, found) else ambiguous(part, "says both")
        closing = _CLOSING.fullmatch(sentence[-LONGEST:])
        if closing:
            return Reading(closing["word"].lower(), sentence)
        pairs = list(_PAIR.finditer(sentence))
        if (
            len(pairs) == 1
            and not re.search(r"\b(?:not|neither|nor|[Ii]f)\b|n't", sentence[: pairs[0].start()])
            and not _REJECTED.match(sentence, pairs[0].end())
        ):
            return _agreed(letters, pairs[0][1], pairs[0][2], sentence)
        affirmed = _last_affirmed(letters, text, 0)
        if affirmed:
            return affirmed
        only = _ONLY_LETTER.fullmatch(last_line(text))
        if only and only["letter"] in letters:
            return Reading(letters[only["letter"]], text[-20:])
    first = _FIRST.match(text[:LONGEST])
    if first and (not cut or first.end() < len(text)):
        return _agreed(letters, _letter_of(first), first["word"], text[:60])
    return UNREAD


def _letter_of(first: re.Match[str]) -> str | None:
    """The letter before a word; "A: No" is an answer to "Q:", not the choice A."""
    return None if first[0].lstrip().startswith("A:") else first["letter"] or first["bare"]


def _contradicts(text: str, part: str, found: Reading) -> bool:
    """Whether a text began with the other word and says nothing that turns before the last part."""
    first = _SAID_FIRST.match(text[:LONGEST])
    if first is None or found.answer in (None, first[1].lower()):
        return False
    return not taken_back(text[: len(text) - len(part)], first.end())
