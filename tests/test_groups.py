from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.errors import DataError
from orpo_distill.groups import default_steps, most_tokens, schedule, token_counts, tokenize
from orpo_distill.records import Message, Pair
from tests.checkpoints import BOS, CHAT_TEMPLATE, tiny_tokenizer

QUESTION = (Message("user", "2+2?"),)


def pair(problem: str = "p", chosen: str = "four", rejected: str = "five", cut: bool = False) -> Pair:
    return Pair(problem, QUESTION, chosen, rejected, "c1", "r1", "teacher", "student-0", cut)


def test_prompt_is_what_the_student_is_asked_and_a_finished_response_ends_with_eos() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    rows = tokenize([pair(), pair(cut=True)], tokenizer, 64, with_rejected=True)
    assert tokenizer.decode(list(rows[0].prompt)) == f"{BOS}<turn>user: 2+2?\n<turn>assistant: "
    letters = tokenizer.encode("five", add_special_tokens=False)
    assert list(rows[0].rejected) == [*letters, tokenizer.eos_token_id]
    assert list(rows[1].rejected) == letters
    assert rows[1].chosen[-1] == tokenizer.eos_token_id
    assert [one.number for one in rows] == [1, 2]


def test_rows_without_rejected_side_for_objectives_that_do_not_use_it() -> None:
    assert tokenize([pair(rejected="")], tiny_tokenizer(), 64, with_rejected=False)[0].rejected == ()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pair(rejected=""), "expected a rejected text, found none"),
        (pair(chosen=""), "found an empty one"),
        (pair(chosen="x" * 99), r"expected at most train.max_length = 64 tokens, found 106"),
    ],
)
def test_a_bad_row_is_named(bad: Pair, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        tokenize([pair(), bad], tiny_tokenizer(), 64, with_rejected=True)
    assert "pairs.jsonl:2 (problem p, chosen c1" in str(caught.value)


def test_no_rows_and_no_eos_are_errors() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        tokenize([], tiny_tokenizer(), 64, with_rejected=True)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        tokenize([pair()], tokenizer, 64, with_rejected=True)


problem_ids = st.lists(st.integers(0, 9).map(str), min_size=1, max_size=60)


@given(problem_ids, st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3))
def test_schedule(ids: list[str], steps: int, per_step: int, seed: int, number: int) -> None:
    found = schedule(ids, steps, per_step, seed, number)
    assert found == schedule(ids, steps, per_step, seed, number)
    used = Counter(index for step in found.steps for index in step)
    assert len(found.steps) == steps
    assert found.left_out == len(ids) - len(used)
    assert found.repeated == used.total() - len(used)
    sizes = [len(step) for step in found.steps]
    if len(ids) > steps * per_step:
        assert found.repeated == 0 and sizes == [per_step] * steps
    elif default_steps(len(ids), per_step) == steps:
        assert found.repeated == found.left_out == 0 and max(sizes) - min(sizes) <= 1
    else:
        assert found.left_out == 0 and sizes == [per_step] * steps
        assert max(used.values()) - min(used.values()) <= 1


@given(problem_ids, st.integers(1, 9))
def test_rows_of_a_problem_stay_together(ids: list[str], per_step: int) -> None:
    found = schedule(ids, default_steps(len(ids), per_step), per_step, 0, 1)
    order = [ids[index] for step in found.steps for index in step]
    changes = sum(a != b for a, b in pairwise(order))
    assert changes == len(set(ids)) - 1


def test_rounds_and_seeds_differ() -> None:
    ids = [str(number) for number in range(40)]
    orders = [schedule(ids, 10, 4, seed, number).steps for seed in (0, 1) for number in (1, 2)]
    assert all(a != b for place, a in enumerate(orders) for b in orders[:place])


def test_text_that_spells_a_special_token_is_text() -> None:
    """Only the end that training itself appends is a control token."""
    tokenizer = tiny_tokenizer()
    pair = Pair("p", (Message("user", "a"),), f"b {tokenizer.eos_token} c", "d", "1", "2", "teacher", "student-0")
    (found,) = tokenize([pair], tokenizer, 200, True)
    assert found.chosen.count(tokenizer.eos_token_id) == 1
    assert found.chosen[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["", "a", "plain text, 12 + 3", "Tomás", "ﷺﷺ", "日本語 and 中文", "İIıi", "🙂 ok"])
def test_no_tokenizer_exceeds_the_bound(text: str) -> None:
    """The byte-level tokenizer of the tiny checkpoints, and one that normalises (NFKD, lower case) to bytes."""
    from tokenizers import Tokenizer, models, normalizers

    plain = tiny_tokenizer()
    normalising = Tokenizer(models.BPE(vocab={f"<0x{n:02X}>": n for n in range(256)}, merges=[], byte_fallback=True))
    normalising.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    assert token_counts(plain, [text])[text] <= most_tokens(text)
    assert len(normalising.encode(text, add_special_tokens=False).ids) <= most_tokens(text)
