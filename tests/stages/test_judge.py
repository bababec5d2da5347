"""The judge stages on hand-made pairs and answers, with scripted judges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.billing import ledger_table
from orpo_distill.errors import DataError
from orpo_distill.judging import Judge
from orpo_distill.records import (
    Answer,
    FinishReason,
    Message,
    Outcome,
    Pair,
    Preference,
    Problem,
    Trace,
    read_jsonl,
    write_jsonl,
)
from orpo_distill.runs import Asked, Manifest, RunFolder
from orpo_distill.stages.judge import JudgeAnswersOptions, JudgePairsOptions, judge_answers, judge_pairs
from tests.servers import faulty_server

FIRST, SECOND, TIE = "So it is. [[A]]", "[[B]]", "[[C]]"
PREFERS_ONE, PREFERS_OTHER = [FIRST, SECOND], [SECOND, FIRST]


def judge(replies: dict[str, list[str]] | None = None, default: Sequence[Any] = (FIRST, SECOND)) -> Judge:
    """Answers the two orders of every comparison of a problem with its two replies."""
    sampler = {"type": "scripted", "replies": replies or {}, "default": list(default)}
    return Judge.model_validate({"model": "script", "sampler": sampler})


class Run:
    """A run folder with problems and stages made by hand."""

    def __init__(self, path: Path, problems: int = 3) -> None:
        self.folder = RunFolder(path)
        found = [Problem(f"p{i}", f"Question {i}?", "") for i in range(problems)]
        for name in ("problems", "test", "validation"):
            self.of("problems").mkdir(exist_ok=True)
            write_jsonl(self.of("problems") / f"{name}.jsonl", found if name != "validation" else [])

    def of(self, stage: str) -> Path:
        self.folder.of(stage).mkdir(parents=True, exist_ok=True)
        return self.folder.of(stage)

    def candidates(self, number: int, pairs: Sequence[tuple[int, str, str]]) -> None:
        """(problem, teacher's text, student's text) of each."""
        stage = f"round-{number}/candidates"
        rows = [
            Pair(f"p{p}", (Message("user", "?"),), one, other, f"id {one}", f"id {other}", "teacher", "student-0")
            for p, one, other in pairs
        ]
        write_jsonl(self.of(stage) / "pairs.jsonl", rows)
        dropped = {"problem_id": "p9", "trace_id": "x", "side": "chosen", "reason": "truncated"}
        (self.of(stage) / "dropped.jsonl").write_text(json.dumps(dropped) + "\n")
        metrics: dict[str, Any] = {"pairs": len(rows), "problems": 3, "phi": 0.0, "sent_to_latest": 0, "fell_back": 0}
        metrics["dropped"] = {"problem": {}, "chosen": {"truncated": 1}, "rejected": {}}
        self.folder.write_manifest(stage, Manifest(Asked("m:f", {}, {}), "id", metrics))

    def judged(self, number: int, by: Judge) -> dict[str, Any]:
        inputs = {"problems": self.of("problems"), "candidates": self.of(f"round-{number}/candidates")}
        if number > 1:
            inputs["previous"] = self.of(f"round-{number - 1}/pairs")
        return judge_pairs(JudgePairsOptions(judge=by, seed=0), inputs, self.of(f"round-{number}/pairs"))

    def pairs(self, number: int = 1) -> list[Pair]:
        return list(read_jsonl(self.of(f"round-{number}/pairs") / "pairs.jsonl", Pair))

    def answered(self, stage: str, texts: Sequence[str | None]) -> Path:
        """An evaluation's answers to the test problems; None: the sample failed."""
        ends = [FinishReason.ERROR if text is None else FinishReason.STOP for text in texts]
        traces = [
            Trace(f"{stage} {i}", f"p{i}", stage, 0, text or "", end)
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        write_jsonl(self.of(stage) / "traces.jsonl", traces)
        answers = [Answer(f"p{i}", "test", "", None, Outcome.WRONG) for i in range(len(texts))]
        write_jsonl(self.of(stage) / "answers.jsonl", answers)
        return self.of(stage)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_preferred_text_is_chosen_whoever_wrote_it(run: Run) -> None:
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1"), (1, "t2", "s2"), (2, "t3", "s3")])
    metrics = run.judged(1, judge({"p0": PREFERS_ONE, "p1": PREFERS_OTHER, "p2": [TIE, TIE]}))
    assert [(row.chosen, row.rejected, row.chosen_policy, row.rejected_policy) for row in run.pairs()] == [
        ("t0", "s0", "teacher", "student-0"),
        ("s1", "t1", "student-0", "teacher"),
        ("s2", "t2", "student-0", "teacher"),
    ]
    assert (run.pairs()[1].chosen_id, run.pairs()[1].rejected_id) == ("id s1", "id t1")
    assert (metrics["candidates"], metrics["pairs"], metrics["paired_problems"]) == (4, 3, 2)
    assert (metrics["judge"]["won"], metrics["judge"]["lost"], metrics["judge"]["tie"]) == (1, 2, 1)
    assert metrics["rejected_policies"] == {"student-0": 1 / 3, "teacher": 2 / 3}
    assert metrics["phi"] == 0.0  # what the candidates counted stays
    assert metrics["dropped"] == {
        "problem": {"undecided": 1},
        "chosen": {"truncated": 1, "tie": 1},
        "rejected": {"tie": 1},
    }
    lines = (run.of("round-1/pairs") / "dropped.jsonl").read_text().splitlines()
    found = [(row["problem_id"], row["trace_id"], row["side"], row["reason"]) for row in map(json.loads, lines)]
    assert found[0] == ("p9", "x", "chosen", "truncated")
    assert found[1:] == [
        ("p2", "id t3", "chosen", "tie"),
        ("p2", "id s3", "rejected", "tie"),
        ("p2", "", "problem", "undecided"),
    ]


def test_every_judgement_is_kept(run: Run) -> None:
    run.candidates(1, [(0, "t0", "s0"), (1, "same", "same")])
    run.judged(1, judge())
    kept = list(read_jsonl(run.of("round-1/pairs") / "judgements.jsonl", Preference))
    assert [(one.one_id, one.other_id, one.result) for one in kept] == [
        ("id t0", "id s0", "won"),
        ("id same", "id same", "same"),
    ]
    traces = list(read_jsonl(run.of("round-1/pairs") / "traces.jsonl", Trace))
    assert [(one.policy, one.text) for one in traces] == [("judge", FIRST), ("judge", SECOND)]
    assert kept[0].prompt_ids == tuple(one.prompt_id for one in traces)


def test_half_of_the_answers_are_nonsense(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
    metrics = run.judged(1, judge({"p1": ["What?", "I like both of them."]}))
    assert [row.problem_id for row in run.pairs()] == ["p0"]
    assert (metrics["judge"]["nonsense"], metrics["judge"]["nonsense_answers"]) == (1, 0.5)
    assert metrics["dropped"]["problem"] == {"undecided": 1} and metrics["dropped"]["chosen"]["nonsense"] == 1
    assert "judge: the judge talks nonsense: 50% of its 4 answers name no choice" in capsys.readouterr().err


def test_a_judge_that_always_takes_the_first_makes_no_pair(run: Run) -> None:
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
    with pytest.raises(DataError) as caught:
        run.judged(1, judge(default=[FIRST]))
    words = str(caught.value)
    assert "found none among 2 (0 tie, 2 orders_disagree, 0 nonsense, 0 no_answer, 0 same)" in words
    assert "the order decides" in words and "judge.pairs: false" in words
    assert len(list(read_jsonl(run.of("round-1/pairs") / "judgements.jsonl", Preference))) == 2


def test_a_judge_whose_answers_all_fail(run: Run) -> None:
    run.candidates(1, [(0, "t0", "s0")])
    with pytest.raises(DataError, match="found that all 2 failed, the first: no scripted reply"):
        run.judged(1, judge(default=[]))


def test_what_an_earlier_round_asked_is_not_asked_again(run: Run) -> None:
    """The second judge would say the opposite: of the comparison that both rounds have, it is not asked."""
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
    run.judged(1, judge())
    run.candidates(2, [(0, "t0", "s0"), (1, "t1", "new")])
    run.judged(2, judge(default=PREFERS_OTHER))
    assert [(row.chosen, row.rejected) for row in run.pairs(2)] == [("t0", "s0"), ("new", "t1")]


def test_broken_off_it_goes_on(run: Run) -> None:
    """What stands in the partial file is kept: there the judge had said the opposite."""
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
    run.judged(1, judge(default=PREFERS_OTHER))
    out = run.of("round-1/pairs")
    lines = (out / "traces.jsonl").read_text().splitlines(keepends=True)
    (out / "traces.jsonl").unlink()
    (out / "traces.partial.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    run.judged(1, judge())
    assert [row.chosen for row in run.pairs()] == ["s0", "t1"]


def test_a_text_that_was_cut_is_never_chosen(run: Run) -> None:
    run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
    path = run.of("round-1/candidates") / "pairs.jsonl"
    write_jsonl(path, [replace(row, rejected_cut=row.problem_id == "p1") for row in list(read_jsonl(path, Pair))])
    run.judged(1, judge(default=PREFERS_OTHER))
    assert [row.chosen for row in run.pairs()] == ["s0"]


def answers(run: Run, by: Judge, against: tuple[str, ...] = ("student-0", "teacher")) -> list[dict[str, Any]]:
    inputs = {"problems": run.of("problems"), "answers": run.of("answers"), **{one: run.of(one) for one in against}}
    options = JudgeAnswersOptions(judge=by, seed=0, policy="student-1", against=against)
    metrics = judge_answers(options, inputs, run.of("judged"))
    rows: list[dict[str, Any]] = json.loads((run.of("judged") / "win-rates.json").read_bytes())
    assert list(metrics.values()) == rows
    return rows


def test_win_rates_against_the_initial_student_and_the_teacher(run: Run) -> None:
    """p0: the student's answer is its own (won), p1 the initial one's (same), p2 lost. The teacher has failed on p2."""
    run.answered("answers", ["new", "old", "bad"])
    run.answered("student-0", ["old", "old", "good"])
    run.answered("teacher", ["best", "best", None])
    rows = answers(run, judge({"p0": PREFERS_ONE, "p1": PREFERS_OTHER, "p2": PREFERS_OTHER}))
    named = [(row["policy"], row["against"], row["split"], row["n"], row["win_rate"]) for row in rows]
    assert named == [
        ("student-1", "student-0", "test", 3, 0.5),
        ("student-1", "teacher", "test", 2, 0.5),
    ]
    assert [rows[0][name] for name in ("won", "same", "lost")] == [1, 1, 1]
    assert [rows[1][name] for name in ("won", "same", "lost")] == [1, 0, 1]


def test_the_same_two_texts_are_asked_about_once(run: Run) -> None:
    """Where the initial student and the teacher answer alike."""
    run.answered("answers", ["new"])
    for other in ("student-0", "teacher"):
        run.answered(other, ["old"])
    rows = answers(run, judge())
    assert [row["win_rate"] for row in rows] == [1.0, 1.0]
    assert len(list(read_jsonl(run.of("judged") / "traces.jsonl", Trace))) == 2


def test_a_recorded_judge(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    path.write_text(json.dumps({"id": "p0", "traces": [{"text": FIRST}, {"text": SECOND}]}) + "\n")
    run.answered("answers", ["new"])
    run.answered("student-0", ["old"])
    by = Judge.model_validate({"model": "r", "sampler": {"type": "recorded", "path": str(path)}})
    assert answers(run, by, ("student-0",))[0]["win_rate"] == 1.0


def test_a_paid_judge_is_in_the_ledger_and_paid_once(run: Run, tmp_path: Path) -> None:
    """2 comparisons are 4 calls; the second round has one of them, and the same again after its folder is lost."""
    prompt, gold = "{question} {first} | {second}", tmp_path / "gold.jsonl"
    orders = {"t0 | s0": "[[A]]", "s0 | t0": "[[B]]", "t1 | s1": "[[B]]", "s1 | t1": "[[A]]"}
    rows = [{"question": f"Question {texts[1]}? {texts}", "answer": mark} for texts, mark in orders.items()]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = tmp_path / "ledger.sqlite"
    with faulty_server(gold=gold, right=1) as server:
        sampler = {"type": "openai", "base_url": server.base_url, "ledger": str(ledger), "account": "a"}
        by = Judge.model_validate({"model": "faulty", "sampler": sampler, "prompt": prompt})
        run.candidates(1, [(0, "t0", "s0"), (1, "t1", "s1")])
        run.judged(1, by)
        assert [row.chosen for row in run.pairs()] == ["t0", "s1"]
        run.candidates(2, [(0, "t0", "s0")])
        run.judged(2, by)
        shutil.rmtree(run.of("round-1/pairs"))
        run.judged(1, by)
    assert [row.chosen for row in run.pairs()] == ["t0", "s1"]
    header, row = ledger_table(ledger)
    assert (row[header.index("model")], row[header.index("calls")]) == ("faulty", "4")
