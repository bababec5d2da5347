"""Exact: the stated text equals the gold one but for case, spaces, markup and punctuation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verifiers.exact import Exact

C, W, A, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.AMBIGUOUS, Outcome.UNPARSEABLE, Outcome.TRUNCATED


def judge(text: str, gold: str = "Paris", finish: str = "stop") -> Outcome:
    found = Exact()(Problem("p", "?", gold), Trace("t", "p", "teacher", 0, text, FinishReason(finish)))
    assert found.reason
    assert (found.answer is not None) == (found.outcome in (C, W))
    return found.outcome


@pytest.mark.parametrize(
    ("text", "gold", "outcome"),
    [
        ("The answer is Paris.", "Paris", C),
        ("The answer is Paris", "Paris", C),
        ("the answer is paris.", "Paris", C),
        ("The answer is PARIS!", "Paris", C),
        ("Answer: Paris", "Paris", C),
        ("Answer:\nParis", "Paris", C),
        ("**Answer:** Paris", "Paris", C),
        ("**Answer: Paris**", "Paris", C),
        ("### Answer\n\nParis", "Paris", C),
        ("#### Paris", "Paris", C),
        (r"\boxed{Paris}", "Paris", C),
        (r"\boxed{\text{Paris}}", "Paris", C),
        ("The answer is **Paris**.", "Paris", C),
        ("The answer is `Paris`.", "Paris", C),
        ('The answer is "Paris".', "Paris", C),
        ("The answer is “Paris”.", "Paris", C),
        ("The answer is Paris, because it is the capital.", "Paris", C),
        ("The answer is Paris (the capital).", "Paris", C),
        ("The answer is Paris; it is the capital.", "Paris", C),
        ("The answer is Paris - the capital.", "Paris", C),
        ("The answer is Paris. It lies on the Seine.", "Paris", C),
        ("The answer is Paris since it is big.", "Paris", C),
        ("The answer is New  York\tCity.", "New York City", C),
        ("The final answer is Dr. Smith.", "Dr. Smith", C),
        ("The answer is Dr. Smith. He is late.", "Dr. Smith", C),
        ("The answer is London. No, the answer is Paris.", "Paris", C),
        ("<think>The answer is London.</think>The answer is Paris.", "Paris", C),
        ("The answer is Paris.\n\nQuestion: And Italy?\nAnswer: Rome", "Paris", C),
        ("Paris", "Paris", C),
        ("  paris. ", "Paris", C),
        ("**Paris**", "Paris", C),
        ("The answer is H2O.", "H2O", C),
        ("The answer is C++.", "C++", C),
        ("The answer is Straße.", "STRASSE", C),
        ("The answer is London.", "Paris", W),
        ("The answer is Paris. The answer is London.", "Paris", W),
        ("London", "Paris", W),
        ("#### London", "Paris", W),
        (r"\boxed{London}", "Paris", W),
        (r"\boxed{\text{New York}}", "New York", C),
        ("<answer>Paris</answer>", "Paris", C),
        ("<answer>London</answer>", "Paris", W),
        ("The answer is Parisian.", "Paris", W),
        ("The answer is either Paris or London.", "Paris", A),
        ("The answer is London or Paris.", "Paris", A),
        ("The answer is the city of Paris.", "Paris", A),
        ("The answer could be Paris.", "Paris", A),
        ("It depends.", "Paris", A),
        ("The answer depends on whom you ask.", "Paris", A),
        ("The answer is unknown.", "Paris", A),
        ("The answer is Paris. Hold on, let me reconsider.", "Paris", A),
        ("It is a city in France, and Paris is nice there in spring.", "Paris", U),
        ("If the answer is Paris, we go by train and not by plane.", "Paris", U),
        ("The answer is not Paris but I do not know which it is.", "Paris", U),
        ("Is the answer Paris? I do not know that for sure.", "Paris", U),
        ("First line.\nParis", "Paris", U),
        ("", "Paris", U),
    ],
)
def test_finished_text(text: str, gold: str, outcome: Outcome) -> None:
    assert judge(text, gold) is outcome


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("The answer is Par", T),
        ("The answer is Paris", T),
        ("Paris", T),
        ("", T),
        ("The answer is Paris. It li", C),
        ("Answer: Paris\nIt li", C),
        (r"\boxed{Paris} li", C),
    ],
)
def test_cut_text(text: str, outcome: Outcome) -> None:
    assert judge(text, finish="length") is outcome


@pytest.mark.parametrize("gold", ["", " ", "...", "**"])
def test_a_gold_answer_must_say_something(gold: str) -> None:
    with pytest.raises(ValueError, match="expected a gold answer"):
        Exact().check_gold(Problem("p", "?", gold))


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    judge(text)
    judge(f"The answer is {text}", finish="length")


@given(st.from_regex(r"[a-zA-Z]{1,12}( [a-zA-Z]{1,12}){0,3}", fullmatch=True))
def test_a_short_line_that_is_the_gold_answer_is_right(gold: str) -> None:
    assert judge(gold.upper() + ".", gold) is C
