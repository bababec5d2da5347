"""Choice: which choice a text states, by letter, by text or by rejecting the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verifiers.choice import Choice

A, U, T = Outcome.AMBIGUOUS, Outcome.UNPARSEABLE, Outcome.TRUNCATED
CHOICES = ("sweet", "salty", "dry", "a sandy desert")


def judge(
    text: str, finish: str = "stop", choices: tuple[str, ...] = CHOICES, elimination: bool = True
) -> str | Outcome:
    """The letter that was read, or the outcome where none was. The gold letter is B."""
    verifier = Choice(elimination=elimination)
    found = verifier(Problem("p", "?", "B", choices), Trace("t", "p", "teacher", 0, text, FinishReason(finish)))
    assert found.reason
    if found.answer is None:
        return found.outcome
    assert found.outcome is (Outcome.CORRECT if found.answer == "B" else Outcome.WRONG)
    return found.answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # letters in all their clothes
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("The answer is: B) salty", "B"),
        ("The answer is **B**.", "B"),
        ("**Answer: (B)**", "B"),
        ("Answer:\n\nB", "B"),
        ("The answer is option B.", "B"),
        ("The correct option is (B) salty.", "B"),
        ("The best choice is B, because seals live there.", "B"),
        ("The answer is (b).", "B"),
        ("The answer is b.", "B"),
        (r"\boxed{B}", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        ("#### B", "B"),
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B. salty", "B"),
        ("B) salty\n\nSeals live in the sea.", "B"),
        ("Seals live in the sea.\n\n(B) salty", "B"),
        ("The answer is B because seals need it.", "B"),
        ("Therefore, option (B) is the correct answer. It is late.", "B"),
        ("(B) is the most likely answer. (A) is used for tea.", "B"),
        ("Option B, salty, is the best choice here.", "B"),
        ("This makes (B) the correct answer.", "B"),
        ("Seals live at sea, so I choose option (B).", "B"),
        ("The answer is (C).", "C"),
        # the last stated one counts
        ("The answer is (A). Wait, no. The answer is (B).", "B"),
        ("At first the answer is (B). But then the answer is (C).", "C"),
        ("(A) is correct. Actually, (B) is correct.", "B"),
        ("The answer is (B). Option (A) is incorrect because it is sweet.", "B"),
        ("The answer is (B).\n\nQuestion: Where do cats live?\nAnswer: (A)", "B"),
        # rejected options
        ("not (A); (B) fits", "B"),
        ("The answer is not (A). The answer is (B).", "B"),
        ("(A) is wrong, so the answer is (B).", "B"),
        ("Option (A) is incorrect. Option (C) is unrelated. Option (D) does not hold water.", "B"),
        ("Options (A), (C), and (D) are all incorrect.", "B"),
        ("Options (A) and (C) are incorrect.", U),
        ("(A) sweet is wrong; (C) dry is wrong; (D) a sandy desert is wrong.", "B"),
        ("A) sweet is wrong.", U),
        ("The answer would be (B) if it were wet.", A),
        ("B is the correct answer.", "B"),
        ("It must be (B).", "B"),
        ("Option B", "B"),
        ("B, because seals live at sea.", "B"),
        ("The answer is not (B).", U),
        ("Option (B) is incorrect.", U),
        ("Option (A) is correct to some extent, but not here. Options (C) and (D) are wrong.", U),
        ("A) is wrong. B) is right.", "B"),
        ("At first glance A seems right, but B is the correct choice.", "B"),
        ("I think it's A... actually, no, it's B.", "B"),
        ("The answer isn't A, it's B.", "B"),
        ("The answer is not (A) but (B).", "B"),
        ("Not A, not C, not D - so B.", "B"),
        # plain words of choosing
        ("I would choose B", "B"),
        ("I'd go with B.", "B"),
        ("It's B.", "B"),
        ("Hence, (B).", "B"),
        ("Therefore B.", "B"),
        ("So B is the answer.", "B"),
        ("B seems to be the best option.", "B"),
        ("Of the options given, B makes the most sense.", "B"),
        ("(b)", "B"),
        ("b", "B"),
        ("<answer>B</answer>", "B"),
        ("La respuesta correcta es B.", "B"),
        ("It's A nice day.", U),
        ("So I say that vitamin C is the best.", U),
        # the choice's text without its letter
        ("Seals live at sea. Therefore, the water would taste salty.", "B"),
        ("Therefore, the water is not salty.", U),
        ("Therefore, the water is salty or sweet.", U),
        ("Therefore, the sweet water turns salty.", U),
        ("The answer is salty.", "B"),
        ("The answer is salty, because seals live at sea.", "B"),
        ("The correct answer is the sandy desert.", "D"),
        ("The answer is **Salty**.", "B"),
        ("salty", "B"),
        ("Seals live at sea.\nSo, salty.", "B"),
        (r"\boxed{\text{salty}}", "B"),
        ("The sea is salty and a creature lives in it.", U),
        # an article is no letter
        ("The answer is A sandy desert.", "D"),
        ("A dog is an animal. I like it.", U),
        ("A seal has flippers.", U),
        ("I think it lives at sea.", U),
        # two at once, open, contradictory
        ("The answer is (A) or (B).", A),
        ("The answer is A or B.", A),
        ("(A) or (B)", U),
        ("The answer is (A) and (B).", A),
        ("The answer is both A and B.", A),
        ("The answer is (A)/(B).", A),
        ("The answer is either sweet or salty.", A),
        ("Option (A) is correct. Option (B) is also correct.", A),
        ("Options (A) and (B) are correct.", A),
        ("It depends.", A),
        ("The answer depends on the creature.", A),
        ("The answer cannot be determined.", A),
        ("The answer is none of the above.", A),
        ("The answer could be (B).", A),
        ("The answer is (A) salty.", A),
        ("The answer is A. Salty.", A),
        ("A) salty", A),
        ("The answer is (B). Dry places are for camels.", "B"),
        ("The answer is (B). Hold on, let me reconsider.", A),
        ("The answer is (B). But (C) is the correct answer.", A),
        # none
        ("The answer is (E).", U),
        ("The answer is F.", U),
        ("If the answer is (B), it would be wet.", U),
        ("Is the answer (B)?", U),
        ("", U),
    ],
)
def test_finished_text(text: str, expected: str | Outcome) -> None:
    assert judge(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is", T),
        ("The answer is (B", T),
        ("The answer is (A) or", T),
        ("The answer is (B)", T),  # may go on as "(B) or (C)"
        ("Option (A) is incorrect. Option (C) is unrelated. Option (D) does not", T),
        ("A creature", T),
        ("B", T),
        ("The answer is (B). Seals li", "B"),
        ("B) salty\n\nSeals li", "B"),
        (r"\boxed{B} sin", "B"),
        ("", T),
    ],
)
def test_cut_text(text: str, expected: str | Outcome) -> None:
    assert judge(text, "length") == expected


def test_elimination_can_be_switched_off() -> None:
    text = "Options (A), (C), and (D) are all incorrect."
    assert judge(text) == "B"
    assert judge(text, elimination=False) is U


def test_choices_with_equal_texts_do_not_contradict() -> None:
    assert judge("The answer is (B) wet.", choices=("wet", "wet")) == "B"
    assert judge("The answer is wet.", choices=("wet", "wet")) is U


@pytest.mark.parametrize("gold", ["", "E", "b", "AB", "salty", "1"])
def test_a_gold_answer_must_be_a_choices_letter(gold: str) -> None:
    with pytest.raises(ValueError, match="expected the letter of one of 4 choices"):
        Choice().check_gold(Problem("p", "?", gold, CHOICES))


def test_more_choices_than_letters_are_refused() -> None:
    many = tuple(f"thing {number}" for number in range(12))
    for gold in "AK":
        with pytest.raises(ValueError, match="expected at most 10 choices for the verifier choice, found 12"):
            Choice().check_gold(Problem("p", "?", gold, many))


def test_a_choice_within_another_or_of_digits_is_not_read_from_a_sentence() -> None:
    assert judge("Therefore, it was placed on dry ice.", choices=("ice", "dry ice")) is U
    assert judge("Therefore, 100 mg are given.", choices=("10", "100")) is U


def test_a_problem_without_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="choices"):
        Choice().check_gold(Problem("p", "?", "A"))


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    judge(text)
    judge(f"The answer is {text}", "length")


@given(st.sampled_from("ABCD"), st.sampled_from(["({})", "{}.", "**{}**", "option {}.", "\\boxed{{{}}}"]))
def test_every_letter_is_read_in_every_form(letter: str, form: str) -> None:
    assert judge(f"Seals live at sea. The answer is {form.format(letter)}") == letter
