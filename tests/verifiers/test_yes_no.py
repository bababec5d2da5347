"""YesNo: a yes or no that answers the question, not one that stands in a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verifiers.yes_no import YesNo

A, U, T = Outcome.AMBIGUOUS, Outcome.UNPARSEABLE, Outcome.TRUNCATED


def judge(text: str, finish: str = "stop", choices: tuple[str, ...] = ()) -> str | Outcome:
    """The answer that was read, or the outcome where none was."""
    found = YesNo()(Problem("p", "?", "yes", choices), Trace("t", "p", "teacher", 0, text, FinishReason(finish)))
    assert found.reason
    if found.answer is None:
        return found.outcome
    assert found.outcome is (Outcome.CORRECT if found.answer == "yes" else Outcome.WRONG)
    return found.answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is yes.", "yes"),
        ("The answer is no.", "no"),
        ("So the answer is no. Yes, that surprised me too.", "no"),
        ("Therefore, the answer is (B) no, a camel could not.", "no"),
        ("Therefore, the answer is (A) yes.", "yes"),
        ('the answer to the given question is "no". However, both are low.', "no"),
        ("Answer: Yes", "yes"),
        ("**Answer:** No", "no"),
        ("#### no", "no"),
        (r"\boxed{\text{No}}", "no"),
        (r"\boxed{yes}", "yes"),
        ("The answer is true.", "yes"),
        ("The answer is False.", "no"),
        ("Thus, the answer would be NO.", "no"),
        ("The correct answer is option (B), no.", "no"),
        ("The answer is (B).", "no"),
        ("The answer is B.", "no"),
        ("The answer is A) yes", "yes"),
        ("The answer is most likely no.", "no"),
        ("The answer is a clear and straightforward no.", "no"),
        ("The answer is a hypothetical one and cannot be determined.", A),
        ("We can confidently answer the question as (B) no.", "no"),
        ("making the answer (A) yes", "yes"),
        ("Option (B) is the correct answer.", "no"),
        ('The answer is likely to be "yes" here.', "yes"),
        ("No, because camels are tall.", "no"),
        ("Yes. Camels are small.", "yes"),
        ("yes", "yes"),
        ("**No**", "no"),
        ("Camels are taller than dog houses.\n\nSo, no.", "no"),
        ("Camels are taller than dog houses. Therefore, no, it could not.", "no"),
        ("Camels are tall.\n\nNo, a camel could not fit.", "no"),
        ("Yes, one might think so.\n\nThe answer is no.", "no"),
        ("If it were small, then the answer would be yes. But it is not. The answer is no.", "no"),
        ("The answer is (B) no. However, if the question were about dogs, the answer would be (A) yes.", "no"),
        ("The answer is no. I am not sure that yes would be wrong.", "no"),
        ("The answer is no.\n\nQ: Is water wet?\nA: The answer is yes.", "no"),
        ('So the answer to "Could a camel fit?" is no.', "no"),
        ("There is no doubt that the answer is yes.", "yes"),
        ("The answer is not yes, it's no.", "no"),
        ("So, the answer is not (A) yes, but rather (B) no.", "no"),
        ("If it were small I would say yes, but it is tall, so no.", "no"),
        ("I would say yes.", "yes"),
        ("Camels are tall.\n\n**Conclusion:** No", "no"),
        ("Yes/No: No", "no"),
        ("Based on its height, no.", "no"),
        ("Q: Could a camel fit?\nA: No.", "no"),
        ("<answer>no</answer>", "no"),
        ("No<|im_end|>", "no"),
        ("Yes. Wait, camels are tall. No, it could not.", "no"),
        ('The answer is no. "The answer is yes" is a common fallacy.', "no"),
        # a yes or no that only stands in a sentence
        ("There is no evidence of it.", U),
        ("He said yes to the offer and moved.", U),
        ("No one has ever seen it.", U),
        ("Yes men are common in no place.", U),
        ("The answer is no longer known to us.", U),
        ("The answer is that there is no way to tell.", U),
        ("It is unlikely that a camel would fit.", U),
        ("Is the answer yes? That is hard.", U),
        ("We need to decide between yes and no.", U),
        ("To answer yes we would need proof.", U),
        ("The answer is not yes.", U),
        ("", U),
        ('"The answer is no" is a common absolute fallacy in logic.', U),
        ('To finish the answer with a "yes," I would need to know more.', U),
        ("The answer is A specify, but no recommendation.", U),
        # both, or open
        ("The answer is yes, no.", A),
        ("No, it could not. Yes, it could.", A),
        ("The answer is yes or no.", A),
        ("The answer is yes and no.", A),
        ("The answer is (A) yes or (B) no, depending on the milk.", A),
        ("The answer could be yes.", A),
        ("It depends.", A),
        ("The answer depends on the camel.", A),
        ("The answer is uncertain.", A),
        ("The answer is (A) no.", A),
        ("The answer is yes. Wait, that is wrong.", A),
        ("The answer is no, but option (A) is the correct answer.", A),
        ('The answer would be option (A) "yes," which is incorrect.', A),
    ],
)
def test_finished_text(text: str, expected: str | Outcome) -> None:
    assert judge(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is", T),
        ("The answer is no", T),  # may go on as "no longer"
        ("Camels are tall. So, no", T),
        ("Camels are tall, and there is no", T),
        ("No", T),
        ("The answer is no. A camel", "no"),
        ("No, because camels are tal", "no"),
        ("", T),
    ],
)
def test_cut_text(text: str, expected: str | Outcome) -> None:
    assert judge(text, "length") == expected


def test_the_problems_choices_say_what_a_letter_means() -> None:
    assert judge("The answer is (A).", choices=("no", "yes")) == "no"
    assert judge("The answer is (A).", choices=("Yes", "No")) == "yes"
    assert judge("The answer is (B) no.", choices=("no", "yes")) is A


@pytest.mark.parametrize(("gold", "text"), [("True", "yes"), ("NO", "no"), ("false", "no")])
def test_gold_answers_in_other_words(gold: str, text: str) -> None:
    problem = Problem("p", "?", gold)
    YesNo().check_gold(problem)
    assert YesNo()(problem, Trace("t", "p", "teacher", 0, f"The answer is {text}.")).outcome is Outcome.CORRECT


def test_a_gold_answer_must_be_yes_or_no() -> None:
    with pytest.raises(ValueError, match="expected yes or no"):
        YesNo().check_gold(Problem("p", "?", "maybe"))


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    judge(text)
    judge(f"The answer is {text}", "length")
