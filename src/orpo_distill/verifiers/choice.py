"""Is the stated choice the gold letter? By letter, by the choice's own text, or by rejecting every other option."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

from orpo_distill.records import LETTERS, Problem, Trace, Verdict
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
    verdict,
)

_SIGNS = r"[\s:;,\"'“”‘’`*_\[{$\\–—-]*"
_LEAD = re.compile(
    rf"{_SIGNS}(?:(?:[Oo]ptions?|[Cc]hoices?|[Ll]etter|is|are|that|therefore|thus|clearly|likely|most likely|probably"
    rf"|indeed|either|both|simply|definitely|still|actually|text|textbf|mathrm|mathbf)\b{_SIGNS})*"
)
_WORD = re.compile(r"[^\W_]+")
_LETTER = re.compile(
    r"\(\s*([A-Ja-j])\s*\)|([A-J])(?=\)|[.:,;]|\s*[-–—]|[\"'”’*_`}\]$\\]|\s*$|\s+(?:because|since|as|is|which|or|and|\(|\")"
    r"|/)|([B-HJ])(?=\s)|([a-j])(?=\)|\s*[.:]?\s*$)"
)
_MORE = re.compile(
    r"\)?[\s,]*(?:or|and|and/or|&|/|,)\s*(?:also\s+)?(?:[Oo]ption\s+|[Cc]hoice\s+)?(?:\(([A-J])\)|([A-J])\b(?!\s*[a-z]))"
)
_OR = re.compile(
    r"\bor\s+(?:possibly\s+|maybe\s+)?(?:[Oo]ption\s+|[Cc]hoice\s+)?(?:\(([A-J])\)|([A-J])(?=[).:,]|\s*$))"
)
_REFUTED = re.compile(
    r"\W*(?:[^.;,()\n]{0,60},)?\s*(?:is|was|are|would be|seems|cannot be|can be|as|could|might|may|does)\s+"
    r"(?:not\b|incorrect|wrong|un\w+|ruled|eliminated|excluded)|\W*(?:isn't|cannot|can't|does not|doesn't)\b"
)

_MENTION = re.compile(
    r"([A-J])(?![a-z])(?:\)(?<=\([A-J]\))|(?:(?<=ption [A-J])|(?<=hoice [A-J])|(?<=nswer [A-J]))(?![\w'’])"
    r"|(?:(?<![\w ][A-J])|(?<=[.,:;] [A-J])|(?<=but [A-J])|(?<=so [A-J])|(?<=So [A-J])|(?<=hus [A-J])|(?<=ence [A-J])"
    r"|(?<=fore [A-J]))(?=\)? (?:is|seems|makes|would be)(?: not| to be)?(?: the| also)?"
    r" (?:correct|right|best|most|answer|wrong|incorrect)\b)"
    r"|(?:(?<=hoose [A-J])|(?<=pick [A-J])|(?<=elect [A-J])|(?<=go with [A-J])|(?<=t's [A-J])|(?<=t’s [A-J])"
    r"|(?<=eaving [A-J]))(?=\s*(?:[.,;:)\n]|$)|\s+(?:because|since)\b))"
)
_PLAINLY_WRONG = (" is incorrect", " are incorrect", " is not ", " are not ", " is wrong", " is also incorrect")
_SUPERLATIVE = (
    r"(?:(?:most|more)\s+(?:\w+\s+and\s+)?(?:accurate|appropriate|suitable|plausible|logical|reasonable|fitting|correct"
    r"|relevant|effective|likely(?!\s+to\b(?!\s+be\s+(?:correct|the)))|probable|obvious|sensible|viable)|best|better"
    r"|only\s+(?:\w+\s+)?(?:option|choice|one|answer)|(?:appropriate|suitable|logical|likely|accurate|expected"
    r"|reasonable|plausible|better)\s+(?:answer|choice|option))"
)
_AFFIRMED = re.compile(
    r"\b(?:is|are|was|be|seems|appears|remains|as)\s+"
    r"(?:(?:therefore|thus|hence|then|also|indeed|clearly|definitely|obviously|overall|considered|to|be|very|the one"
    r"|likely|probably)\s+)*"
    rf"(?:(?:the\s+)?(?:correct|right)\b(?!\s+(?:if|when|in|to|about|for\s+(?:some|other))\b|,? but\b)"
    rf"|(?:the|our|by\s+far\s+the)\s+(?:(?!incorrect|wrong)\w+\s+)?(?:answer|{_SUPERLATIVE})\b|most\s+(?:appropriate|likely(?!\s+to\b)|accurate"
    r"|suitable)\b(?!\s+to\b))"
    rf"|^\W*(?:as\s+)?the\s+(?:most\s+|only\s+)?(?:(?:correct|right|best)\b|{_SUPERLATIVE})"
    r"|^[\s,]*(?:\w+\s+)?(?:fits|matches)\b(?=\s+(?:best|better|the|this|all|well)\b|\s*$|,)|\bmakes the most sense\b"
    r"|\b(?:best|correctly|accurately)\s+(?:describes|explains|answers|fits|matches|identifies|represents|states"
    r"|completes|reflects)\b"
)
_AFFIRMING = ("correct", "right", "best", "most", "answer", "only", "fit", "match", "accurately", " more", "better")
_REJECTED = re.compile(
    r"\b(?:not|no|nor|neither|never|cannot|incorrect\w*|wrong|irrelevant|eliminated?|excluded?|ruled? out"
    r"|inaccurate|impossible|false|invalid|implausible|less\s+\w+(?<!less of)(?<!less than)|opposite|too\s+\w+\s+to"
    r"|un(?:related|likely|necessary|suitable|true|reasonable))\b"
    r"|n't\b|n’t\b",
    re.IGNORECASE,
)
_HEDGED = re.compile(
    r"\b(?:but|although|though|however)\b.*\b(?:not|less)\b|\b(?:but|although|though|however)\b.*n't\b"
)
_PARTLY_RIGHT = re.compile(
    r"\W*(?:is|are|may be|can be|could be)\s+(?:\w+ly\s+|also\s+)*(?:correct|true|right|accurate)\b"
)
_EXCLUDING = re.compile(
    r"(?:\b(?:not|nor|neither|never|eliminates?|excludes?|rules? out|ruling out|than|unlike)|n't)\s+"
    r"(?:option\s+|choice\s+|be\s+)?\(?$",
    re.I,
)
_EXCLUDING_ENDS = (
    *("not", "nor", "neither", "never", "eliminate", "eliminates", "exclude", "excludes", "out", "than", "unlike"),
    *("n't", "option", "choice", "be"),
)
_CHOSEN = re.compile(
    r"\b(?:choose|pick|select|go with|conclude that|conclude|leaves(?: us with)?|leaving(?: us with)?"
    r"|it's|it’s|so it is|must be)\s+"
    r"(?:(?:only|us|with|the|answer|is|it)\s+)*(?:option\s+|choice\s+)?\(?$",
    re.IGNORECASE,
)
_CHOOSING = ("choose", "pick", "select", "go with", "conclude", "leav", "it's", "it’s", "so it is", "must be")
_JOINT = re.compile(r"[\s,]*(?:(?:and|or|nor|&|/|,)[\s,]*)+(?:options?\s+|choices?\s+)?\(?", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.!?;\n](?:(?<=[;\n])|(?=\s|$))")
_TURN = re.compile(
    r"\b(?:wait|actually|instead|however|but|therefore|thus|hence|so|finally|conclusion|overall|rather"
    r"|second thought)\b",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"(?:.*[-–—,;.]\s*)?(?i:so|therefore|thus|hence|finally)[\s,:]+(?i:(?:it is|it's|it’s|option|choice)\s+)*"
    r"[*_(]*(?:([B-J])|(?<=[\s(*_])(A))[)*_]*"
)
_HEDGING = re.compile(r"\b(?:or|may|might|could|both|if|than|without|rather|depends)\b")
_ALONE = re.compile(r"\W*([A-Ja-j])\W*")
_LINE = re.compile(
    r"[\s*_#>\"'`]*(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+)?\(?([A-J])"
    r"(?:[).:]|\*\*|,(?= (?:because|since|as)\b)|\s*$)[\s*_]*"
    r"((?:because|since|as)\b)?(.*)"
)


class Mention(NamedTuple):
    """A letter in a text and what is said of it until the next letter or the end of the clause."""

    letter: str
    start: int
    affirmed: bool
    rejected: bool
    quote: str


class Choice(Verifier):
    """Reads the last stated choice: "(B)", "B.", "option B", "**B**", or the choice's own text where it is unique.

    A letter that contradicts the text it names, or two letters at once, cannot be told. With `elimination`, a text
    that states no answer but rejects every option except one, each by its letter, counts as stating that one.
    """

    isolated: ClassVar[bool] = False

    elimination: bool = True

    def check_gold(self, problem: Problem) -> None:
        """Raises ValueError unless the gold answer is the letter of one of the choices."""
        _gold(problem)

    def __call__(self, problem: Problem, trace: Trace) -> Verdict:
        """Judge one trace. Raises ValueError for a gold answer that is no choice's letter."""
        gold = _gold(problem)
        choices = _normal_choices(problem.choices)
        reading = read(trace, partial(_parse, choices), partial(_weak, choices, self.elimination), problem.question)
        return verdict(trace, reading, reading.answer == gold, gold)


