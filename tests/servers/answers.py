"""The texts of the faulty server: drawn from messages and a seed, right with a given probability, in varied words."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUM = re.compile(r"(-?\d+)\s*([+\-*x])\s*(-?\d+)")
TOKEN = re.compile(r"\s*\S+")
LARGEST_TEXT = 100_000  # tokens
NASTY = "\x1b[31m\x1b]0;title\x07 \x00\x08\x7f\r \u2028\u2029\x85 \ud800 \u202e [/red] | <b> "
OPENINGS: tuple[str, ...] = (
    "Let us see.",
    "First things first.",
    "Here is how I work it out.",
    "We go step by step.",
    "Easy enough.",
)
OPENINGS += ("I begin with what is asked.", "Let me think about the numbers.", "This one is about counting.", "Good.")
MIDDLES = ("So", "Therefore", "Hence", "That means", "It follows that", "In other words", "Put together,", "As we see,")
ASIDES: tuple[str, ...] = (
    "I counted twice.",
    "Nothing is left over.",
    "A quick check agrees.",
    "No further step is needed.",
    "",
)
ASIDES += ("The order does not matter here.", "Every number was used once.", "The units stay the same.")
THOUGHTS: tuple[str, ...] = (
    "the question names two numbers",
    "I should be careful",
    "another way gives the same",
    "that seems fine",
)
THOUGHTS += ("let me do it slowly", "this is simple arithmetic", "I need only one operation", "now I can answer")


@dataclass(frozen=True)
class Style:
    """How texts are made. `gold` holds answers by question, for questions that are no plain sums.

    `nasty` puts control characters and a lone surrogate before every text.
    """

    right: float = 0.7
    reasoning: str = "none"
    gold: Mapping[str, str] | None = None
    nasty: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One generated text, already cut. `tokens` counts the reasoning too."""

    content: str
    reasoning: str
    tokens: int
    reasoning_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a text."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


def messages_hash(messages: object) -> str:
    """16 hex digits that stand for the messages (or the prompt, a string) in the server's log."""
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokens_of(text: str) -> list[str]:
    """The text in tokens: a word each, with the space before it."""
    return TOKEN.findall(text)


def prompt_tokens(messages: Sequence[Mapping[str, Any]] | Sequence[int] | str) -> int:
    """The words of every message, and four for each message's frame; of a prompt in tokens, all of them."""
    if isinstance(messages, str):
        return len(messages.split())
    if in_tokens(messages):
        return len(messages)
    return sum(4 + len(str(message.get("content") or "").split()) for message in messages)


def in_tokens(prompt: object) -> bool:
    """Whether a prompt is a list of token ids."""
    return isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)


def answer(question: str, draw: random.Random, style: Style) -> str:
    """Varied words that end in "The answer is N.": N is right with probability `style.right` where it can be known."""
    gold = (style.gold or {}).get(question.strip())
    found = SUM.findall(question)
    if gold is None and found:
        left, sign, right = found[-1]
        one, two = int(left), int(right)
        gold = str(one + two if sign == "+" else one - two if sign == "-" else one * two)
    known = gold if gold is not None else str(int(messages_hash(question), 16) % 100)
    said = known if draw.random() < style.right else _wrong(known, draw)
    step = f"{' '.join(found[-1])} = {said}." if found else f"I find {said}."
    words = (draw.choice(OPENINGS), draw.choice(MIDDLES), step, draw.choice(ASIDES), draw.choice(ASIDES))
    return f"{' '.join(word for word in words if word)} The answer is {said}."


def _wrong(known: str, draw: random.Random) -> str:
    if re.fullmatch(r"-?\d+", known):
        return str(int(known) + draw.choice((-3, -2, -1, 1, 2, 3, 10)))
    return draw.choice([letter for letter in "ABCDE" if letter != known])


def generate(question: str, key: str, style: Style, limits: Limits) -> Text:
    """The text that belongs to `key`: the same key gives the same text."""
    draw = random.Random(key)
    content = (NASTY if style.nasty else "") + answer(question, draw, style)
    thought = ". ".join(draw.choices(THOUGHTS, k=draw.randint(3, 9))) + "." if style.reasoning != "none" else ""
    reasoning = thought if style.reasoning == "reasoning_content" else ""
    if style.reasoning == "think":
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    most = LARGEST_TEXT if limits.max_tokens is None else limits.max_tokens
    thinking = tokens_of(reasoning)
    reasoning = "".join(thinking[:most])
    content, finish = _cut(content, most - len(thinking), limits.stop)
    spoken = len(tokens_of(content))
    thought_tokens = min(len(thinking), most)
    return Text(content, reasoning, thought_tokens + spoken, thought_tokens, finish)


def _cut(content: str, most: int, stop: Sequence[str]) -> tuple[str, str]:
    if most <= 0:
        return "", "length"
    tokens = tokens_of(content)
    short = "".join(tokens[:most])
    ends = [at for at in (short.find(text) for text in stop) if at >= 0]
    if ends:
        return short[: min(ends)], "stop"
    return short, "length" if len(tokens) > most else "stop"
