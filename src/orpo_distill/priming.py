"""Primed teachers: instructions that only the teacher reads, by name.

After Response Priming (arXiv 2412.17846), which puts one of three such instructions before the teacher's question; the
words are ours. The student is asked, and trained, without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Priming = Literal["none", "teach_student", "for_smaller_model", "check_yourself"]

PRIMINGS: Mapping[Priming, str] = {
    "none": "",
    "teach_student": (
        "You are teaching a student who meets this kind of question for the first time. Explain every step in simple "
        "words and say why it follows, so that the student could answer the next such question alone."
    ),
    "for_smaller_model": (
        "A smaller language model will be trained on your answer. Write what such a model can learn from: short, "
        "plain steps in order, each one written out, and nothing beside them."
    ),
    "check_yourself": (
        "Take your time. Check each step before you write the next one, and state the final answer only once you are "
        "sure that it is right."
    ),
}
"""What each name stands for; in the paper *teacher*, *ground truth* (no gold answer is given) and *confidence*."""
