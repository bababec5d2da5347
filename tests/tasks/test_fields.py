"""One mapping reads every data set's rows. Hub rows below have the hub's fields with shortened texts."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_distill.records import Problem
from orpo_distill.tasks.fields import to_problem
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.choice import Choice
from orpo_distill.verifiers.exact import Exact
from orpo_distill.verifiers.math import Math
from orpo_distill.verifiers.number import Number
from orpo_distill.verifiers.yes_no import YesNo

HUB_ROWS: dict[str, tuple[dict[str, Any], Verifier, Problem]] = {
    "gsm8k": (
        {"question": "How much profit?", "answer": "He sold 2 at $<<540*2=1080>>540.\n#### 1,080"},
        Number(),
        Problem("", "How much profit?", "1080"),
    ),
    "arc": (
        {
            "id": "Mercury_1",
            "question": "Which skin?",
            "choices": {"text": ["dry palms", "wet palms", "oil"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        Choice(),
        Problem("Mercury_1", "Which skin?", "B", ("dry palms", "wet palms", "oil")),
    ),
    "arc_with_numbers": (
        {
            "id": "NYSEDREGENTS_1",
            "question": "Which?",
            "choices": {"text": ["7", "8", "3", "1"], "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
        Choice(),
        Problem("NYSEDREGENTS_1", "Which?", "C", ("7", "8", "3", "1")),
    ),
    "arc_release_file": (
        {
            "id": "M1",
            "question": {"stem": "Which?", "choices": [{"text": "oak", "label": "A"}, {"text": "fig", "label": "B"}]},
            "answerKey": "A",
        },
        Choice(),
        Problem("M1", "Which?", "A", ("oak", "fig")),
    ),
    "openbookqa": (
        {
            "id": "7-980",
            "question_stem": "The sun is responsible for",
            "choices": {"text": ["puppies", "flowers", "age", "plants"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
        Choice(),
        Problem("7-980", "The sun is responsible for", "D", ("puppies", "flowers", "age", "plants")),
    ),
    "strategyqa": (
        {
            "qid": "4b82",
            "term": "Mixed martial arts",
            "question": "Is it original?",
            "answer": False,
            "facts": "It is not.",
        },
        YesNo(),
        Problem("4b82", "Is it original?", "no"),
    ),
    "medqa": (
        {
            "question": "Which drug?",
            "answer": "Nitrofurantoin",
            "options": {"A": "Ampicillin", "B": "Ceftriaxone", "C": "Doxycycline", "D": "Nitrofurantoin", "E": None},
            "meta_info": "step2&3",
            "answer_idx": "D",
            "metamap_phrases": ["drug"],
        },
        Choice(),
        Problem("", "Which drug?", "D", ("Ampicillin", "Ceftriaxone", "Doxycycline", "Nitrofurantoin")),
    ),
    "math": (
        {"problem": "What is a half?", "level": "Level 1", "solution": r"So it is $\boxed{\frac{1}{2}}$."},
        Math(),
        Problem("", "What is a half?", r"\frac{1}{2}"),
    ),
    "canonical": (
        {"id": "a", "question": " Is it? ", "choices": None, "answer": "yes", "rationale": None, "source": "s"},
        YesNo(),
        Problem("a", "Is it?", "yes"),
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_as_data_sets_have_them(name: str) -> None:
    fields, verifier, expected = HUB_ROWS[name]
    assert to_problem(fields, verifier) == expected


@pytest.mark.parametrize(
    ("answer", "verifier", "gold"),
    [
        (18, Number(), "18"),
        (18.0, Number(), "18"),
        (0, Number(), "0"),
        ("$1,234.50", Number(), "1234.50"),
        ("-$5", Number(), "-5"),
        (" 7. ", Number(), "7"),
        ("1,2", Number(), "1,2"),
        (True, YesNo(), "yes"),
        ("False", YesNo(), "no"),
        ("No", YesNo(), "no"),
        (" Paris ", Exact(), "Paris"),
    ],
)
def test_gold_answers_get_the_form_the_verifier_reads(answer: object, verifier: Verifier, gold: str) -> None:
    """Only well-formed thousands lose their comma: "1,2" may be a decimal comma, and stays for the verifier."""
    assert to_problem({"question": "q", "answer": answer}, verifier).answer == gold


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), ("(b)", "B"), ("C.", "C"), ("plum", "B"), (0, "A"), (2, "C")]
)
def test_a_choice_is_named_by_letter_text_or_index(answer: object, letter: str) -> None:
    problem = to_problem({"question": "q", "options": ["oak", "plum", "rose"], "answer": answer}, Choice())
    assert problem.answer == letter


@pytest.mark.parametrize("answer", ["D", "elm", 3, -1, True, "1"])
def test_an_answer_outside_the_choices_is_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="expected an answer among the choices"):
        to_problem({"question": "q", "options": ["oak", "plum", "rose"], "answer": answer}, Choice())


def test_an_answer_that_may_be_two_choices_is_refused() -> None:
    """The integer 1 is the index of "2" and the text of the first choice."""
    with pytest.raises(ValueError, match="several choices"):
        to_problem({"question": "q", "choices": [1, 2], "answer": 1}, Choice())


@pytest.mark.parametrize("none", [None, [], {}, {"text": [], "label": []}])
def test_no_choices_are_no_choices(none: object) -> None:
    assert to_problem({"question": "q", "choices": none, "answer": "1"}, Number()).choices == ()


def test_choices_stay_beside_a_gold_answer_of_another_kind() -> None:
    problem = to_problem({"question": "q", "options": ["17", "18"], "answer": "18"}, Number())
    assert (problem.answer, problem.choices) == ("18", ("17", "18"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "q", "answer": None}, "expected a gold answer"),
        ({"question": "q", "answer": "  "}, "expected a gold answer"),
        ({"answer": "1"}, "expected a question"),
        ({}, "found the fields none"),
        ({"question": ["q"], "answer": "1"}, "expected a question in words"),
        ({"question": "q", "choices": "oak, plum", "answer": "A"}, "expected choices as a list"),
        ({"question": "q", "choices": ["oak"], "answer": "A"}, "2 to 26 choices"),
        ({"question": "q", "choices": ["oak", " "], "answer": "A"}, "2 to 26 choices"),
        ({"question": "q", "choices": ["oak", None], "answer": "A"}, "2 to 26 choices"),
        ({"question": "q", "choices": list(range(27)), "answer": "A"}, "2 to 26 choices"),
        ({"question": "q", "choices": {"text": ["oak", "fig"], "label": ["A"]}, "answer": "A"}, "2 to 26 choices"),
        ({"question": "q", "choices": [{"text": "oak"}, {"text": "fig"}], "answer": "A"}, "2 to 26 choices"),
    ],
)
def test_rows_that_cannot_be_read_say_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_problem(fields, Choice())
