from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orpo_distill.errors import DataError
from orpo_distill.judged import JudgedTraces
from orpo_distill.records import FinishReason, Outcome, Trace, Verdict, write_jsonl


def joined(folder: Path, trace_ids: Sequence[str], verdict_ids: Sequence[str]) -> JudgedTraces:
    """A trace is called problem/index; the second of each problem was cut."""
    traces = (
        Trace(
            name, name[0], "teacher", int(name[2]), f" {name}\n", FinishReason("length" if name[2] == "1" else "stop")
        )
        for name in trace_ids
    )
    write_jsonl(folder / "traces.jsonl", traces)
    write_jsonl(folder / "verdicts.jsonl", (Verdict(name, Outcome.WRONG, "7", "") for name in verdict_ids))
    return JudgedTraces(folder, folder)


def test_taken_problem_by_problem(tmp_path: Path) -> None:
    names = ["a/0", "a/1", "c/0"]
    traces = joined(tmp_path, names, names)
    taken = traces.take("a")
    assert [(found.trace.id, found.outcome, found.text, found.cut) for found in taken] == [
        ("a/0", Outcome.WRONG, "a/0", False),
        ("a/1", Outcome.WRONG, "a/1", True),
    ]
    assert traces.take("b") == []
    assert [found.text for found in traces.take("c")] == ["c/0"]
    traces.finish()


def test_nothing_was_sampled(tmp_path: Path) -> None:
    traces = joined(tmp_path, [], [])
    assert traces.take("a") == []
    traces.finish()


@pytest.mark.parametrize("order", [["a"], ["b", "a"]])
def test_traces_of_an_unknown_problem_or_out_of_order(tmp_path: Path, order: list[str]) -> None:
    traces = joined(tmp_path, ["a/0", "b/0"], ["a/0", "b/0"])
    for name in order:
        traces.take(name)
    with pytest.raises(DataError, match="in their order, found trace b/0 of problem 'b'"):
        traces.finish()


@pytest.mark.parametrize(
    ("verdicts", "found"), [(["b/0"], "that of b/0"), ([], "none"), (["a/0", "b/0"], "one more of b/0")]
)
def test_verdicts_of_other_traces(tmp_path: Path, verdicts: list[str], found: str) -> None:
    with pytest.raises(DataError, match=f"found {found}; verify again"):
        joined(tmp_path, ["a/0"], verdicts).take("a")
