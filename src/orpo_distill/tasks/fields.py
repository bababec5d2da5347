"""From a row to a problem, whatever its fields are called.

One mapping serves every data set: `question` may be `problem`, choices may be a list, {letter: text}, a list of {label,
text} or {text: [...], label: [...]}, and the gold answer a letter, a label, a text, an index or a worked solution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from string import ascii_uppercase
from typing import Any

from orpo_distill.records import Problem
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.exact import Exact
from orpo_distill.verifiers.math import Math
from orpo_distill.verifiers.number import Number
from orpo_distill.verifiers.yes_no import YesNo

# The first that is there (not null, not blank) counts.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "qid", "question_id", "uid"),
    "question": ("question", "problem", "question_stem", "query", "prompt", "input"),
    "choices": ("choices", "options"),
    "answer": ("answer_idx", "answerKey", "answer", "final_answer", "gold", "label", "target", "solution"),
}

_AMOUNT = re.compile(r"([-+]?)\s*\$?\s*([-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?|[-+]?\.\d+)\.?")


def to_problem(fields: Mapping[str, Any], verifier: Verifier) -> Problem:
    """The problem that a row holds; its id is empty where the row has none.

    The gold answer gets the form that `verifier` reads: the letter of a choice's position, a plain number, yes or no,
    or the text as it stands; it is empty, and may be missing, where `verifier` is for open-ended tasks. Raises
    ValueError for a missing question or answer, and for one that fits no choice.
    """
    if isinstance(nested := fields.get("question"), Mapping):  # {"stem": ..., "choices": [...]}: AI2's release files
        fields = {**fields, **nested, "question": nested.get("stem")}
    identity, choices = _first(fields, "id"), _first(fields, "choices")
    question, answer = _first(fields, "question"), "" if verifier.open_ended else _first(fields, "answer")
    for name, value in (("question", question), ("gold answer", answer)):
        if value is None:
            known = ", ".join(ALIASES[name.split()[-1]])
            raise ValueError(f"expected a {name} (in one of {known}), found the fields {', '.join(fields) or 'none'}")
    if not isinstance(question, str):
        raise ValueError(f"expected a question in words, found {question!r}")
    labels, texts = _choices(choices)
    return Problem(
        id="" if identity is None else str(identity).strip(),
        question=question.strip(),
        answer="" if verifier.open_ended else _gold(answer, labels, texts, verifier),
        choices=texts,
    )


def _first(fields: Mapping[str, Any], name: str) -> Any:
    """The first alias of a field that holds something, or None."""
    for alias in ALIASES[name]:
        value = fields.get(alias)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return value
    return None


def _choices(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and texts of the choices, in order."""
    if value is None:
        return (), ()
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):  # {"text": [...], "label": [...]}
        pairs = list(zip_longest(value.get("label") or _letters(value["text"]), value["text"]))
    elif isinstance(value, Mapping):  # {"A": ..., "B": ...}; a data set with four or five pads with null
        pairs = sorted((label, text) for label, text in value.items() if text is not None)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, Mapping) for item in value):  # [{"text": ..., "label": ...}, ...]
            pairs = [(item.get("label"), item.get("text")) for item in value]
        else:
            pairs = list(zip_longest(_letters(value), value))
    else:
        raise ValueError(f"expected choices as a list of texts, found {value!r}")
    if not pairs:
        return (), ()
    labels, texts = (
        tuple("" if part is None else str(part).strip() for part in side) for side in zip(*pairs, strict=True)
    )
    if not (2 <= len(texts) <= len(ascii_uppercase) and all(texts) and all(labels) and len(set(labels)) == len(labels)):
        raise ValueError(f"expected 2 to 26 choices with a text and a label each, found {value!r}")
    return tuple(label.upper() for label in labels), texts


def _letters(items: Sequence[Any]) -> str:
    return ascii_uppercase[: len(items)]


def _gold(answer: Any, labels: Sequence[str], texts: Sequence[str], verifier: Verifier) -> str:
    """The gold answer in the form that `verifier` reads; what it cannot read is left for it to refuse."""
    if isinstance(verifier, YesNo):
        truth = str(answer).strip().lower()
        return {"true": "yes", "false": "no"}.get(truth, truth)
    if isinstance(verifier, Number | Math):
        return _amount(_final(_plain(answer)))
    if texts and not isinstance(verifier, Exact):
        return ascii_uppercase[_position(answer, labels, texts)]
    return _plain(answer)


def _position(answer: Any, labels: Sequence[str], texts: Sequence[str]) -> int:
    """The position of the right choice, from its label, its text, or (a JSON integer) its index from 0."""
    text = str(answer).strip()
    by_label = [labels.index(label)] if (label := text.strip("().: ").upper()) in labels else []
    by_text = [position for position, choice in enumerate(texts) if choice == text]
    by_index = [answer] if type(answer) is int and not by_label and 0 <= answer < len(texts) else []
    found = sorted(set(by_label or by_text + by_index))
    if len(found) != 1:
        problem = "several choices it may stand for" if found else "none that it stands for"
        raise ValueError(
            f"expected an answer among the choices ({', '.join(labels)}, or the text of one), found {answer!r} and "
            f"{problem}"
        )
    return found[0]


def _plain(answer: Any) -> str:
    """A gold answer as text: 18.0 is 18, True is yes."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).strip()


def _final(text: str) -> str:
    r"""What a worked solution ends in: the text after GSM8K's `####`, or in the last `\boxed{}`; else the text."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()
    return text


def _amount(text: str) -> str:
    """A number without dollar sign, thousands commas and full stop; any other text as it is."""
    if not (match := _AMOUNT.fullmatch(text)):
        return text
    return (match[1] + match[2]).replace(",", "").removeprefix("+")
