"""Spans that begin and end with tokens of two tokenizers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.alignment import align, shared_starts
from orpo_distill.errors import DataError
from orpo_distill.groups import encode_responses
from tests.checkpoints import EOS, tiny_tokenizer

STUDENT = (("Ġ", "a"), ("a", "b"), ("ab", "c"))
TEACHER = (("b", "c"), ("a", "b"), ("e", "f"))


@pytest.mark.parametrize(
    ("ends", "others", "expected"),
    [
        ([3], [1, 2, 3], ([0], [0])),
        ([1, 2, 3], [1, 2, 3], ([0, 1, 2], [0, 1, 2])),
        ([2, 3, 6], [1, 2, 6], ([0, 1], [0, 2])),
        ([1, 1, 2], [1, 2], ([0, 2], [0, 1])),  # two tokens of one character
        ([0, 2, 3], [2, 3], ([0, 2], [0, 1])),  # a token for the beginning of the text
    ],
)
def test_by_hand(ends: list[int], others: list[int], expected: tuple[list[int], list[int]]) -> None:
    assert shared_starts(ends, others) == expected


cuts = st.lists(st.integers(1, 20), unique=True).map(lambda places: [*sorted({*places} - {20}), 20])


@given(cuts, cuts)
def test_every_shared_boundary_and_no_other_begins_a_span(ends: list[int], others: list[int]) -> None:
    starts, read = shared_starts(ends, others)
    begins = [[0, *each] for each in (ends, others)]
    assert [begins[0][place] for place in starts] == [begins[1][place] for place in read]
    assert [begins[0][place] for place in starts] == sorted({0, *ends} & {0, *others} - {20})


def test_texts_in_two_tokenizers() -> None:
    student, teacher = tiny_tokenizer(merges=STUDENT), tiny_tokenizer(merges=TEACHER)
    texts = [("abcd abf", False), ("é a", True), (f"{EOS}d", False)]
    found = align(texts, student, teacher)
    own = encode_responses(texts, student)
    assert [student.convert_ids_to_tokens(own[texts[0]])] == [["abc", "d", "Ġa", "b", "f", EOS]]
    assert teacher.convert_ids_to_tokens(found[texts[0]].teacher) == ["a", "bc", "d", "Ġ", "ab", "f", EOS]
    assert found[texts[0]].starts == ([0, 1, 2, 4, 5], [0, 2, 3, 5, 6])  # abc | d | " ab" | f | end
    assert found[texts[1]].starts == ([0, 2], [0, 2])  # both bytes of é | " a", which is cut
    assert len(found[texts[2]].teacher) == len(EOS) + 2  # text that spells a special token is text
    for text, aligned in found.items():
        assert aligned.teacher == encode_responses([text], teacher)[text]


def test_no_end_of_sequence() -> None:
    without = tiny_tokenizer()
    without.eos_token = None
    with pytest.raises(DataError, match="expected a tokenizer with an end-of-sequence token"):
        align([("a", False)], tiny_tokenizer(), without)
    assert align([], without, without) == {}
