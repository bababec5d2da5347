"""Scores that other models gave the traces of the pairs, read from score stages and laid beside the student's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from orpo_distill.errors import DataError
from orpo_distill.groups import Row
from orpo_distill.objectives import GivenScores, ScoredGroups
from orpo_distill.records import Score, read_jsonl

Source = Literal["reference", "teacher"]
Given = Mapping[Source, Mapping[str, Score]]
"""Whose scores they are -> trace id -> score."""

SOURCES: Mapping[str, Source] = {"reference_scores": "reference", "teacher_scores": "teacher"}
"""What objectives require -> whose scores that are."""

SCORES = "scores.jsonl"


def read_given(requires: frozenset[str], inputs: Mapping[str, Path], rows: Sequence[Row]) -> Given:
    """The scores that an objective requires, for every trace of the rows.

    They stand in the folders inputs["reference-scores"] and inputs["teacher-scores"]. Raises DataError if one is
    missing.
    """
    wanted = {
        trace for row in rows for trace in (row.pair.chosen_id, *([row.pair.rejected_id] if row.rejected else ()))
    }
    given: dict[Source, dict[str, Score]] = {}
    for name, source in SOURCES.items():
        if name not in requires:
            continue
        path = inputs[f"{source}-scores"] / SCORES
        given[source] = {score.trace_id: score for score in read_jsonl(path, Score) if score.trace_id in wanted}
        if missing := sorted(wanted - given[source].keys()):
            raise DataError(
                f"{path}: expected a score of every trace that the pairs use, found none of {len(missing)}, such as "
                f"{missing[0]!r}; run the score stage again"
            )
    return given


def nothing_known(requires: frozenset[str], rows: Sequence[Row]) -> Given:
    """Scores of zero for every trace of the rows, of the sources that an objective requires: for measuring time."""
    ids = {trace for row in rows for trace in (row.pair.chosen_id, row.pair.rejected_id)}
    return {
        source: {one: Score(one, "", 0.0, 1, 0.5) for one in ids}
        for name, source in SOURCES.items()
        if name in requires
    }


def with_given(batch: ScoredGroups, rows: Sequence[Row], given: Given) -> ScoredGroups:
    """The scored batch of these rows with what other models gave its traces."""
    found = {source: _laid_out(batch, rows, scores) for source, scores in given.items()}
    return replace(batch, reference=found.get("reference"), teacher=found.get("teacher"))


def _laid_out(batch: ScoredGroups, rows: Sequence[Row], scores: Mapping[str, Score]) -> GivenScores:
    import torch

    def told(one: str) -> tuple[float, float]:
        entropy = scores[one].entropy
        return scores[one].logp_sum, math.nan if entropy is None else entropy

    values = torch.zeros(2, len(batch.logp_sum), device=batch.logp_sum.device)
    sides = [(batch.chosen, [row.pair.chosen_id for row in rows])]
    if len(batch.rejected):
        sides.append((batch.rejected, [row.pair.rejected_id for row in rows]))
    for index, ids in sides:
        values[:, index] = torch.tensor([told(one) for one in ids], device=values.device).T
    return GivenScores(values[0], values[1])
