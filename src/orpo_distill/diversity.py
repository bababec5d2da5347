"""Diversity: drop texts that say nearly the same as one that is already kept.

ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3) between two texts of m and n
words whose longest common subsequence has L words: P = L / m, R = L / n, F1 = 2 P R / (P + R) = 2 L / (m + n).
Words are lower-cased runs of letters, digits and underscores. A text without spaces (Chinese, Thai) is one long word,
so there only exact repetitions are found.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

DUPLICATE = "duplicate"
TOO_SIMILAR = "too_similar"

_WORD = re.compile(r"\w+")


def mean_rouge_l(texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 over all pairs of two texts or more. Raises ValueError for fewer.

    Of one pair it lies between 0 (no word in common, or no words) and 1 (the same words in the same order).
    """
    if len(texts) < 2:
        raise ValueError(f"expected two texts or more, found {len(texts)}")
    pairs = [
        2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else 0.0
        for a, b in itertools.combinations(_encode(texts), 2)
    ]
    return sum(pairs) / len(pairs)


def words(text: str) -> list[str]:
    """The text's words, as ROUGE-L counts them."""
    return _WORD.findall(text.lower())


def diverse(texts: Sequence[str], threshold: float) -> list[str]:
    """For each text "" if it is kept, else why not: `duplicate` of an earlier text, or `too_similar` to a kept one.

    Greedy in the order given: a text is dropped if its ROUGE-L F1 with a kept one is above `threshold`.
    """
    seen: set[str] = set()
    kept: list[str] = []
    reasons = []
    for text, words in zip(texts, _encode(texts), strict=True):
        if text in seen:
            reasons.append(DUPLICATE)
        elif any(_above(words, other, threshold) for other in kept):
            reasons.append(TOO_SIMILAR)
        else:
            kept.append(words)
            reasons.append("")
        seen.add(text)
    return reasons


def _encode(texts: Sequence[str]) -> list[str]:
    """Each text as a string with one character a word: the form that the C library compares fastest."""
    codes: defaultdict[str, str] = defaultdict(lambda: chr(len(codes)))
    return ["".join(map(codes.__getitem__, words(text))) for text in texts]


def _above(a: str, b: str, threshold: float) -> bool:
    total = len(a) + len(b)
    least = int(threshold * total / 2)  # a common subsequence shorter than this cannot be above: the search may stop
    return total > 0 and 2 * LCSseq.similarity(a, b, score_cutoff=least) / total > threshold
