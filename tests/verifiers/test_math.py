"""Math: math-verify on the stated expression. The cases run in one worker, as they do in a run."""

from __future__ import annotations

import pytest

from orpo_distill.records import FinishReason, Outcome, Problem, Trace
from orpo_distill.verification import verify_all
from orpo_distill.verifiers.math import Math

C, W, A, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.AMBIGUOUS, Outcome.UNPARSEABLE, Outcome.TRUNCATED
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

CASES = [
    (r"So \boxed{\frac{3}{4}}.", STOP, r"\frac{3}{4}", C),
    (r"So \boxed{\frac{3}{4}}.", STOP, "0.75", C),
    (r"So \boxed{\dfrac34}.", STOP, "3/4", C),
    (r"The answer is $\frac34$.", STOP, "0.75", C),
    (r"The answer is $0.75$.", STOP, r"\frac{3}{4}", C),
    (r"\boxed{x(x+1)}", STOP, "x^2+x", C),
    (r"\boxed{x^2 + x}", STOP, "x(x+1)", C),
    (r"\boxed{\sqrt{8}}", STOP, r"2\sqrt{2}", C),
    (r"\boxed{2\pi}", STOP, r"2\pi", C),
    (r"\boxed{\{2, 1\}}", STOP, r"\{1,2\}", C),
    (r"\boxed{(1, 2)}", STOP, "(1,2)", C),
    (r"\boxed{[1, 2)}", STOP, "[1,2)", C),
    (r"\boxed{x = 3}", STOP, "3", C),
    (r"\boxed{3}", STOP, "x = 3", C),
    (r"\boxed{1{,}200}", STOP, "1200", C),
    (r"\boxed{1,200}", STOP, "1200", C),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", STOP, r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", C),
    (r"\boxed{-\frac{1}{2}}", STOP, "-0.5", C),
    (r"\boxed{50\%}", STOP, r"50\%", C),
    (r"\boxed{10^{3}}", STOP, "1000", C),
    (r"\boxed{\frac{\sqrt{3}}{3}}", STOP, r"\frac{1}{\sqrt{3}}", C),
    (r"\boxed{18\text{ cm}}", STOP, "18", C),
    (r"\boxed{90^\circ}", STOP, "90", C),
    (r"First \boxed{5}, then \boxed{7}.", STOP, "7", C),
    ("The answer is 5 apples.", STOP, "5", C),
    ("#### 18", STOP, "18", C),
    ("Answer: 18", STOP, "18", C),
    ("Answer:\n\n$18$", STOP, "18", C),
    ("$$7$$", STOP, "7", C),
    ("We add.\n\\[7\\]", STOP, "7", C),
    ("18", STOP, "18", C),
    (r"The answer is $7$. We used \( 3 + 4 \).", STOP, "7", C),
    (r"<think>\boxed{3}</think>\boxed{4}", STOP, "4", C),
    (r"\boxed{4}" + "\n\nQuestion: and then?\n" + r"\boxed{5}", STOP, "4", C),
    (r"\boxed{3}", STOP, "2", W),
    (r"First \boxed{7}, then \boxed{5}.", STOP, "7", W),
    (r"\boxed{x^2 + 1}", STOP, "x^2+x", W),
    (r"\boxed{(2, 1)}", STOP, "(1,2)", W),
    (r"\boxed{\frac{3}{5}}", STOP, "0.75", W),
    ("The answer is $8$.", STOP, "7", W),
    ("The answer is 8.", STOP, "7", W),
    ("It depends.", STOP, "7", A),
    ("The answer is 7 or 8.", STOP, "7", A),
    ("<answer>$7$</answer>", STOP, "7", C),
    ("The answer depends on $x$.", STOP, "7", A),
    ("The answer could be $7$.", STOP, "7", A),
    (r"\boxed{7}. Wait, that is wrong.", STOP, "7", A),
    ("I do not know.", STOP, "7", U),
    ("We have 3 + 4 and then 7 of them.", STOP, "7", U),
    (r"The answer is not $7$.", STOP, "7", U),
    (r"\boxed{}", STOP, "7", U),
    ("", STOP, "7", U),
    (r"3 + 4 = 7", LENGTH, "7", T),
    (r"\boxed{7", LENGTH, "7", T),
    ("The answer is $7$", LENGTH, "7", T),
    ("$$7$$", LENGTH, "7", T),
    ("", LENGTH, "7", T),
    (r"\boxed{7} bec", LENGTH, "7", C),
    (r"The answer is $7$. We ad", LENGTH, "7", C),
]


def test_stated_expressions() -> None:
    items = [
        (Problem(f"p{index}", "?", gold), Trace(f"t{index}", f"p{index}", "teacher", 0, text, finish))
        for index, (text, finish, gold, _) in enumerate(CASES)
    ]
    found = list(verify_all(Math(), items, timeout=60))
    wrong = [
        f"{text!r}, gold {gold!r}: expected {outcome}, found {verdict.outcome} ({verdict.reason})"
        for (text, _, gold, outcome), verdict in zip(CASES, found, strict=True)
        if verdict.outcome is not outcome
    ]
    assert not wrong, "\n".join(wrong)


def test_a_gold_answer_must_be_an_expression() -> None:
    Math().check_gold(Problem("p", "?", r"\frac{3}{4}"))
    with pytest.raises(ValueError, match="expected an expression that math-verify reads"):
        Math().check_gold(Problem("p", "?", ""))
