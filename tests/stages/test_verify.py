"""The verify stage: one verdict a trace, resumed, extended, and in the order of the traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_distill.errors import DataError
from orpo_distill.records import FinishReason, Message, Outcome, Problem, Trace, Verdict, read_jsonl, write_jsonl
from orpo_distill.stages.verify import VerifyOptions, verify
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.number import Number


class Sums(Task):
    """Problems with numbers as answers."""

    def load(self, split: str) -> list[Problem]:
        return []

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        return (Message("user", problem.question),)

    def judge(self) -> Verifier:
        return Number()


OPTIONS = VerifyOptions(task=Sums())


def make(folder: Path, samples: int, problems: int = 3, first: str = "The answer is") -> dict[str, Path]:
    """Problem p has the answer p; its sample k states k, so that sample p of each problem is right."""
    for name in ("problems", "traces"):
        (folder / name).mkdir(exist_ok=True)
    rows = [Problem(f"p{index}", "?", str(index)) for index in range(problems)]
    write_jsonl(folder / "problems" / "problems.jsonl", rows)
    traces = [
        Trace(
            Trace.make_id("teacher", row.id, k, f"{first} {k}.", FinishReason.STOP),
            row.id,
            "teacher",
            k,
            f"{first} {k}.",
        )
        for row in rows
        for k in range(samples)
    ]
    write_jsonl(folder / "traces" / "traces.jsonl", traces)
    (folder / "out").mkdir(exist_ok=True)
    return {"problems": folder / "problems", "traces": folder / "traces"}


def verdicts(folder: Path) -> list[Verdict]:
    return list(read_jsonl(folder / "out" / "verdicts.jsonl", Verdict))


def ids(folder: Path) -> list[str]:
    return [trace.id for trace in read_jsonl(folder / "traces" / "traces.jsonl", Trace)]


def test_every_trace_gets_a_verdict_in_order(tmp_path: Path) -> None:
    metrics = verify(OPTIONS, make(tmp_path, samples=4), tmp_path / "out")
    assert [verdict.trace_id for verdict in verdicts(tmp_path)] == ids(tmp_path)
    assert metrics == {
        "traces": 12,
        "correct": 3,
        "wrong": 9,
        "ambiguous": 0,
        "unparseable": 0,
        "truncated": 0,
        "failed": 0,
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verdicts.jsonl"]


def test_a_broken_off_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """A verdict that is there is kept as it is (here: one no verifier would give), and a torn line is made again."""
    inputs = make(tmp_path, samples=4)
    kept = Verdict(ids(tmp_path)[0], Outcome.AMBIGUOUS, None, "kept")
    line = json.dumps({"trace_id": kept.trace_id, "outcome": "ambiguous", "answer": None, "reason": "kept"})
    (tmp_path / "out" / "verdicts.partial.jsonl").write_text(line + '\n{"trace_id": "torn')
    metrics = verify(OPTIONS, inputs, tmp_path / "out")
    assert verdicts(tmp_path)[0] == kept
    assert [verdict.trace_id for verdict in verdicts(tmp_path)] == ids(tmp_path)
    assert (metrics["traces"], metrics["ambiguous"], metrics["correct"]) == (12, 1, 2)


def test_more_samples_extend_a_finished_stage(tmp_path: Path) -> None:
    verify(OPTIONS, make(tmp_path, samples=2), tmp_path / "out")
    before = {verdict.trace_id: verdict for verdict in verdicts(tmp_path)}
    metrics = verify(OPTIONS, make(tmp_path, samples=4), tmp_path / "out")
    after = {verdict.trace_id: verdict for verdict in verdicts(tmp_path)}
    assert list(after) == ids(tmp_path)
    assert before.items() <= after.items()
    assert metrics["traces"] == 12


@pytest.mark.parametrize("lost", [0, 1, 100, 400, 700])
def test_an_extension_that_was_broken_off_ends_the_same(tmp_path: Path, lost: int) -> None:
    """The partial file holds the earlier verdicts and behind them the new ones, of which the last bytes are lost."""
    verify(OPTIONS, make(tmp_path, samples=2), tmp_path / "out")
    earlier = (tmp_path / "out" / "verdicts.jsonl").read_bytes()
    (tmp_path / "whole").mkdir()
    inputs = make(tmp_path, samples=4)
    metrics = verify(OPTIONS, inputs, tmp_path / "whole")
    whole = (tmp_path / "whole" / "verdicts.jsonl").read_bytes()
    new = b"".join(line for line in whole.splitlines(keepends=True) if line not in earlier)
    (tmp_path / "out" / "verdicts.jsonl").unlink()
    (tmp_path / "out" / "verdicts.partial.jsonl").write_bytes((earlier + new)[: len(earlier + new) - lost])
    assert verify(OPTIONS, inputs, tmp_path / "out") == metrics
    assert (tmp_path / "out" / "verdicts.jsonl").read_bytes() == whole


def test_verdicts_of_traces_that_are_gone_are_dropped(tmp_path: Path) -> None:
    verify(OPTIONS, make(tmp_path, samples=4), tmp_path / "out")
    metrics = verify(OPTIONS, make(tmp_path, samples=4, first="Answer:"), tmp_path / "out")
    assert [verdict.trace_id for verdict in verdicts(tmp_path)] == ids(tmp_path)
    assert metrics["traces"] == 12


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    inputs = make(tmp_path, samples=4)
    first = verify(OPTIONS, inputs, tmp_path / "out")
    content = (tmp_path / "out" / "verdicts.jsonl").read_bytes()
    assert verify(OPTIONS, inputs, tmp_path / "out") == first
    assert (tmp_path / "out" / "verdicts.jsonl").read_bytes() == content


def test_both_files_are_there_when_only_the_clearing_up_was_broken_off(tmp_path: Path) -> None:
    inputs = make(tmp_path, samples=4)
    verify(OPTIONS, inputs, tmp_path / "out")
    content = (tmp_path / "out" / "verdicts.jsonl").read_bytes()
    (tmp_path / "out" / "verdicts.partial.jsonl").write_bytes(content[:100])
    verify(OPTIONS, inputs, tmp_path / "out")
    assert (tmp_path / "out" / "verdicts.jsonl").read_bytes() == content


def test_failed_samples_are_counted(tmp_path: Path) -> None:
    inputs = make(tmp_path, samples=1)
    trace = Trace("x", "p0", "teacher", 0, "", FinishReason.ERROR, error="HTTP 500")
    write_jsonl(inputs["traces"] / "traces.jsonl", [trace])
    assert verify(OPTIONS, inputs, tmp_path / "out")["failed"] == 1
    assert verdicts(tmp_path)[0].reason == "HTTP 500"


def test_no_traces_give_no_verdicts(tmp_path: Path) -> None:
    assert verify(OPTIONS, make(tmp_path, samples=0), tmp_path / "out")["traces"] == 0
    assert verdicts(tmp_path) == []


def test_a_trace_without_its_problem_is_an_error(tmp_path: Path) -> None:
    inputs = make(tmp_path, samples=1)
    write_jsonl(inputs["problems"] / "problems.jsonl", [Problem("p0", "?", "0")])
    with pytest.raises(DataError, match=r"found none with id 'p1'"):
        verify(OPTIONS, inputs, tmp_path / "out")


def test_a_broken_trace_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    inputs = make(tmp_path, samples=1)
    with (inputs["traces"] / "traces.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"traces\.jsonl:4"):
        verify(OPTIONS, inputs, tmp_path / "out")
