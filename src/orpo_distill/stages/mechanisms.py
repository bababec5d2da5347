"""Mechanisms: what the paper claims about negatives and training, measured on the run at hand.

Sources of negatives are compared on the same problems with as many traces each (`negatives`). `mechanisms.json` has the
numbers under `measures` (docs/report.md) and the same as `tables` of text; what a run does not have stays empty, with
the reason in the table's note. Nothing that trains or evaluates reads any of it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import PositiveInt, SerializeAsAny

from orpo_distill.component import Options
from orpo_distill.config import MechanismsSection, TrainSection
from orpo_distill.likelihood import Response, mean_logps
from orpo_distill.measures import ends, falls_while_margin_grows, paired_means, thinned
from orpo_distill.negatives import Comparison, Gathered, Negative, Rules, gather
from orpo_distill.progress import say
from orpo_distill.records import INITIAL, TEACHER, Answer, Trace, read_jsonl, write_text
from orpo_distill.runs import read_manifest
from orpo_distill.stages.mechanism_tables import tables, warnings
from orpo_distill.tasks import Task

FILE = "mechanisms.json"
CURVE_POINTS = 200
Row = dict[str, Any]


class MechanismsOptions(Options):
    """What is measured, and what scoring texts with the student takes."""

    mechanisms: MechanismsSection
    task: SerializeAsAny[Task]
    model: str  # the initial student
    train: TrainSection
    rounds: PositiveInt
    seed: int


def mechanisms(options: MechanismsOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `mechanisms.json`. Inputs are the run's stages by name; evaluations are named `evaluate:POLICY`.

    Returns counts. Raises DataError for files that do not belong together, TrainingError where memory runs out.
    """
    section = options.mechanisms
    refreshed = _refreshed(options, inputs)
    found = gather(inputs, refreshed, Rules(section.traces, section.problems, options.seed))
    likelihood = list(_likelihood(options, inputs, found))
    measures = _rounded(
        {
            "negatives": list(_yields(inputs, found)),
            "diversity": list(_diversity(found)),
            "trained_on": [
                {"source": f"round {number}", "reference": "round 1", **row}
                for number, comparison in found.trained_on.items()
                for row in comparison.rows()
            ],
            "likelihood": likelihood,
            "training": list(_training(inputs)),
            "curve": _curve(_log(inputs, options.rounds)),
            "texts": [*_evaluated(inputs), *_sampled(found, options.task.open_ended)],
        }
    )
    named = warnings(measures)
    content = {"tables": tables(measures, options.task.open_ended), "warnings": named, "measures": measures}
    write_text(out / FILE, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    for warning in named:
        say(f"  {warning}")
    return {"warnings": len(named), "scored_problems": max((row["problems"] for row in likelihood), default=0)}


def _refreshed(options: MechanismsOptions, inputs: Mapping[str, Path]) -> list[int]:
    """The rounds that were trained on other pairs than round 1."""
    content = {n: read_manifest(inputs[f"round-{n}/pairs"]).content for n in range(1, options.rounds + 1)}
    return [number for number in content if content[number] != content[1]]


def _round_of(stage: str) -> int:
    """The round that a source's negatives are made for."""
    return int(stage.removeprefix("round-").partition("/")[0]) if stage.startswith("round-") else 1


def _policy_of(stage: str) -> str:
    return stage if stage in (TEACHER, INITIAL) else f"student-{_round_of(stage) - 1}"


def _yields(inputs: Mapping[str, Path], found: Gathered) -> Iterator[Row]:
    """What came of each source's samples, and of the initial student's for the same problems and sample indices."""
    for stage, tally in found.samples.items():
        row = {"round": _round_of(stage), "policy": _policy_of(stage), "same_as": None, **tally.numbers()}
        if stage not in found.initial:
            yield row
            continue
        made = read_manifest(inputs[f"round-{_round_of(stage)}/pairs"]).metrics
        yield row | {key: made.get(key) for key in ("phi", "sent_to_latest", "fell_back")}
        same = {"round": _round_of(stage), "policy": INITIAL, "same_as": _policy_of(stage)}
        yield same | found.initial[stage].numbers()


def _diversity(found: Gathered) -> Iterator[Row]:
    for stage, comparison in found.sources.items():
        for row in comparison.rows():
            yield {"round": _round_of(stage), "source": _policy_of(stage), "reference": INITIAL, **row}


@dataclass(frozen=True, slots=True)
class _Scoring:
    """A problem's negatives of both sources as they are scored."""

    first: Sequence[Response]
    second: Sequence[Response]


def _likelihood(options: MechanismsOptions, inputs: Mapping[str, Path], found: Gathered) -> Iterator[Row]:
    """Log-probabilities under the student that each round begins with, of all sources that its pairs may draw from."""
    for number in range(1, options.rounds + 1):
        stages = [stage for stage in found.sources if stage == TEACHER or _round_of(stage) == number]
        scorings = {stage: _scorings(options.task, found.sources[stage]) for stage in stages}
        asked = [one for each in scorings.values() for scoring in each for one in (*scoring.first, *scoring.second)]
        if not asked:
            continue
        before = f"round-{number - 1}/train" if number > 1 else "warmup/train"
        model = str(inputs[before] / "model") if before in inputs else options.model
        student = "warmup" if before == "warmup/train" and before in inputs else f"student-{number - 1}"
        logps = mean_logps(model, asked, options.train, f"likelihood under {student}")
        for stage, each in scorings.items():
            means = [
                tuple(fmean(logps[one] for one in side) for side in (scoring.first, scoring.second))
                for scoring in each
                if all(one in logps for one in (*scoring.first, *scoring.second))
            ]
            if means:
                first, second = (list(side) for side in zip(*means, strict=True))
                who = {"round": number, "student": student, "source": _policy_of(stage)}
                traces = options.mechanisms.traces
                yield {**who, "reference": INITIAL, "traces": traces, **paired_means(first, second)}


def _scorings(task: Task, comparison: Comparison) -> list[_Scoring]:
    def responses(prompt: Any, negatives: Sequence[Negative]) -> list[Response]:
        return [Response(prompt, one.text, one.cut) for one in negatives]

    return [
        _Scoring(responses(prompt, one.first), responses(prompt, one.second))
        for one in comparison.chosen
        for prompt in [task.messages(one.problem)]
    ]


def _log(inputs: Mapping[str, Path], rounds: int) -> list[Row]:
    """The training log of all rounds, one line a step."""
    return [line for number in range(1, rounds + 1) for line in _lines(inputs[f"round-{number}/train"])]


def _lines(stage: Path) -> list[Row]:
    return [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _training(inputs: Mapping[str, Path]) -> Iterator[Row]:
    """First and last tenth of each round's steps, and of all together (round None), for the run and its control."""
    for control in (False, True):
        head = "sft/" if control else "round-"
        names = [name for name in inputs if name.endswith("/train") and name.startswith(head)]
        log = [line for name in names for line in _lines(inputs[name]) if "logps/chosen" in line]
        by_round: defaultdict[int | None, list[Row]] = defaultdict(list)
        for line in log:
            by_round[line["round"]].append(line)
        if len(by_round) > 1:
            by_round[None] = log
        for number, lines in by_round.items():
            yield {"control": control, "round": number, "steps": len(lines), **_course(lines)}


def _course(lines: Sequence[Row]) -> Row:
    """Log-probabilities of both sides, and the lead of the chosen one, at the beginning and the end of some steps."""
    chosen = ends([line["logps/chosen"] for line in lines])
    if not all("logps/rejected" in line for line in lines):
        return {"chosen": chosen, "rejected": None, "margin": None, "chosen_falls": None}
    rejected = ends([line["logps/rejected"] for line in lines])
    margin = [up - down for up, down in zip(chosen, rejected, strict=True)]
    falls = falls_while_margin_grows(chosen, rejected)
    return {"chosen": chosen, "rejected": rejected, "margin": margin, "chosen_falls": falls}


def _curve(log: Sequence[Row]) -> Row:
    """Log-probabilities by step, as means over neighbouring steps: at most 200 points."""
    names = {"step": "step", "round": "round", "chosen": "logps/chosen", "rejected": "logps/rejected"}
    present = {name: key for name, key in names.items() if log and all(key in line for line in log)}
    return {name: thinned([line[key] for line in log], CURVE_POINTS) for name, key in present.items()}


def _evaluated(inputs: Mapping[str, Path]) -> Iterator[Row]:
    """Length and form of every policy's answers, by split."""
    for key, folder in inputs.items():
        if not key.startswith("evaluate:"):
            continue
        lengths = {
            trace.problem_id: (len(trace.text.split()), trace.completion_tokens)
            for trace in read_jsonl(folder / "traces.jsonl", Trace)
        }
        splits: defaultdict[str, list[tuple[int, int | None]]] = defaultdict(list)
        for answer in read_jsonl(folder / "answers.jsonl", Answer):
            splits[answer.split].append(lengths[answer.problem_id])
        results = {row["split"]: row for row in json.loads((folder / "results.json").read_bytes())}
        for split, texts in splits.items():
            tokens = [count for _, count in texts if count is not None]
            yield {
                "where": split,
                "policy": key.partition(":")[2],
                "same_as": None,
                "texts": len(texts),
                "words": fmean(count for count, _ in texts),
                "tokens": fmean(tokens) if tokens else None,
                "parsed": results[split].get("parsed"),
                "truncated": results[split]["truncated"],
            }


def _sampled(found: Gathered, open_ended: bool) -> Iterator[Row]:
    """Length and form of what was sampled; of the initial student also for what each latest one was asked."""
    for stage, tally in found.samples.items():
        where = f"sampled for round {_round_of(stage)}"
        yield _form(where, _policy_of(stage), None, tally.numbers(), open_ended)
        if stage in found.initial:
            yield _form(where, INITIAL, _policy_of(stage), found.initial[stage].numbers(), open_ended)


def _form(where: str, policy: str, same_as: str | None, numbers: Row, open_ended: bool) -> Row:
    """A row of lengths and shares; no text of an open-ended task states an answer."""
    parsed = None if open_ended or numbers["correct"] is None else numbers["correct"] + numbers["wrong"]
    shown = {"texts": numbers["samples"], "words": numbers["words"], "tokens": numbers["tokens"]}
    who = {"where": where, "policy": policy, "same_as": same_as}
    return {**who, **shown, "parsed": parsed, "truncated": numbers["truncated"]}


def _rounded(value: Any) -> Any:
    """Plain data with six decimals, so that the last bits of sums do not show; None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
