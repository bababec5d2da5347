"""Run folders made by hand, with the records and manifests that real stages write, to be rendered."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from orpo_distill.records import (
    Answer,
    FinishReason,
    Message,
    Outcome,
    Pair,
    Problem,
    Trace,
    Verdict,
    write_jsonl,
)
from orpo_distill.runs import Asked, Manifest, RunFolder
from orpo_distill.statistics import wilson

ENVIRONMENT = {"python": "3.11.7", "platform": "Linux", "packages": {"orpo-distill": "0.1.0", "torch": "2.13.0"}}

Write = Callable[[str], str]
"""What a model makes of the text that it would have written."""


def as_is(text: str) -> str:
    return text


class FolderOfARun:
    """A run in which problem i is answered by i; `write` changes every text that a model or a data set wrote."""

    def __init__(self, path: Path, problems: int = 6, write: Write = as_is, **config: object) -> None:
        self.path, self.run, self.write = path, RunFolder(path), write
        path.mkdir(parents=True)
        settings = {"name": path.name, "seed": 0, "task": {"type": "jsonl"}, "rounds": 2, "runs": "runs"} | config
        (path / "config.yaml").write_text(yaml.safe_dump(settings))
        (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
        self.problems = [Problem(f"p{i}", write(f"What is {i}?"), str(i), (write("a"), "b")) for i in range(problems)]
        self.tests = [Problem(f"t{i}", write(f"And {i}?"), str(i)) for i in range(problems)]
        write_jsonl(self.folder("problems") / "problems.jsonl", self.problems)
        write_jsonl(self.folder("problems") / "test.jsonl", self.tests)
        self.finish("problems", {"train": problems})
        self.traces: dict[str, list[Trace]] = {}

    def folder(self, stage: str) -> Path:
        folder = self.run.of(stage)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, stage: str, metrics: dict | None = None, kept: tuple[str, ...] = ()) -> None:
        asked = Asked("module:function", {}, {}, kept)
        self.run.write_asked(stage, asked)
        self.run.write_manifest(stage, Manifest(asked, "id", metrics or {}))

    def sampled(self, stage: str, policy: str, right: str, samples: int = 2) -> None:
        """`right` has a letter a trace, problem by problem: `+` right, `-` wrong, `?` states nothing, `c` cut."""
        traces, verdicts = [], []
        for place, letter in enumerate(right):
            problem, index = self.problems[place // samples], place % samples
            trace, verdict = self._trace(problem, policy, index, letter)
            traces.append(trace)
            verdicts.append(verdict)
        write_jsonl(self.folder(stage) / "traces.jsonl", traces)
        write_jsonl(self.folder(f"{stage}-verdicts") / "verdicts.jsonl", verdicts)
        self.finish(stage)
        self.finish(f"{stage}-verdicts")
        self.traces[stage] = traces

    def _trace(self, problem: Problem, policy: str, index: int, letter: str) -> tuple[Trace, Verdict]:
        answer = problem.answer if letter == "+" else "99"
        end = "" if letter in "?c" else f" The answer is {answer}."
        text = self.write(f"{policy} thinks about it, try {index}.{end}")
        cut = FinishReason.LENGTH if letter == "c" else FinishReason.STOP
        trace_id = Trace.make_id(policy, problem.id, index, text, cut)
        trace = Trace(trace_id, problem.id, policy, index, text, cut, 10, len(text.split()))
        outcome = dict(
            zip("+-?c", (Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TRUNCATED), strict=True)
        )
        read = self.write(answer) if letter in "+-" else None
        reason = f'states "The answer is {answer}"' if read else "states no answer"
        return trace, Verdict(trace_id, outcome[letter], read, self.write(reason))

    def evaluated(self, stage: str, policy: str, right: str) -> None:
        """Answers to the test problems, as in `sampled`."""
        both = [self._trace(problem, policy, 0, letter) for problem, letter in zip(self.tests, right, strict=True)]
        folder = self.folder(stage)
        write_jsonl(folder / "traces.jsonl", [trace for trace, _ in both])
        write_jsonl(folder / "verdicts.jsonl", [verdict for _, verdict in both])
        answers = [
            Answer(trace.problem_id, "test", problem.answer, verdict.answer, verdict.outcome)
            for problem, (trace, verdict) in zip(self.tests, both, strict=True)
        ]
        write_jsonl(folder / "answers.jsonl", answers)
        n, correct = len(right), right.count("+")
        low, high = wilson(correct, n)
        row = {"policy": policy, "split": "test", "n": n, "correct": correct, "accuracy": correct / n}
        row |= {"low": low, "high": high, "majority": 1 / n}
        row |= {"parsed": (correct + right.count("-")) / n, "truncated": right.count("c") / n}
        (folder / "results.json").write_text(json.dumps([row]))
        self.finish(stage, {"test": row})

    def paired(self, number: int, sides: list[tuple[int, int]], dropped: list[dict]) -> None:
        """Pairs of a round: (place of the teacher's trace, place of the student's) in the order sampled."""
        rows = []
        for chosen_place, rejected_place in sides:
            chosen, rejected = self.traces["teacher"][chosen_place], self.traces["student-0"][rejected_place]
            prompt = (Message("user", "?"),)
            ids = (chosen.id, rejected.id, chosen.policy, rejected.policy)
            rows.append(Pair(chosen.problem_id, prompt, chosen.text, rejected.text, *ids))
        stage = f"round-{number}/pairs"
        write_jsonl(self.folder(stage) / "pairs.jsonl", rows)
        lines = [json.dumps({"problem_id": "", "trace_id": "", **row}) + "\n" for row in dropped]
        (self.folder(stage) / "dropped.jsonl").write_text("".join(lines))
        metrics = {"pairs": len(rows), "problems": len(self.problems), "pairs_per_problem": 1.0}
        self.finish(stage, metrics | {"rejected_policies": {"student-0": 1.0}, "sent_to_latest": 2, "fell_back": 1})

    def trained(self, stage: str, number: int, steps: int = 30, chosen: float = 0.1, margin: float = 0.5) -> None:
        """A log in which chosen log-probability and margin change by so much from begin to end, with a little noise."""
        noise = random.Random(number)
        lines = []
        for step in range(steps):
            share = step / steps
            now = -1 + chosen * share + noise.gauss(0, 0.01)
            gap = 0.2 + margin * share + noise.gauss(0, 0.01)
            row = {"step": (number - 1) * steps + step + 1, "round": number, "loss": 1 - share, "nll_loss": -now}
            row |= {"logps/chosen": now, "logps/rejected": now - gap, "rewards/accuracies": 0.5 + share / 2}
            row |= {"rejected_probability_max": 0.9, "grad_norm": 2 - share, "tokens": 100, "pairs": 4}
            lines.append(json.dumps(row) + "\n")
        (self.folder(stage) / "log.jsonl").write_text("".join(lines))
        self.finish(stage, {"steps": steps, "tokens": 100 * steps})


def whole_run(path: Path, write: Write = as_is, **config: object) -> FolderOfARun:
    """A finished run of two rounds over six problems.

    Teacher: p5 has no correct trace. Student: p4 has no wrong one. So 6 problems, 5 with a correct teacher trace, 4
    of these with a wrong one against it; p3's were alike: 3 problems in pairs.
    """
    run = FolderOfARun(path, write=write, **config)
    run.sampled("teacher", "teacher", "+++-++++++--")
    run.sampled("student-0", "student-0", "--+--?--++-c")
    run.evaluated("baseline", "student-0", "+-----")
    for number in (1, 2):
        dropped = [
            {
                "problem_id": "p3",
                "trace_id": run.traces["student-0"][6].id,
                "side": "rejected",
                "reason": "too_similar",
            },
            {"problem_id": "p4", "trace_id": run.traces["student-0"][8].id, "side": "rejected", "reason": "correct"},
            {"problem_id": "p3", "side": "problem", "reason": "no_rejected"},
            {"problem_id": "p4", "side": "problem", "reason": "no_rejected"},
            {"problem_id": "p5", "side": "problem", "reason": "no_chosen"},
        ]
        run.paired(number, [(0, 0), (1, 1), (2, 3), (4, 4)], dropped)
        run.trained(f"round-{number}/train", number)
        run.evaluated(f"round-{number}/evaluate", f"student-{number}", "+++--c" if number == 1 else "++++-?")
    run.evaluated("teacher-evaluate", "teacher", "++++++")
    run.trained("sft/train", 1, steps=60)
    run.evaluated("sft/evaluate", "sft", "+++---")
    times = {"problems": 0.1, "teacher": 12.5, "round-1/train": 130.0}
    (path / "times.json").write_text(json.dumps(times))
    return run