def _gold(problem: Problem) -> str:
    if len(problem.choices) > len(LETTERS):
        raise ValueError(
            f"expected at most {len(LETTERS)} choices for the verifier choice, found {len(problem.choices)}; leave out "
            f"problem {problem.id}, or take the verifier exact"
        )
    if problem.answer not in LETTERS[: len(problem.choices)] or len(problem.answer) != 1:
        last = LETTERS[len(problem.choices) - 1] if problem.choices else "no choices"
        raise ValueError(
            f"expected the letter of one of {len(problem.choices)} choices (A to {last}) as gold answer, "
            f"found {problem.answer!r}; mend problem {problem.id}"
        )
    return problem.answer


def _normal(text: str) -> str:
    """Lower case words and digits only, without a leading article."""
    words = _WORD.findall(text.lower())
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


@lru_cache(maxsize=4096)
def _normal_choices(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_normal(choice) for choice in choices)


def _named(choices: tuple[str, ...], text: str) -> str | None:
    """The letter of the choice whose text `text` begins with; None if there is none or more than one."""
    if not text:
        return None
    normal = _normal(text[:240])
    found = [(len(c), LETTERS[i]) for i, c in enumerate(choices) if c and (normal == c or normal.startswith(c + " "))]
    longest = max(found, default=(0, ""))
    return longest[1] if [size for size, _ in found].count(longest[0]) == 1 else None


