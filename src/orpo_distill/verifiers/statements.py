"""Where a text states its answer. Shared by the verifiers of this folder.

The last *stated* answer counts, not the last number or letter. `statements` finds, last first, what stands behind
"the answer is", "Answer:", "####" or in "\\boxed{}"; each verifier parses that according to its kind. Only where
nothing is stated so plainly does a verifier look for weaker signs, and hardly ever in a text that was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from orpo_distill.records import FinishReason, Outcome, Trace, Verdict

QUOTE_LENGTH = 80
LONGEST = 600  # characters of a line that are read as one answer: texts that loop must not cost quadratic time
SHORT = 200  # characters that most last sentences have at most: looked at before the whole line
MOST = 50  # announcements of an answer that are looked at, from the last


@dataclass(frozen=True, slots=True)
class Statement:
    """One place, `source[start:end]`, where a text says what its answer is.

    `text` runs to the end of the line. `strict` (after a colon, "####" or a line break) means that the answer must come
    first in it: reasoning may follow "Answer:" as well. `complete` is False where the text ends within the sentence;
    `last` says that no other line follows, `hedged` that the answer only "could be" this.
    """

    text: str
    source: str
    start: int
    end: int
    complete: bool = True
    strict: bool = False
    last: bool = True
    hedged: bool = False
    boxed: bool = False

    @property
    def sentence(self) -> str:
        """`text` up to the end of its first sentence."""
        end = SENTENCE_END.search(self.text)
        return self.text[: end.start()] if end else self.text


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text was understood to answer: `answer`, or None with the `outcome` and the reason why not."""

    answer: str | None
    quote: str = ""
    outcome: Outcome = Outcome.UNPARSEABLE
    why: str = ""


UNREAD = Reading(None, why="states no answer")

SENTENCE_END = re.compile(
    r"[.!?](?=[\"'”’)*_]*(?:\s|$))(?<!approx\.)(?<!e\.g\.)(?<!i\.e\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bSt\.)(?<!\bRs\.)"
)
CONCLUSION = re.compile(
    r"(?:And\s+|And so\s+)?(?:So|Therefore|Thus|Hence|Consequently|In total|Altogether|In all|In conclusion|Finally"
    r"|As a result|This means|That means|Overall|To conclude|In summary|∴)\b"
)
OPEN = re.compile(
    r"\s*(?:that |it |this |both |still |rather |therefore |would |may )*(?:depends?\b|cannot be |can't be |can’t be "
    r"|could be either|uncertain|unclear|unknown|maybe|inconclusive|not (?:clear|certain|possible|given)|neither\b"
    r"|both\b|either\b|ambiguous|undetermined|impossible to|none of|all of|subjective|debatable|complicated|complex"
    r"|a hypothetical)",
    re.IGNORECASE,
)
_DEPENDS = re.compile(
    r"\b(?:it|that|this|answer) (?:all |really )?depends\b|\bcannot (?:be determined|determine)\b", re.I
)

