from __future__ import annotations

import itertools
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.diversity import diverse, mean_rouge_l

words = st.lists(st.sampled_from(["so", "Two", "and", "three", "5", "ÄPFEL", "äpfel"]), max_size=12)
texts = words.map(lambda found: ", ".join(found))


def naive_lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence by the textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def f1(a: str, b: str) -> float:
    return mean_rouge_l([a, b])


def naive_f1(a: list[str], b: list[str]) -> float:
    """F1 from precision and recall, as Lin 2004 defines it."""
    if not a or not b or not (length := naive_lcs(a, b)):
        return 0.0
    precision, recall = length / len(a), length / len(b)
    return 2 * precision * recall / (precision + recall)


@given(words, words)
def test_f1_equals_the_definition(a: list[str], b: list[str]) -> None:
    expected = naive_f1([word.lower() for word in a], [word.lower() for word in b])
    found = f1(", ".join(a), " ".join(b))
    assert isclose(found, expected, abs_tol=1e-12)
    assert found == f1(" ".join(b), ", ".join(a))


def test_f1_of_the_papers_sentences() -> None:
    """Lin 2004, section 3.1: "police killed the gunman" has LCS 3 with S2 (police kill the gunman) and 2 with S3.

    Both have four words, so F1 = 2 * 3 / 8 and 2 * 2 / 8.
    """
    assert f1("police killed the gunman", "Police kill the gunman.") == 0.75
    assert f1("police killed the gunman", "the gunman kill police") == 0.5


def test_the_mean_over_all_pairs() -> None:
    """Lin's three sentences: 0.75 and 0.5 with the first; S2 and S3 share "the gunman", 2 * 2 / 8."""
    sentences = ["police killed the gunman", "Police kill the gunman.", "the gunman kill police"]
    assert mean_rouge_l(sentences) == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert mean_rouge_l(["...", "..."]) == 0.0
    with pytest.raises(ValueError, match="two texts or more, found 1"):
        mean_rouge_l(sentences[:1])


@given(st.lists(texts, min_size=2, max_size=6))
def test_the_mean_is_that_of_single_pairs(found: list[str]) -> None:
    pairs = [f1(a, b) for a, b in itertools.combinations(found, 2)]
    assert isclose(mean_rouge_l(found), sum(pairs) / len(pairs), abs_tol=1e-12)


def test_f1_without_words_is_zero() -> None:
    assert f1("", "") == 0.0
    assert f1("...", "...") == 0.0


@given(st.lists(texts, max_size=8), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
def test_greedy_in_the_order_given(found: list[str], threshold: float) -> None:
    """What the definition says, by the naive LCS: kept texts are far from each other, dropped ones near a kept one."""
    reasons = diverse(found, threshold)
    kept: list[str] = []
    for index, (text, reason) in enumerate(zip(found, reasons, strict=True)):
        tokens = text.lower().split(", ") if text else []
        near = any(naive_f1(tokens, other.lower().split(", ") if other else []) > threshold + 1e-12 for other in kept)
        expected = "duplicate" if text in found[:index] else "too_similar" if near else ""
        assert reason == expected
        if not reason:
            kept.append(text)


@given(st.lists(texts, max_size=8))
def test_threshold_one_drops_only_duplicates(found: list[str]) -> None:
    assert diverse(found, 1.0) == ["duplicate" if text in found[:i] else "" for i, text in enumerate(found)]


@pytest.mark.parametrize(("common", "reason"), [(8, ""), (9, "too_similar")])
def test_the_threshold_itself_is_kept(common: int, reason: str) -> None:
    """Two texts of 10 words with 8 in common have F1 = 16 / 20 = 0.8, which is not above 0.8; with 9 it is 0.9."""
    first = [f"w{i}" for i in range(10)]
    second = [*first[:common], *(f"v{i}" for i in range(10 - common))]
    assert diverse([" ".join(first), " ".join(second)], 0.8) == ["", reason]