def _parse(choices: tuple[str, ...], statement: Statement) -> Reading | None:
    text = statement.text
    lead = _LEAD.match(text)
    start = lead.end() if lead else 0
    letter = _LETTER.match(text, start)
    if letter is None:
        return _by_text(choices, statement, text[start:])
    return _by_letter(choices, letter, statement)


def _by_letter(choices: tuple[str, ...], letter: re.Match[str], statement: Statement) -> Reading | None:
    """The reading of "(B) salty, because ...". None where the letter is only named to reject it."""
    text = statement.text
    found = (letter[1] or letter[2] or letter[3] or letter[4]).upper()
    rest = text[letter.end() :]
    sentence = rest.partition(". ")[0]
    quote = text[: letter.end()] + sentence
    if _REFUTED.match(sentence):
        return None
    if found not in LETTERS[: len(choices)]:
        return Reading(None, quote, why=f"states {found}, which is not among the {len(choices)} choices")
    for second in (_MORE.match(rest), _OR.search(sentence)):
        if second and (second[1] or second[2]) != found:
            return ambiguous(quote, "states two answers at once")
    named = _named_next(choices, rest)
    if named and named != found and choices[LETTERS.index(found)] != choices[LETTERS.index(named)]:
        return ambiguous(quote, f"the letter {found} contradicts the text, which is choice {named}")
    after = _mentions(statement.source[statement.end - len(rest) + len(sentence) :])
    if any(mention.affirmed and mention.letter != found for mention in after):
        return ambiguous(quote, "another choice is called right afterwards")
    return Reading(found, quote)


