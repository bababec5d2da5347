"""Phi: how much of the next round an adaptive phi gives to the latest student, from what its negatives were worth.

The stage of round r looks at the traces that student r-2 wrote for round r-1, beside the initial student's for the same
problems and sample indices. A round that sampled none of the latest student says nothing, and phi stays what it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo_distill.component import Options
from orpo_distill.diversity import mean_rouge_l
from orpo_distill.judged import Judged, JudgedTraces
from orpo_distill.mixing import PHI_FILE, Phi, Worth, adapted_phi, phi_in_force
from orpo_distill.progress import say
from orpo_distill.records import Outcome, Problem, read_jsonl, write_text


class PhiOptions(Options):
    """What phi follows, and its value in round 2."""

    adaptive: Worth
    start: Phi


@dataclass(frozen=True, slots=True)
class Measured:
    """What the negatives of the latest and the initial student were worth on the same problems."""

    latest: float | None  # None: nothing could be measured
    initial: float | None
    problems: int
    traces: int  # of each of the two
    reason: str = ""  # why nothing could be measured


def phi(options: PhiOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `phi.json`: phi and what it follows from. Returns the same.

    Inputs: `problems`; `initial` and `latest` (of the round before), each with its verdicts; `phi`, where the round
    before had such a stage too.
    """
    found = measure(options.adaptive, _same_samples(inputs))
    last = phi_in_force(None if "phi" in inputs else options.start, inputs)
    value = adapted_phi(options.start, found.latest, found.initial, last)
    if found.reason:
        say(f"  phi stays {value:.4g}: {found.reason}")
    content = {
        "phi": value,
        "adaptive": options.adaptive,
        "start": options.start,
        "latest": found.latest,
        "initial": found.initial,
        "problems": found.problems,
        "traces": found.traces,
        "reason": found.reason,
    }
    write_text(out / PHI_FILE, json.dumps(content, indent=1) + "\n")
    return content


def _same_samples(inputs: Mapping[str, Path]) -> Iterator[tuple[list[Judged], list[Judged]]]:
    """For each problem that the latest student was asked, its traces and the initial student's of the same indices."""
    latest, initial = (JudgedTraces(inputs[name], inputs[f"{name}-verdicts"]) for name in ("latest", "initial"))
    for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem):
        new, old = latest.take(problem.id), initial.take(problem.id)
        indices = {sample.trace.sample_index for sample in new}
        if new:
            yield new, [sample for sample in old if sample.trace.sample_index in indices]
    latest.finish()
    initial.finish()


def measure(worth: Worth, samples: Iterator[tuple[list[Judged], list[Judged]]]) -> Measured:
    """The worth of both students' negatives, from each problem's traces of the latest and of the initial student."""
    negatives = [(len(new), _negatives(new), _negatives(old)) for new, old in samples]
    if not negatives:
        return Measured(None, None, 0, 0, "the latest student was given no problem in the round before")
    if worth == "yield":
        return _yield(negatives)
    return _diversity(negatives)


def _negatives(samples: Sequence[Judged]) -> list[str]:
    return [sample.text for sample in samples if sample.outcome is Outcome.WRONG]


def _yield(negatives: Sequence[tuple[int, list[str], list[str]]]) -> Measured:
    traces = sum(asked for asked, _, _ in negatives)
    latest = sum(len(texts) for _, texts, _ in negatives) / traces
    initial = sum(len(texts) for _, _, texts in negatives) / traces
    reason = "" if initial else "the initial student made no wrong trace for the same problems"
    return Measured(latest, initial, len(negatives), traces, reason)


def _diversity(negatives: Sequence[tuple[int, list[str], list[str]]]) -> Measured:
    """Over the problems where both have two negatives or more, with as many of each: the first by sample index."""
    traces, new, old = 0, [], []
    for _, latest, initial in negatives:
        if (count := min(len(latest), len(initial))) >= 2:
            traces += count
            new.append(1 - mean_rouge_l(latest[:count]))
            old.append(1 - mean_rouge_l(initial[:count]))
    if not old:
        return Measured(None, None, 0, 0, "for no problem do both students have two wrong traces")
    reason = "" if fmean(old) else "the initial student's wrong traces are all alike"
    return Measured(fmean(new), fmean(old), len(old), traces, reason)
