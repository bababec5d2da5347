"""Number: which number a text states, and whether it is the gold one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verifiers.number import Number

C, W, A, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.AMBIGUOUS, Outcome.UNPARSEABLE, Outcome.TRUNCATED


def judge(text: str, gold: str = "18", finish: str = "stop") -> tuple[Outcome, str | None]:
    found = Number()(Problem("p", "?", gold), Trace("t", "p", "teacher", 0, text, FinishReason(finish)))
    assert found.reason
    return found.outcome, found.answer


@pytest.mark.parametrize(
    ("text", "gold", "outcome", "answer"),
    [
        # plain statements, text after them, and which one is the last
        ("The answer is 18. She had 16 eggs.", "18", C, "18"),
        ("The answer is 18", "18", C, "18"),
        ("Answer: 18", "18", C, "18"),
        ("The answer is minus 18.", "-18", C, "-18"),
        ("The answer is negative 18.", "18", W, "-18"),
        ("The answer is less than 18.", "18", A, None),
        ("The answer is twice 18.", "18", A, None),
        ("The answer is 18 squared.", "18", U, None),
        ("So she makes 9 * 2 dollars.", "92", A, None),
        ("ANSWER: 18", "18", C, "18"),
        ("Answer: The answer is 18.", "18", C, "18"),
        ("**Answer:** $18", "18", C, "18"),
        ("### Answer\n\n18", "18", C, "18"),
        ("Answer:\n\n**18**\n", "18", C, "18"),
        ("#### 18", "18", C, "18"),
        ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "18", C, "18"),
        ("####18", "18", C, "18"),
        ("The answer is 17. No, let me redo that. The answer is 18.", "18", C, "18"),
        ("First I thought the answer is 18. The answer is 20.", "18", W, "20"),
        ("The answer is 20.", "18", W, "20"),
        ("The final answer is: 18 eggs, since 16 + 2 = 18.", "18", C, "18"),
        ("The answer to the question is 18.", "18", C, "18"),
        ("The answer, therefore, is 18.", "18", C, "18"),
        ("So the correct answer would be 18 dollars", "18", C, "18"),
        ("Final result: 18", "18", C, "18"),
        ("The answer is that she makes 18 dollars.", "18", C, "18"),
        ("The answer is 9 * 2 = 18 dollars.", "18", C, "18"),
        ("The answer is x = 18.", "18", C, "18"),
        ("The answer is approximately 18.", "18", C, "18"),
        ("I hope this answer helps! The answer is 18. I hope it is correct.", "18", C, "18"),
        ("<think>The answer is 20.</think>She earns 9 * 2.\nThe answer is 18.", "18", C, "18"),
        ("The answer is 18.\n\nQuestion: What is 2 + 3?\nAnswer: The answer is 5.", "18", C, "18"),
        # units, currency, thousands, markup
        ("The answer is $1,200.00.", "1200", C, "1200"),
        ("The answer is 1,200", "1,200", C, "1200"),
        ("The answer is 1200 eggs.", "1,200", C, "1200"),
        ("So in the end: **73**", "73", C, "73"),
        ("The answer is **73**.", "73", C, "73"),
        (r"Therefore \boxed{\frac{3}{4}}", "3/4", C, "0.75"),
        (r"$$\boxed{\dfrac34}$$", "0.75", C, "0.75"),
        (r"\boxed{18}", "18", C, "18"),
        (r"\boxed{18\text{ eggs}}", "18", C, "18"),
        (r"\boxed{\$18}", "18", C, "18"),
        (r"The answer is \(18\).", "18", C, "18"),
        (r"The answer is $\$1{,}200$.", "1200", C, "1200"),
        (r"The answer is 2\frac{1}{2} hours", "2.5", C, "2.5"),
        ("The answer is 2 1/2 hours.", "2.5", C, "2.5"),
        ("The answer is 1/3.", "1/3", C, "1/3"),
        ("The answer is 0.33.", "1/3", W, "0.33"),
        ("The answer is ½.", "0.5", C, "0.5"),
        ("The answer is 50%.", "50", C, "50%"),
        ("The answer is 50 percent.", "50", C, "50%"),
        ("The answer is 0.5.", "50%", C, "0.5"),
        ("The answer is 18.00", "18", C, "18"),
        ("The answer is −5 degrees.", "-5", C, "-5"),
        ("The answer is -$5.", "-5", C, "-5"),
        ("The answer is 5.", "-5", W, "5"),
        ("The answer is $1.5 million.", "1500000", C, "1500000"),
        ("The answer is 1.2e3.", "1200", C, "1200"),
        (r"The answer is 1.2 \times 10^3.", "1200", C, "1200"),
        ("The answer is 18kg.", "18", C, "18"),
        ("The answer is eighteen.", "18", C, "18"),
        ("The answer is twenty-one eggs.", "21", C, "21"),
        ("The answer is 1\u202f200", "1200", C, "1200"),
        ("The answer is 1 200", "1200", U, None),
        # weaker signs: a bare number, one in bold, a conclusion
        ("18", "18", C, "18"),
        ("$18.", "18", C, "18"),
        ("She sells 9 eggs for $2.\n\n18", "18", C, "18"),
        ("She sells 9 eggs at $2 each, so she makes **$18** every day.", "18", C, "18"),
        ("9 * 2 = 18.\nSo she makes 18 dollars.", "18", C, "18"),
        ("Therefore, she makes 9 * 2 = $18 at the market.", "18", C, "18"),
        ("9 * 2 = 18", "18", C, "18"),
        ("Add the rest to find the final amount: 27 eggs - 9 eggs = 18 eggs", "18", C, "18"),
        ("1. 16 - 7 = 9\n2. 9 x $2/egg = $18/day", "18", C, "18"),
        ("9 * 2 = $<<9*2=18>>18 a day.", "18", C, "18"),
        ("Eggs left: 16 - 7 = 9\nTotal: $1,200.00", "1200", C, "1200"),
        ("36 / 2 = 18.5, which rounds to 18.", "18", C, "18"),
        ("He needs 53 / 3 = 17.7 buses, so he hires 18.", "18", C, "18"),
        ("So 36/2 = x/2 or 18 = x.", "18", C, "18"),
        ("9 * 2 = 18. So she makes $18 by selling 9 eggs.", "18", C, "18"),
        ("So, she sold 18 clips in total: 8 in April and 10 in May.", "18", C, "18"),
        ("So she makes $18.\n\nLet's verify: 9 + 9 = 18 and 3 + 4 = 7.", "18", C, "18"),
        ("Thus, she makes $18. Note: this assumes that 3 eggs are eaten.", "18", C, "18"),
        ("18 eggs. Explanation: she had 20 and ate 2.", "18", C, "18"),
        ("So she has eighteen eggs left.", "18", C, "18"),
        ("She pays Rs. 450 in all.", "450", C, "450"),
        ("She pays 3 dollars and 50 cents.", "3.5", C, "3.5"),
        ("₹1,20,000", "120000", C, "120000"),
        ("A: 18", "18", C, "18"),
        ("So she makes $18. 🎉", "18", C, "18"),
        ("She earned $18 in all: 2 * 5 = 10 for eggs, plus 2 * 4 = 8 for milk.", "18", A, None),
        ("So she needs 2 dozen eggs.", "2", U, None),
        ("So, does she make $18?", "18", U, None),
        ("She would make 18 if she ate none.", "18", U, None),
        # tags, short forms, other languages, what stands behind the text
        ("<answer>18</answer>", "18", C, "18"),
        ("<think>It is 20.</think><answer>18</answer>", "18", C, "18"),
        ("Ans: 18", "18", C, "18"),
        ("答案是18。", "18", C, "18"),
        ("Die Antwort ist 18.", "18", C, "18"),
        ("La respuesta es 18.", "18", C, "18"),
        ("The answer is 18.</s>", "18", C, "18"),
        ("#### 18\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n#### 4", "18", C, "18"),
        ("The answer is not 20 but 18.", "18", C, "18"),
        ("The answer isn't 20. It's 18.", "18", C, "18"),
        ("The answer is 1/3 of 54, which is 18.", "18", C, "18"),
        # two answers, or none
        ("The answer is 18 or 20.", "18", A, None),
        ("The answer is either 18 or 20.", "18", A, None),
        ("The answer is 18-20.", "18", U, None),
        ("The answer is 18 to 20 eggs.", "18", A, None),
        ("The answer is 5 hours and 30 minutes.", "5.5", A, None),
        ("The answer is 0.5 or 1/2.", "0.5", C, "0.5"),
        ("It depends.", "18", A, None),
        ("The answer depends on the price of 3 eggs.", "18", A, None),
        ("The answer cannot be determined from the 18 eggs.", "18", A, None),
        ("The answer could be 18.", "18", A, None),
        ("The answer is 18. Wait, that's wrong.", "18", A, None),
        ("So she has 18 eggs left in 3 days.", "18", A, None),
        ("The answer is 9 * 2.", "18", U, None),
        ("The answer is not 18.", "18", U, None),
        ("If the answer is 18, she had 20 eggs.", "18", U, None),
        ("I don't think the answer is 18.", "18", U, None),
        ("The wrong answer is 18.", "18", U, None),
        ("She has 16 eggs and eats 3. She sells 18.", "18", U, None),
        ("#### Step 18: compute the rest", "18", U, None),
        ("The answer is 1,5.", "1.5", U, None),
        ("The answer is 18x.", "18", U, None),
        ("The answer is three quarters.", "3", U, None),
        ("The answer is one hundred.", "1", U, None),
        ("The answer is 2 dozen eggs.", "2", U, None),
        ("The answer is 18 and a half.", "18", U, None),
        ("It takes 11 years until it is old The answer is 18.", "18", C, "18"),
        ("The third answer was 18.", "18", U, None),
        ("The answer is 3:30.", "3", U, None),
        ("Answer: She sold 48/2 = 24 clips in May. She sold 72 clips altogether.", "72", U, None),
        ("", "18", U, None),
        ("I do not know.", "18", U, None),
    ],
)
def test_finished_text(text: str, gold: str, outcome: Outcome, answer: str | None) -> None:
    assert judge(text, gold) == (outcome, answer)


@pytest.mark.parametrize(
    ("text", "outcome", "answer"),
    [
        ("She sells 9 eggs for $2 each and makes $18 every day.", A, None),  # neither number is given
        ("She makes $18 by selling eggs for $2.", C, "18"),
        ("She eats 3 and bakes with 4.\nShe makes $18 a day.", C, "18"),
        ("She makes $20 a day. That is so because 16 eggs are laid and 3 are eaten.", U, None),
        ("She makes $18 a day.\n\nSolution:\n16 - 3 = 13\n13 - 4 = 9", A, None),  # the answer, then its reasons
        ("She makes $18 a day. She sells 9 eggs.", U, None),
        ("She sells them for $2.", U, None),
    ],
)
def test_the_question_tells_given_numbers_from_found_ones(text: str, outcome: Outcome, answer: str | None) -> None:
    question = "Ducks lay 16 eggs. Janet eats 3, bakes with 4 and sells the rest for $2 each. What does she make?"
    found = Number()(Problem("p", question, "18"), Trace("t", "p", "teacher", 0, text))
    assert (found.outcome, found.answer) == (outcome, answer)


def test_a_question_may_count_in_millions() -> None:
    problem = Problem("p", "How much is left, in millions of dollars?", "4")
    assert Number()(problem, Trace("t", "p", "teacher", 0, "The answer is $4 million.")).outcome is C
    assert Number()(problem, Trace("t", "p", "teacher", 0, "The answer is 4.")).outcome is C
    assert judge("The answer is $4 million.", "4")[0] is W


@pytest.mark.parametrize("start", ["", "She sells 9 eggs. "])
def test_a_text_that_repeats_its_question_is_read_on(start: str) -> None:
    problem = Problem("p", "What does she make?", "18")
    text = f"{start}Step by step:\n\nQuestion: What does she make?\n9 * 2 is easy. The answer is 18."
    assert Number()(problem, Trace("t", "p", "teacher", 0, text)).outcome is C
    text = "The answer is 18.\n\nQuestion: What does she make?\nThe answer is 20."
    assert Number()(problem, Trace("t", "p", "teacher", 0, text)).outcome is C


@pytest.mark.parametrize(
    ("text", "outcome", "answer"),
    [
        ("She has 16 - 3 - 4 = 9 eggs. 9 * 2 = 18", T, None),  # the gold number, in mid-calculation
        ("So she makes 18", T, None),
        ("18", T, None),
        ("The answer is 1", T, None),
        ("The answer is 18", T, None),
        ("The answer is 18.", T, None),  # may go on as 18.5
        ("The answer is", T, None),
        ("The answer is 18. So the final answer is", T, None),
        ("#### 1", T, None),
        (r"\boxed{1", T, None),
        ("<think>The answer is 18. Let me check", T, None),
        ("", T, None),
        ("The answer is 18. She had 16 egg", C, "18"),
        ("#### 18\n", C, "18"),
        (r"So \boxed{18}", C, "18"),
        ("The answer is 20. She had 16 egg", W, "20"),
        ("The answer is 18 or 20. She", A, None),
        ("The answer is 18.\n\nQuestion: Tom has", C, "18"),
    ],
)
def test_cut_text(text: str, outcome: Outcome, answer: str | None) -> None:
    assert judge(text, finish="length") == (outcome, answer)


def test_no_text_is_failed_with_the_samplers_reason() -> None:
    trace = Trace("t", "p", "teacher", 0, "", FinishReason.ERROR, error="HTTP 500")
    found = Number()(Problem("p", "?", "18"), trace)
    assert (found.outcome, found.answer, found.reason) == (Outcome.FAILED, None, "HTTP 500")


@pytest.mark.parametrize("gold", ["", "eggs", "3 or 4", "1,5", "1/0"])
def test_a_gold_answer_must_be_a_number(gold: str) -> None:
    problem = Problem("p", "?", gold)
    with pytest.raises(ValueError, match="expected a number as gold answer"):
        Number().check_gold(problem)


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=1000))
def test_a_stated_fraction_is_read_back(value: Fraction) -> None:
    assert judge(f"The answer is {value}.", str(value))[0] is C
    assert judge(f"The answer is {value + 1}. It is late.", str(value))[0] is W


@given(st.integers(-(10**15), 10**15))
def test_thousands_and_currency_do_not_matter(value: int) -> None:
    assert judge(f"So the answer is ${value:,}.00 in all.".replace("$-", "-$"), str(value)) == (C, str(value))


@given(st.text())
def test_any_text_gets_a_verdict(text: str) -> None:
    judge(text)
    judge(f"The answer is {text}", finish="length")


def test_the_reason_quotes_the_statement() -> None:
    found = Number()(Problem("p", "?", "18"), Trace("t", "p", "teacher", 0, "The answer is 20 eggs. Done."))
    assert found.reason == 'states "20 eggs", expected 18'