def _named_next(choices: tuple[str, ...], rest: str) -> str | None:
    """The choice whose text stands right behind a letter. Behind "B. " it must be a whole sentence."""
    text = rest.lstrip(")]}.:,*_ \t-–—\"'“")
    if "." in rest[: len(rest) - len(text)]:
        text = text.partition(". ")[0]
        named = _named(choices, text)
        return named if named and _normal(text) == choices[LETTERS.index(named)] else None
    return _named(choices, text)


def _by_text(choices: tuple[str, ...], statement: Statement, text: str) -> Reading | None:
    """The reading of "the answer is salty"."""
    if OPEN.match(statement.sentence) and not _named(choices, text):
        return ambiguous(statement.sentence, "leaves the answer open")
    named = _named(choices, text)
    if named is None:
        return None
    rest = _normal(statement.sentence)
    others = [
        c for c in choices if c != choices[LETTERS.index(named)] and re.search(rf"\bor (?:the )?{re.escape(c)}\b", rest)
    ]
    if others:
        return ambiguous(statement.sentence, "states two answers at once")
    return Reading(named, statement.sentence)


def _mentions(text: str) -> list[Mention]:
    """Every letter of a text in order. Letters joined by "and", "or" or a comma share what is said of the last."""
    matches = list(_MENTION.finditer(text))
    found: list[Mention] = []
    for index in reversed(range(len(matches))):
        match = matches[index]
        following = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        end = _CLAUSE_END.search(text, match.end(), following)
        said = text[match.end() : end.start() if end else following]
        letter, start = match[1], match.start()
        if found and not end and _JOINT.fullmatch(said):
            found.append(Mention(letter, start, found[-1].affirmed, found[-1].rejected, found[-1].quote))
            continue
        before = text[max(0, start - 40) : start]
        said_of = text[start - before.endswith("(") : match.end() + len(said)]
        plainly = said.startswith(_PLAINLY_WRONG) or _excludes(before)
        affirmed = not plainly and (_affirms(said) or _chooses(before))
        rejected = not affirmed and (plainly or _rejects(said))
        found.append(Mention(letter, start, affirmed, rejected, said_of))
    return found[::-1]


def _excludes(before: str) -> bool:
    """Whether what stands before a letter excludes it. The last word tells most texts apart, without a search."""
    return before.rstrip(" \n\t(").lower().endswith(_EXCLUDING_ENDS) and _EXCLUDING.search(before) is not None


def _chooses(before: str) -> bool:
    lower = before.lower()
    return any(map(lower.__contains__, _CHOOSING)) and _CHOSEN.search(before) is not None


def _affirms(said: str) -> bool:
    plain = said.replace("incorrect", "").replace("not the correct answer", "")  # no cue begins or ends in these
    if not any(map(plain.__contains__, _AFFIRMING)):
        return False
    cue = _AFFIRMED.search(said)
    if cue is None or _REJECTED.search(said, 0, cue.start()):
        return False
    return "the" in cue[0] or not _HEDGED.search(said, cue.end())


def _rejects(said: str) -> bool:
    if _PARTLY_RIGHT.match(said):
        return False
    return "incorrect" in said or " not " in said or _REJECTED.search(said) is not None


def _weak(choices: tuple[str, ...], elimination: bool, text: str, cut: bool) -> Reading:
    """Where nothing is stated behind "the answer is": "(B) is correct", "B" alone, the choice's text alone."""
    if not cut:
        mentions = _mentions(text)
        line, sentence = last_line(text), last_sentence(text)
        reading = (
            _alone(choices, text)
            or _affirmed(choices, mentions, text)
            or _line(choices, line)
            or _closing(choices, sentence)
            or _whole(choices, line, sentence)
            or (_remaining(choices, mentions) if elimination else None)
        )
        if reading:
            return reading
    first, newline, _ = text.partition("\n")
    if newline or (cut and ". " in first[3:]):  # a whole text of one line was looked at above
        return _line(choices, first) or UNREAD
    return UNREAD


