"""The trace browser's data: every problem, trace and pair of a run, in columns, compressed.

JSON, gzip, base64 in a script element that no browser runs: nothing in it can end the element or become markup, and
the page's script only ever puts it into text nodes.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_distill.page.blocks import Browser
from orpo_distill.page.files import RunFiles, judged, whole_rows
from orpo_distill.page.measures import OUTCOMES, UNJUDGED, Measured
from orpo_distill.page.yields import REASONS
from orpo_distill.records import FinishReason, Pair, Problem, Trace, Verdict, read_jsonl, stable_hash

MOST_TRACES = 60_000  # that a page holds: about 100 MB of memory in a reader's browser
FORMAT = 1


@dataclass(frozen=True)
class Embedded:
    """The browser and its data (base64)."""

    block: Browser
    data: str


class _Columns:
    """Traces by column, in the order of the run."""

    def __init__(self, problems: Mapping[str, int]) -> None:
        self.problem_places = problems
        self.places: dict[tuple[str, str], int] = {}  # (kind, trace id) -> row
        self.rows: dict[str, list[Any]] = {name: [] for name in _NAMES}

    def add(self, stage: int, kind: str, trace: Trace, verdict: Verdict | None) -> None:
        """Take in a trace of the stage with this number."""
        self.places[kind, trace.id] = len(self.rows["text"])
        outcome = verdict.outcome.value if verdict else UNJUDGED
        values = {
            "stage": stage,
            "problem": self.problem_places[trace.problem_id],
            "index": trace.sample_index,
            "text": trace.text,
            "outcome": _OUTCOMES.index(outcome),
            "answer": verdict.answer if verdict else None,
            "reason": verdict.reason if verdict else trace.error,
            "cut": int(trace.finish_reason is FinishReason.LENGTH),
            "tokens": trace.completion_tokens,
        }
        for name, value in values.items():
            self.rows[name].append(value)


_NAMES = ("stage", "problem", "index", "text", "outcome", "answer", "reason", "cut", "tokens")
_OUTCOMES = [*OUTCOMES, UNJUDGED]


def embedded(files: RunFiles, measured: Sequence[Measured], most: int = MOST_TRACES) -> Embedded | None:
    """What the page shows of single traces: all, or those of as many problems as come to `most` traces.

    None where there are none. Which problems a large run shows is a function of their ids.
    """
    counts: Counter[str] = Counter()
    for each in measured:
        counts.update(each.problems)
    if not counts:
        return None
    chosen = _chosen(counts, most)
    problems = _problems(files, chosen)
    columns = _Columns({row[0]: place for place, row in enumerate(problems)})
    for stage, each in enumerate(measured):
        for trace, verdict in judged(each.source):
            if trace.problem_id in chosen:
                columns.add(stage, each.source.kind, trace, verdict)
    pairs = _pairs(files, columns)
    content = {
        "format": FORMAT,
        "outcomes": _OUTCOMES,
        "stages": [[each.source.stage, each.source.policy, each.source.round, each.source.kind] for each in measured],
        "problems": problems,
        "traces": columns.rows,
        "pairs": pairs,
        "unused": _unused(files, columns),
    }
    traces = len(columns.rows["text"])
    note = ""
    if len(chosen) < len(counts):
        note = f"This page holds the traces of {len(chosen):,} of {len(counts):,} problems ({traces:,} traces)."
    return Embedded(Browser(traces, len(pairs["round"]), note), packed(content))


def _chosen(counts: Mapping[str, int], most: int) -> set[str]:
    """Problems whose traces together are at most `most`, at least one problem."""
    if sum(counts.values()) <= most:
        return set(counts)
    taken: set[str] = set()
    for problem_id in sorted(counts, key=stable_hash):
        if taken and most < counts[problem_id]:
            break
        most -= counts[problem_id]
        taken.add(problem_id)
    return taken


def _problems(files: RunFiles, chosen: set[str]) -> list[list[Any]]:
    """[id, split, question, gold answer, choices] of each, in the order of the run; unknown ones by their id alone."""
    known: dict[str, tuple[str, Problem]] = {}
    for split, problem in files.problems():
        if problem.id in chosen:
            known.setdefault(problem.id, (split, problem))
    rows: list[list[Any]] = [
        [problem.id, split, problem.question, problem.answer, list(problem.choices)]
        for split, problem in known.values()
    ]
    return rows + [[problem_id, "", "", "", []] for problem_id in sorted(chosen - known.keys())]


def _pairs(files: RunFiles, columns: _Columns) -> dict[str, list[int]]:
    """Columns: round, row of the chosen trace, row of the rejected one (-1: there is none)."""
    found: dict[str, list[int]] = {"round": [], "chosen": [], "rejected": []}
    for number in files.rounds:
        path = files.path / f"round-{number}" / "pairs" / "pairs.jsonl"
        if not path.exists():
            continue
        for pair in read_jsonl(path, Pair):
            chosen = columns.places.get(("sampled", pair.chosen_id))
            rejected = columns.places.get(("sampled", pair.rejected_id)) if pair.rejected_id else -1
            if chosen is not None and rejected is not None:
                found["round"].append(number)
                found["chosen"].append(chosen)
                found["rejected"].append(rejected)
    return found


def _unused(files: RunFiles, columns: _Columns) -> dict[str, list[Any]]:
    """Columns: round, row of the trace, number of the reason in `reasons`."""
    reasons: list[str] = []
    found: dict[str, list[Any]] = {"round": [], "trace": [], "reason": [], "reasons": reasons}
    for number in files.rounds:
        for row in whole_rows(files.path / f"round-{number}" / "pairs" / "dropped.jsonl"):
            place = columns.places.get(("sampled", str(row.get("trace_id"))))
            if place is None:
                continue
            code = str(row.get("reason"))
            reason = f"not {'correct' if row.get('side') == 'chosen' else 'wrong'}: {code}"
            reason = REASONS.get(code, code if code not in OUTCOMES else reason)
            if reason not in reasons:
                reasons.append(reason)
            found["round"].append(number)
            found["trace"].append(place)
            found["reason"].append(reasons.index(reason))
    return found


def packed(content: Any) -> str:
    """Plain data as base64 of gzip of JSON. The same data give the same text."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    try:
        data = text.encode()
    except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot hold
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
