"""Evaluate: how often a model's answers are right, by the same verifier that made the pairs.

Greedy by default. Texts are sampled resumably like every other trace; `results.json` has one row a split. Of an
open-ended task it only says how many answers there are and how many were cut: `stages.judge` compares them.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.config import VerifySection
from orpo_distill.errors import ConfigError, DataError
from orpo_distill.records import (
    Answer,
    FinishReason,
    Outcome,
    Problem,
    Trace,
    Verdict,
    derive_seed,
    read_jsonl,
    write_jsonl,
    write_text,
)
from orpo_distill.samplers import Decoding, Request, Sampler
from orpo_distill.sampling import Author, sample_traces, with_prefix
from orpo_distill.statistics import majority_rate, wilson
from orpo_distill.tasks import Task, take
from orpo_distill.verification import verify_all

Row = dict[str, Any]


class EvaluateOptions(Options):
    """What is measured: `limits` names the splits (test, validation), each with its number of problems or null for all.

    `model` None stands for the `model` folder of the input stage `model`.
    """

    task: SerializeAsAny[Task]
    sampler: SerializeAsAny[Sampler]
    decoding: Decoding
    model: str | None
    policy: str
    prefix: str = ""
    limits: dict[str, int | None]
    seed: int
    verify: VerifySection = VerifySection()
    shard: Annotated[tuple[int, int] | None, SPEED_ONLY] = None


def evaluate(options: EvaluateOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write traces, verdicts, one `Answer` a problem and `results.json`; return the rows of `results.json` by split."""
    splits = {
        split: found
        for split, limit in options.limits.items()
        if (found := take(list(read_jsonl(inputs["problems"] / f"{split}.jsonl", Problem)), limit, options.seed))
    }
    if not splits:
        raise DataError(f"expected problems in {' or '.join(options.limits)}, found none; set evaluate.test: true")
    problems = {problem.id: problem for chosen in splits.values() for problem in chosen}
    requests = [
        Request(
            problem.id,
            0,
            with_prefix(options.task.messages(problem), options.prefix),
            derive_seed(options.seed, problem.id),
        )
        for problem in problems.values()
    ]
    model = options.model or str(inputs["model"] / "model")
    sample_traces(Author(options.sampler, model, options.decoding, options.policy), requests, out, options.shard)
    if options.shard is not None:
        return {}
    traces = list(read_jsonl(out / "traces.jsonl", Trace))
    if all(trace.finish_reason is FinishReason.ERROR for trace in traces):
        raise DataError(
            f"expected answers of {options.policy}, found that all {len(traces)} samples failed, the first: "
            f"{traces[0].error}; a recorded teacher has no texts for test problems: set evaluate.teacher: false"
        )
    verifier = options.task.judge()
    pairs = ((problems[trace.problem_id], trace) for trace in traces)
    verdicts = dict(
        zip(
            (trace.problem_id for trace in traces),
            verify_all(verifier, pairs, options.verify.timeout, options.verify.processes),
            strict=True,
        )
    )
    write_jsonl(out / "verdicts.jsonl", verdicts.values())
    write_jsonl(out / "answers.jsonl", _answers(splits, verdicts))
    row = _open_row if verifier.open_ended else _row
    rows = [row(options.policy, split, chosen, verdicts) for split, chosen in splits.items()]
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    return {row["split"]: row for row in rows}


def _answers(splits: Mapping[str, Sequence[Problem]], verdicts: Mapping[str, Verdict]) -> Iterator[Answer]:
    for split, problems in splits.items():
        for problem in problems:
            verdict = verdicts[problem.id]
            yield Answer(problem.id, split, problem.answer, verdict.answer, verdict.outcome)


def _row(policy: str, split: str, problems: Sequence[Problem], verdicts: Mapping[str, Verdict]) -> Row:
    outcomes = Counter(verdicts[problem.id].outcome for problem in problems)
    n, correct = len(problems), outcomes[Outcome.CORRECT]
    low, high = wilson(correct, n)
    return {
        "policy": policy,
        "split": split,
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "parsed": (correct + outcomes[Outcome.WRONG]) / n,
        "truncated": outcomes[Outcome.TRUNCATED] / n,
        "majority": majority_rate([problem.answer for problem in problems]),
        "outcomes": {outcome.value: outcomes[outcome] for outcome in Outcome},
    }


def _open_row(policy: str, split: str, problems: Sequence[Problem], verdicts: Mapping[str, Verdict]) -> Row:
    cut = sum(verdicts[problem.id].outcome is Outcome.TRUNCATED for problem in problems)
    n = len(problems)
    return {"policy": policy, "split": split, "n": n, "accuracy": None, "truncated": cut / n}


def evaluate_model(model: str, task: Task, sampler: Sampler, decoding: Decoding, split: str, limit: int | None) -> Row:
    """Measure one model outside of a run: the row of `results.json`. Raises ConfigError, DataError, ModelError."""
    if task.open_ended:
        raise ConfigError(
            "expected a task with gold answers, found an open-ended one: its answers are only measured against others, "
            "by the judge of a run"
        )
    name = "validation" if split == "validation" else "test"
    options = EvaluateOptions(
        task=task, sampler=sampler, decoding=decoding, model=model, policy=model, limits={name: limit}, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        problems = task.load(split)
        if not problems:
            raise DataError(f"expected at least one problem in split {split!r}, found none; name another with --split")
        write_jsonl(out / f"{name}.jsonl", problems)
        row: Row = evaluate(options, {"problems": out}, out)[name]
    return {**row, "split": split}