def _affirmed(choices: tuple[str, ...], mentions: list[Mention], text: str) -> Reading | None:
    """The letter that is called right; the last one where a turn ("but", "therefore") leads to it."""
    right = [mention for mention in mentions if mention.affirmed]
    if not right:
        return None
    last = right[-1]
    if last.letter not in LETTERS[: len(choices)]:
        return Reading(None, last.quote, why=f"states {last.letter}, which is not among the {len(choices)} choices")
    others = [mention for mention in right if mention.letter != last.letter]
    if others and (
        others[-1].quote == last.quote or not _TURN.search(text, others[-1].start + len(others[-1].quote), last.start)
    ):
        return ambiguous(last.quote, f"calls both {others[-1].letter} and {last.letter} right")
    if any(mention.rejected and mention.letter == last.letter and mention.start > last.start for mention in mentions):
        return ambiguous(last.quote, f"calls {last.letter} right and then wrong")
    return Reading(last.letter, last.quote)


def _remaining(choices: tuple[str, ...], mentions: list[Mention]) -> Reading | None:
    """The only letter that is not rejected."""
    letters = set(LETTERS[: len(choices)])
    kept = letters - {mention.letter for mention in mentions if mention.rejected}
    if len(kept) != 1 or len(letters) < 2:
        return None
    return Reading(kept.pop(), "; ".join(mention.quote[:24] for mention in mentions if mention.rejected))


def _line(choices: tuple[str, ...], line: str) -> Reading | None:
    """The reading of a line that is nothing but "(B)", "B. salty" or "**B**"."""
    match = _LINE.fullmatch(line)
    if match is None or match[1] not in LETTERS[: len(choices)]:
        return None
    rest = match[3].strip(" .*_\"'`)")
    named = _named(choices, rest)
    if match[2] or not rest:
        return Reading(match[1], line)
    if named is None or _REJECTED.search(rest):
        return None
    if choices[LETTERS.index(named)] != choices[LETTERS.index(match[1])]:
        return ambiguous(line, f"the letter {match[1]} contradicts the text")
    return Reading(match[1], line)


def _alone(choices: tuple[str, ...], text: str) -> Reading | None:
    """The reading of a text that is nothing but a letter, also a small one."""
    match = _ALONE.fullmatch(text) if len(text) < 12 else None
    letter = match[1].upper() if match else ""
    return Reading(letter, text) if letter and letter in LETTERS[: len(choices)] else None


def _closing(choices: tuple[str, ...], sentence: str) -> Reading | None:
    """The reading of a last sentence that ends in "so, B" or concludes with one choice's text and no other."""
    if len(sentence) > LONGEST:
        return None
    match = _CLOSING.fullmatch(sentence) if any(sign in LETTERS for sign in sentence[-3:]) else None
    letter = (match[1] or match[2]) if match else None
    if letter and letter in LETTERS[: len(choices)]:
        return Reading(letter, sentence)
    if not CONCLUSION.match(sentence) or _REJECTED.search(sentence) or _HEDGING.search(sentence):
        return None
    said = f" {_normal(sentence)} "
    named = [index for index, choice in enumerate(choices) if len(choice) > 2 and f" {choice} " in said]
    if len(named) != 1 or _MENTION.search(sentence) or not any(map(str.isalpha, choices[named[0]])):
        return None
    within = any(f" {choices[named[0]]} " in f" {choice} " for choice in choices if choice != choices[named[0]])
    return None if within else Reading(LETTERS[named[0]], sentence)


def _whole(choices: tuple[str, ...], line: str, sentence: str) -> Reading | None:
    """The reading of a last line or concluding sentence that is a choice's own text."""
    longest = 2 * max(map(len, choices), default=0) + 40
    for part in (line, sentence):
        if len(part) > longest:
            continue
        conclusion = CONCLUSION.match(part)
        normal = _normal(part[conclusion.end() :] if conclusion else part)
        named = [LETTERS[index] for index, choice in enumerate(choices) if choice and choice == normal]
        if len(named) == 1:
            return Reading(named[0], part)
    return None
