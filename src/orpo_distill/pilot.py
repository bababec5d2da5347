"""A pilot: the real pipeline up to pairs on a few problems, and what that foretells for the whole.

It runs in the experiment's own run folder with a smaller `problems.limit`; the full run then only adds problems, so
nothing that the pilot sampled is sampled (or paid for) again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo_distill.additions import teacher_in_training
from orpo_distill.ahead import check_ahead
from orpo_distill.config import Config
from orpo_distill.experiment import run
from orpo_distill.given import SOURCES, nothing_known, with_given
from orpo_distill.groups import Row, default_steps, tokenize
from orpo_distill.mixing import foreseen_phi
from orpo_distill.models import load_tokenizer, pick_device
from orpo_distill.packing import collate, micro_batches, packed_tokens, padded_tokens
from orpo_distill.plan import plan
from orpo_distill.progress import say
from orpo_distill.records import Pair, read_jsonl
from orpo_distill.runs import RunFolder, read_manifest
from orpo_distill.stages.train import student_to_train
from orpo_distill.teaching import Teacher

MOST_TIMED = 4  # micro-batches


def pilot(config: Config, count: int, redo: Sequence[str] = (), keep: Sequence[str] = ()) -> str:
    """Run up to round 1's pairs on `count` problems, for what can go on from there. Returns the forecast in words."""
    check_ahead(plan(config))
    limit = config.problems.limit
    problems = config.problems.model_copy(update={"limit": _pilot_limit(config, count)})
    folder = run(config.model_copy(update={"problems": problems}), "round-1/pairs", redo, keep)
    counted = read_manifest(folder / "problems").metrics
    pairs = read_manifest(folder / "round-1" / "pairs").metrics
    taken, available = counted["train"], counted["train_available"]
    whole = min(limit or available, available)
    seconds = json.loads((folder / "times.json").read_bytes())
    texts = [name for name in ("teacher", "student-0") if (folder / name).exists()]
    traces = sum(read_manifest(folder / name).metrics["traces"] for name in texts)
    paired = pairs["paired_problems"]
    stages = [f"{name}{part}" for name in texts for part in ("", "-verdicts")] + ["round-1/pairs"] * bool(config.judge)
    making = sum(seconds.get(stage, 0.0) for stage in stages) * whole / taken
    phis = [foreseen_phi(config.pairs.phi, number, config.rounds) for number in range(1, config.rounds + 1)]
    refreshing = seconds.get("student-0", 0.0) * whole / taken * sum(phis)
    rows = pairs["pairs"] * whole // taken
    steps = config.train.steps_per_round or default_steps(rows, config.train.pairs_per_step)
    say("timing a training step ...")
    training = (
        config.rounds * steps * config.train.pairs_per_step * seconds_a_pair(config, folder / "round-1" / "pairs")
    )
    return "\n".join(
        [
            f"problems: {taken} of {whole}",
            f"with both sides: {paired} ({paired / taken:.0%})",
            f"pairs: {pairs['pairs']}, traces sampled for each pair: {traces / max(1, pairs['pairs']):.1f}",
            f"time for all {whole} problems on one device: {_minutes(making)} for sampling, verifying and pairing, "
            f"{_minutes(refreshing)} for refreshing negatives, {_minutes(training)} for training "
            f"({config.rounds} x {steps} steps); {_others(config)} not counted",
        ]
    )


def _pilot_limit(config: Config, count: int) -> int | None:
    """`count` problems, or all that the config allows or the run already has, if these are fewer or more."""
    asked = RunFolder(config.run_dir).asked("problems")
    standing = asked.options.get("problems.limit") if asked else 0
    if standing is None or standing >= count:
        return standing
    return min(count, config.problems.limit) if config.problems.limit else count


def seconds_a_pair(config: Config, pairs: Path) -> float:
    """Seconds that forward and backward take for a pair, over a few micro-batches after one to warm up."""
    import torch

    from orpo_distill.scoring import prepare, score

    train, objective = config.train, config.objective
    device = pick_device()
    tokenizer = load_tokenizer(config.student.model, train.trust_remote_code)
    model: Any = student_to_train(config.student.model, train, config.seed % 2**32).to(device)
    needs_rejected = "rejected" in objective.requires
    rows = tokenize(read_jsonl(pairs / "pairs.jsonl", Pair), tokenizer, train.max_length, needs_rejected)
    route = prepare(model, rows[:1], train.gradient_checkpointing)
    size = packed_tokens if route.groups else padded_tokens
    autocast = torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=train.autocast)
    model.train()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    steps = (rows[start : start + train.pairs_per_step] for start in range(0, len(rows), train.pairs_per_step))
    batches = itertools.chain.from_iterable(micro_batches(step, train.tokens_per_batch, size=size) for step in steps)
    timed = list(itertools.islice(batches, MOST_TIMED))
    given = nothing_known(objective.requires, rows)
    options = teacher_in_training(config, objective)
    teacher = Teacher(options, objective, tokenizer, rows) if options else None

    def work(rows: Sequence[Row]) -> None:
        batch = collate(rows, objective.scores_prompt, device)
        with autocast:
            scored = score(model, batch, 1.0, teacher.read(rows, batch) if teacher else None)
            loss: Any = objective(with_given(scored, rows, given)).per_pair.sum()
        loss.backward()
        loss.item()  # waits for the device

    work(timed[0])
    started = time.monotonic()
    for batch in timed:
        work(batch)
    return (time.monotonic() - started) / sum(map(len, timed))


def _others(config: Config) -> str:
    """What the forecast leaves out."""
    left_out = {
        "warm-up": config.warmup is not None,
        "scores of given texts": config.objective.requires & SOURCES.keys(),
        "texts written in training": config.objective.writing is not None,
    }
    return ", ".join(["evaluation", *(name for name, is_so in left_out.items() if is_so)]) + " and loading"


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
