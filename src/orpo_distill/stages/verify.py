"""Stage: one verdict for every trace. What was verified before is kept; only new traces are judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
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
    the traces' ids, never their texts. Raises DataError for a trace without its problem.
    """
    problems = {problem.id: problem for problem in read_jsonl(inputs["problems"] / "problems.jsonl", Problem)}
    traces = inputs["traces"] / "traces.jsonl"
    partial = _take_up(out)
    ids = {trace_id: None for trace_id, _, _ in _lines(traces, "id")}  # a set in the order of the traces
    known = {trace_id for trace_id, _, _ in _lines(partial, "trace_id") if trace_id in ids}
    with JsonlAppender(partial) as results, progress("verify", len(ids), len(known)) as advance:
        items = _items(traces, problems, known)
        for verdict in verify_all(options.task.judge(), items, options.verify.timeout, options.verify.processes):
            results.append(verdict)
            advance(1)
    counts = _finish(partial, ids, out / FINISHED)
    partial.unlink()
    return {"traces": len(ids), **{outcome.value: counts[outcome.value] for outcome in Outcome}}


def _take_up(out: Path) -> Path:
    """The file that verdicts are appended to, with those of an earlier run that was broken off or is now extended."""
    partial, finished = out / PARTIAL, out / FINISHED
    if finished.exists():
        finished.replace(partial)  # where both are there, only the removal of the partial file was broken off
    repair_torn_line(partial)
    partial.touch()
    return partial


def _lines(path: Path, key: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every line's value of `key`, its offset in bytes and its fields. Raises DataError for a line without the key."""
    at = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode())
                yield row[key], at, row
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: expected a JSON object with {key!r}, found {error}") from error
            at += len(line)


def _items(traces: Path, problems: Mapping[str, Problem], known: set[str]) -> Iterator[tuple[Problem, Trace]]:
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


def _finish(partial: Path, ids: Collection[str], finished: Path) -> Counter[str]:
    """Write the verdicts in the order of `ids`, leaving out those whose trace is gone. Returns counts by outcome."""
    counts: Counter[str] = Counter()
    offsets: dict[str, int] = {}
    for trace_id, at, row in _lines(partial, "trace_id"):
        if trace_id in ids and trace_id not in offsets:
            offsets[trace_id] = at
            counts[row["outcome"]] += 1
    with partial.open("rb") as verdicts, atomic_file(finished) as file:
        for trace_id in ids:
            if verdicts.tell() != offsets[trace_id]:
                verdicts.seek(offsets[trace_id])
            file.write(verdicts.readline())
    return counts
