"""What a judge is asked, and what its answers mean."""

import pytest
from pydantic import ValidationError

from orpo_distill.judging import Judge, Match, preference, requests_of
from orpo_distill.records import FinishReason, Preference, Problem, Trace

MATCH = Match(Problem("p", "Who are {first} and {second}?", ""), "I am {second}.", "I am B.", "t1", "s1")
JUDGE = Judge(model="m", rubric="Be strict.", prompt="{rubric} {question} | {first} | {second} | {odd}")


def answer(text: str, finish_reason: FinishReason = FinishReason.STOP) -> Trace:
    return Trace("j", "p", "judge", 0, text, finish_reason, prompt_id=f"id of {text}")


def test_both_orders_are_asked_and_braces_in_texts_mean_nothing() -> None:
    first, last = requests_of(JUDGE, MATCH, seed=0)
    assert (first.problem_id, first.sample_index, last.sample_index) == ("p", 0, 1)
    shown = ["Be strict. Who are {first} and {second}? | I am {second}. | I am B. | {odd}"]
    shown.append("Be strict. Who are {first} and {second}? | I am B. | I am {second}. | {odd}")
    assert [one.messages[0].content for one in (first, last)] == shown
    assert first.seed != last.seed


def test_what_is_asked_does_not_depend_on_other_comparisons() -> None:
    """So that the ledger, or an earlier round, answers for the same two texts, whatever their traces are called."""
    other = Match(MATCH.problem, MATCH.one, MATCH.other, "t9", "s9")
    assert requests_of(JUDGE, MATCH, 0) == requests_of(JUDGE, other, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Shorter and clearer. [[A]]", "won"),
        ("[[B]]\n", "lost"),
        ("Both are fine: [[C]]", "tie"),
        ("A", "won"),
        ("**B.**", "lost"),
        ("[[A]] at first, but no: [[B]]", "nonsense"),
        ("<think>[[B]]? No.</think>[[A]]", "won"),
        ("<think>[[B]], or rather", "nonsense"),
        ("Answer A is better.", "nonsense"),
        ("[[D]]", "nonsense"),
        ("", "nonsense"),
    ],
)
def test_a_mark_is_an_answer_and_everything_else_is_nonsense(text: str, said: str) -> None:
    found = preference(MATCH, [answer(text), answer("[[C]]")])
    assert found.shown_first == said


def test_shown_last_the_letters_stand_for_the_other_text() -> None:
    said = [preference(MATCH, [answer("[[C]]"), answer(f"[[{letter}]]")]).shown_last for letter in "ABC"]
    assert said == ["lost", "won", "tie"]


@pytest.mark.parametrize(
    ("first", "last", "result"),
    [
        ("won", "won", "won"),
        ("lost", "lost", "lost"),
        ("tie", "tie", "tie"),
        ("won", "lost", "orders_disagree"),
        ("won", "tie", "orders_disagree"),
        ("nonsense", "won", "nonsense"),
        ("nonsense", "no_answer", "no_answer"),
    ],
)
def test_only_what_both_orders_say_is_a_preference(first: str, last: str, result: str) -> None:
    assert Preference("p", "t", "s", first, last).result == result


def test_equal_texts_are_not_asked_about() -> None:
    match = Match(MATCH.problem, "Same.", "Same.", "t1", "s1")
    assert requests_of(JUDGE, match, 0) == []
    assert preference(match, []).result == "same"


def test_no_answer_and_the_prompts_of_both() -> None:
    found = preference(MATCH, [answer("", FinishReason.ERROR), answer("[[A]]")])
    assert (found.one_id, found.other_id, found.shown_first, found.shown_last) == ("t1", "s1", "no_answer", "lost")
    assert found.prompt_ids == ("id of ", "id of [[A]]")


def test_a_prompt_that_does_not_show_both_texts_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"expected a prompt with \{second\} in it"):
        Judge(model="m", prompt="{question} {first}")
    assert "[[A]]" in Judge(model="m").asks("Q", "x", "y")
