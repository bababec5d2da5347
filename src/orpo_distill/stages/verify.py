"""Stage: one verdict for every trace. What was verified before is kept; only new traces are judged.

Verdicts are appended to a partial file in the order of the traces. Where nothing had been verified before, that file is
the result; else the earlier verdicts are put in their places among the new ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny

from orpo_distill.component import Options
from orpo_distill.config import VerifySection
from orpo_distill.errors import DataError
from orpo_distill.progress import progress
from orpo_distill.records import (
    JsonlAppender,
    Outcome,
    Problem,
    Trace,
    atomic_file,
    read_jsonl,
    repair_torn_line,
    sync_folder,
)
from orpo_distill.tasks import Task
from orpo_distill.verification import verify_all

FINISHED = "verdicts.jsonl"
PARTIAL = "verdicts.partial.jsonl"


class VerifyOptions(Options):
    """Which task's verifier judges, and how."""

    task: SerializeAsAny[Task]
    verify: VerifySection = VerifySection()


def verify(options: VerifyOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `verdicts.jsonl`: one verdict a trace, in the order of the traces. Returns counts by outcome.

    Reads `problems.jsonl` in inputs["problems"] and `traces.jsonl` in inputs["traces"]. In memory are the problems and
    the ids of earlier verdicts, never a trace. Raises DataError for a trace without its problem.
    """
    problems = {problem.id: problem for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem)}
    traces = inputs["traces"] / "traces.jsonl"
    partial = _take_up(out)
    known = dict(_lines(partial, "trace_id"))
    with traces.open("rb") as lines:
        total = sum(1 for _ in lines)
    done = sum(trace_id in known for trace_id, _ in _lines(traces, "id")) if known else 0
    counts: Counter[str] = Counter()
    with JsonlAppender(partial) as results, progress("verify", total, done) as advance:
        items = _items(traces, problems, known)
        for verdict in verify_all(options.task.judge(), items, options.verify.timeout, options.verify.processes):
            results.append(verdict)
            counts[verdict.outcome] += 1
            advance(1)
    if known:
        counts = _merge(partial, known, traces, out / FINISHED)
        partial.unlink()
    else:
        partial.replace(out / FINISHED)
        sync_folder(out)
    return {"traces": total, **{outcome.value: counts[outcome.value] for outcome in Outcome}}


def _take_up(out: Path) -> Path:
    """The file that verdicts are appended to, with those of an earlier run that was broken off or is now extended."""
    partial, finished = out / PARTIAL, out / FINISHED
    if finished.exists():
        finished.replace(partial)  # where both are there, only the removal of the partial file was broken off
    repair_torn_line(partial)
    partial.touch()
    return partial


def _lines(path: Path, key: str) -> Iterator[tuple[str, int]]:
    """Every line's value of `key` and its offset in bytes. Raises DataError for a line without the key."""
    at = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line.decode())[key], at
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: expected a JSON object with {key!r}, found {error}") from error
            at += len(line)


def _items(traces: Path, problems: Mapping[str, Problem], known: Mapping[str, int]) -> Iterator[tuple[Problem, Trace]]:
    """Every trace that has no verdict yet, with its problem."""
    for trace in read_jsonl(traces, Trace):
        if trace.id in known:
            continue
        if trace.problem_id not in problems:
            raise DataError(
                f"expected every trace's problem in problems.jsonl, found none with id {trace.problem_id!r} "
                f"(trace {trace.id} of {traces}); make the samples again from these problems"
            )
        yield problems[trace.problem_id], trace


def _merge(partial: Path, known: Mapping[str, int], traces: Path, finished: Path) -> Counter[str]:
    """Write the verdicts in the order of the traces, without those whose trace is gone. Returns counts by outcome.

    `partial` holds the `known` ones at their offsets and then the new ones, which are in order.
    """
    counts: Counter[str] = Counter()
    with partial.open("rb") as earlier, partial.open("rb") as later, atomic_file(finished) as file:
        later.seek(max(known.values()))
        later.readline()
        for trace_id, _ in _lines(traces, "id"):
            at = known.get(trace_id)
            if at is not None and earlier.tell() != at:
                earlier.seek(at)
            line = (later if at is None else earlier).readline()
            counts[json.loads(line)["outcome"]] += 1
            file.write(line)
    return counts