_NOUNS = ("nswer", "NSWER", "ption", "hoice", "final ", "Final ")  # what to search for; most texts hold one or two
_FINAL = re.compile(r"[Ff]inal result")
_ADJECTIVES = (
    *("correct ", "right ", "best ", "suitable ", "appropriate ", "likely ", "final ", "accurate ", "logical "),
    *("plausible ", "Correct ", "Best "),
)
_LINK = re.compile(
    r"(?:\s+(?:choice|option|letter))?(?:,[^,.\n]{1,30},|\s*\([^()\n]{2,20}\)(?=\s*:)"
    r"|\s+(?:to|for|of|in|here|that|(?:the|this|that)\s+(?:\w+\s+)?question)\b(?:[^.\n:?!;]|\?(?=[\"”'’])){0,160}?)?"
    r"[\s\"'”’*_]*(?:(?P<link>:|=|→|->"
    r"|\b(?:is|was|are|(?P<hedge>(?:could|may|might)\s+(?:also\s+)?be)|would\s+be|should\s+be|will\s+be|must\s+be|has\s+to\s+be|equals|comes?\s+to)\b(?:[*_]*\s*:)?|\b(?:is|was)(?=n['’]t\b)"
    r"|(?<=\n)|(?=depends\b))|(?:,|\bas|\bof|\bwith|\boption|\bchoice)?\s*(?:a\s+)?"
    r"(?=[\"'“*]*(?:\([A-Ja-j]\)|[A-J]\b\)?(?:[ ,.:]|$)|[Yy]es\b|[Nn]o\b)))"
)
_QUESTION = re.compile(r"[^.!?]{0,80}\?")
_MARKED = re.compile(r"<|\[|答|[Aa][Nn][Ss](?:\.|\s*[:=])|[Rr]é?[es]p[ou]|[Aa]ntwort")
_GAP = re.compile(r"[\s*_]*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PRAISE = _words("final correct right best only most")
_DETERMINERS = _words("the my your our its an a this that")
_SUPPOSING = _words("if whether suppose supposing assume assuming unless imagine what how why until")
_OTHERS = _words(
    "incorrect wrong other another previous earlier possible given first second third next initial old opposite their"
    " his her no one to eliminate eliminated eliminating reject rejecting exclude excluding out"
)
_DENYING = _words("not never cannot doubt unlikely")
_TURNING = _words("so therefore thus but hence and then")
_IF = re.compile(r"\b(?:[Ii]f|[Aa]ssuming|[Ss]uppose)\b")
_OF_AN_OPTION = re.compile(r"\(?[A-J]\)?[^.\n]{0,40}\b(?:indicates|suggests|states|says|implies|claims) that the $")
_SUBQUESTION = re.compile(r"\s+(?:to|for|of)\s+(?:the\s+)?(?:first|second|previous|step|sub|part|intermediate)\b", re.I)
_NEGATED_LINK = re.compile(r"\s*(?:n't|n’t|not\b|never\b)")
_INSTEAD = re.compile(
    r"\s*(?:n't|n’t|not\b)\s[^.,;\n]{1,40}(?:,?\s+but\s+(?:rather\s+)?|[.,;]\s+(?:[Ii]t's|[Ii]t’s|[Ii]t is)\s+)"
    r"(?=[-$(*\"“'\d]|[A-J](?:[.,)]|\s*$)|yes\b|no\b)"
)
_RETRACTIONS = (
    "wait",
    "hold on",
    "scratch",
    "second thought",
    "mistake",
    "error",
    "let me",
    "that",
    "no,",
    "correction",
)
_TAKEN_BACK = re.compile(
    r"(?:^|[.!?\n–—-]\s*)(?:but |oh |hmm,? )?wait\b|\bwait,|\bhold on\b|\bscratch that|\bon second thought"
    r"|\b(?:made|is) (?:a|an) (?:mistake|error)\b"
    r"|\blet me (?:redo|correct|fix|start over|try again|reconsider|recalculate)"
    r"|\bthat(?:'s|’s| is| was) (?:wrong|incorrect|not (?:right|correct))|(?:^|[.!?\n]\s*)(?:no,|correction\b)"
)
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:[#*]+\s*)?(?:Question|Problem|Exercise|Q|Human|User|Instruction)\s*\d*\s*[*]*\s*[:.]"
)
_NEXT_TURN = re.compile(
    r"<\|(?:user|im_start|im_end|endoftext|eot_id|end)\|>|</s>|<(?:eos|end_of_turn|start_of_turn)>|\[INST\]"
)
_SHORT = re.compile(r"(?:\bans(?:\.|\s*[:=]|\.\s*[:=])|<answer>|\[answer\])[ \t]*(?=\S)", re.IGNORECASE)
_FOREIGN = re.compile(
    r"答案(?:是|为|為|：|:)|[Rr]espuesta(?: \w+)? (?:es|:)|[Aa]ntwort(?: \w+)? (?:ist|lautet)|[Rr]éponse(?: \w+)? est"
)


def visible(trace: Trace) -> tuple[str, bool]:
    """A text without its thinking and without the questions it goes on to ask, and whether it was cut."""
    text, cut = trace.text, trace.finish_reason is FinishReason.LENGTH
    marked = "<" in text
    if marked and "</think" in text:
        text = text[text.rfind("</think") :].partition(">")[2]
    elif marked and "<think" in text:
        text = text[: text.find("<think")]
    text = text.lstrip() if cut else text.strip()
    asked = _NEXT_QUESTION.search(text) or ((marked or "[INST" in text) and _NEXT_TURN.search(text)) or None
    if asked and asked.start():
        return text[: asked.start()].strip(), False
    return text, cut


def statements(text: str) -> Iterator[Statement]:
    """Every plain statement of an answer in `text`, the last first. Denied and supposed ones are left out."""
    for start, size in sorted(_anchors(text), reverse=True):
        if text[start] == "\\":
            yield _boxed(text, start + size)
        elif text[start] == "#" or _MARKED.match(text, start):
            yield _to_line_end(text, start + size, strict=True)
        else:
            link = _LINK.match(text, start + size)
            instead = _INSTEAD.match(text, link.end()) if link else None
            if link and (instead or not _denied(text, start, link)):
                gap = _GAP.match(text, (instead or link).end())
                begin = gap.end() if gap else link.end()
                strict = "\n" in text[link.start() : begin] or ":" in link[0][-3:]
                stated = _to_line_end(text, begin, strict)
                if _QUESTION.match(stated.text):
                    continue
                would = "would" in (link["link"] or "") and " if " in stated.sentence
                yield replace(stated, hedged=True) if link["hedge"] or would else stated


def read(
    trace: Trace, parse: Callable[[Statement], Reading | None], weak: Callable[[str, bool], Reading], question: str = ""
) -> Reading:
    """What a trace answers: its last statement that `parse` understands, else what `weak(text, cut)` makes of it.

    A text that states nothing before it repeats its own `question` is read on behind it.
    """
    if trace.finish_reason is FinishReason.ERROR:
        return Reading(None, outcome=Outcome.FAILED, why=trace.error or "there is no text")
    text, cut = visible(trace)
    reading = _stated(text, cut, parse) or (weak(text, cut) if text else UNREAD)
    if reading is UNREAD and question and (start := _repeated(trace.text, question)):
        return read(replace(trace, text=trace.text[start:]), parse, weak)
    if reading is not UNREAD:
        return reading
    if cut:
        return Reading(None, text[-40:], Outcome.TRUNCATED, "the text was cut before it stated an answer")
    if "depends" in text or "determine" in text:
        sentence = last_sentence(text)
        return ambiguous(sentence, "leaves the answer open") if _DEPENDS.search(sentence) else UNREAD
    return UNREAD


def _stated(text: str, cut: bool, parse: Callable[[Statement], Reading | None]) -> Reading | None:
    """The reading of the last plain statement that `parse` understands."""
    for statement in islice(statements(text), MOST):
        if cut and not statement.complete:
            return Reading(None, statement.text, Outcome.TRUNCATED, "the text was cut within its answer")
        reading = parse(statement)
        if reading is None:
            continue
        if statement.hedged:
            return ambiguous(reading.quote, "only says what the answer could be")
        if taken_back(text, statement.start + len(statement.sentence)):
            return ambiguous(reading.quote, "the answer is taken back and no other is given")
        return reading
    return None


def _repeated(text: str, question: str) -> int:
    """Where a text goes on behind "Question: " and the question itself; 0 where it does not repeat it."""
    asked = _NEXT_QUESTION.search(text)
    at = text.find(question, asked.end()) if asked else -1
    return at + len(question) if asked and 0 <= at <= asked.end() + 4 else 0


def verdict(trace: Trace, reading: Reading, correct: bool, gold: str) -> Verdict:
    """The verdict on a reading; `correct` counts only where an answer was read."""
    quote = " ".join(reading.quote.split())
    quote = quote if len(quote) <= QUOTE_LENGTH else quote[: QUOTE_LENGTH - 1] + "…"
    if reading.answer is None:
        return Verdict(trace.id, reading.outcome, None, f'{reading.why}: "{quote}"' if quote else reading.why)
    if correct:
        return Verdict(trace.id, Outcome.CORRECT, reading.answer, f'states "{quote}"')
    return Verdict(trace.id, Outcome.WRONG, reading.answer, f'states "{quote}", expected {gold}')


def ambiguous(quote: str, why: str) -> Reading:
    """A reading that cannot be decided."""
    return Reading(None, quote, Outcome.AMBIGUOUS, why)


def taken_back(text: str, start: int) -> bool:
    """Whether what follows `start` withdraws the answer before it ("Wait, that is wrong")."""
    rest = text[start:].strip().lower()
    return bool(rest) and any(map(rest.__contains__, _RETRACTIONS)) and _TAKEN_BACK.search(rest) is not None


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return text.rstrip().rpartition("\n")[2].strip()


def last_sentence(text: str) -> str:
    """The last sentence of the last line, without its closing mark."""
    line = last_line(text).rstrip(" .!*_\"'”")
    for size in (SHORT, len(line)):
        if ends := [end.end() for end in SENTENCE_END.finditer(line, max(0, len(line) - size))]:
            return line[ends[-1] :].strip(" *_\"'“")
    return line


def _anchors(text: str) -> Iterator[tuple[int, int]]:
    """Where (start, length) the words and signs stand that announce an answer. Plain searches: this is the hot path."""
    for key in _NOUNS:
        at = text.find(key)
        while at >= 0:
            if key == "final " or key == "Final ":
                if final := _FINAL.match(text, at):
                    yield at, len(final[0])
            elif at and text[at - 1] in "aAoOcC" and (key[1] in "sS" or _described(text, at - 1)):
                yield at - 1, len(key) + 1
            at = text.find(key, at + 5)
    if "\\" in text:
        yield from ((m.start(), len(m[0])) for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    if "swer>" in text or "Ans:" in text or "Ans." in text or "ans:" in text or "[" in text:
        yield from ((m.start(), len(m[0])) for m in _SHORT.finditer(text))
    if "espuesta" in text or "Antwort" in text or (not text.isascii() and ("答案" in text or "éponse" in text)):
        yield from ((m.start(), len(m[0])) for m in _FOREIGN.finditer(text))
    if "####" in text:
        yield from ((m.start(), len(m[0])) for m in re.finditer(r"####[ \t]*(?=\S)", text))


def _described(text: str, start: int) -> bool:
    """Whether the word at `start` is called the correct, best, ... one."""
    return text[max(0, start - 12) : start].endswith(_ADJECTIVES)


def _boxed(text: str, start: int) -> Statement:
    depth = 1
    for brace in re.finditer(r"\\[{}]|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            end = start + brace.start()
            return Statement(text[start : min(end, start + LONGEST)], text, start, end, boxed=True)
    return Statement(text[start : start + LONGEST], text, start, len(text), complete=False, boxed=True)


def _to_line_end(text: str, start: int, strict: bool) -> Statement:
    end = text.find("\n", start)
    complete = end >= 0
    end = end if complete else len(text)
    line = text[start : min(end, start + LONGEST)].partition("</")[0]
    if not complete:
        stop = SENTENCE_END.search(line)
        complete = stop is not None and stop.end() < len(line.rstrip(" *_\"'”’)"))
    return Statement(line, text, start, start + len(line), complete, strict, last=not text[end:].strip())


def _denied(text: str, start: int, link: re.Match[str]) -> bool:
    """Whether an announcement does not state its answer: "is not", "if the answer is", "to answer", "Answer (B) is"."""
    if _NEGATED_LINK.match(text, link.end()) or _SUBQUESTION.search(link[0]):
        return True
    floor = max(0, start - LONGEST)
    sentence = text[max(text.rfind(". ", floor, start) + 1, text.rfind("\n", floor, start) + 1, floor) : start]
    words = sentence[-60:].lower().split()
    would = link["link"] is None or "would" in link["link"] or (len(words) > 1 and "then" in words[-3:])
    if would and _IF.search(sentence):
        return True
    if link["link"] is None and sentence.lstrip().startswith(("To ", "to ")):
        return True
    if link["link"] is None and (not words or words[-1].endswith(",") or words[-1] in ("and", "while", "but", "as")):
        return True
    if sentence.endswith(" that the ") and _OF_AN_OPTION.search(sentence):
        return True
    while words and words[-1] in _PRAISE:
        words.pop()
    if words and words[-1] in _OTHERS:
        return True
    while words and words[-1] in _DETERMINERS:
        words.pop()
    if words and words[-1] in _SUPPOSING:
        return True
    for word in words[:-4:-1]:
        if word[-1] in ".,;:!?)" or word in _TURNING:
            return False
        if (word in _DENYING and not (word == "doubt" and "no" in words)) or word.endswith(("n't", "n’t")):
            return True
    return False
