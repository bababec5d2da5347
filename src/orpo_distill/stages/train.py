"""Train the student for one round, or for several on the same pairs.

A round is an epoch. All rounds together are one run of rounds x steps-per-round optimizer steps with one learning-rate
schedule: each train stage goes on from the previous one's last checkpoint (weights, optimizer, schedule, step count).

out/model        the trained student, an ordinary Hugging Face folder (LoRA: the adapter's)
out/checkpoint   what the next round goes on from
out/log.jsonl    one line a step
out/train.json   the stage's metrics
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import PositiveInt, SerializeAsAny, model_validator

from orpo_distill.checkpoints import FINAL, MODEL, is_whole, newest, publish, step_of, sweep
from orpo_distill.component import Options, type_name
from orpo_distill.config import TrainSection
from orpo_distill.errors import ConfigError, RunError, missing_extra
from orpo_distill.given import read_given
from orpo_distill.groups import Row, default_steps, schedule, tokenize
from orpo_distill.interrupt import deferred
from orpo_distill.models import begin_from, load_model, load_tokenizer, pick_device
from orpo_distill.objectives import Objective
from orpo_distill.progress import progress, say
from orpo_distill.records import Pair, read_jsonl, write_text
from orpo_distill.samplers.hf import context_length
from orpo_distill.teaching import Teacher, TeacherOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from orpo_distill.trainer import Course

FINAL_STEPS = 10  # the metrics of this many last steps are averaged


class TrainOptions(Options):
    """What a train stage does. Rounds count from 1; `rounds` is the whole run's number."""

    model: str  # the initial student
    train: TrainSection
    objective: SerializeAsAny[Objective]
    rounds: PositiveInt
    first_round: PositiveInt
    last_round: PositiveInt
    seed: int
    teacher: TeacherOptions | None = None  # for objectives that require its distribution

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.first_round <= self.last_round <= self.rounds:
            raise ValueError(
                f"expected first_round <= last_round <= rounds, found {self.first_round}, {self.last_round} and "
                f"{self.rounds}"
            )
        return self


def train(options: TrainOptions, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Train on inputs["pairs"]/pairs.jsonl, going on from inputs["previous"] after round 1. Returns the metrics.

    Round 1 starts from the model of inputs["start"], if there is one (a warm-up), else from the initial student. What
    other models gave the traces stands in inputs["reference-scores"] and inputs["teacher-scores"].

    Raises DataError for rows that cannot be trained on, TrainingError where the loss is not finite or memory runs out,
    RunError for a checkpoint that is damaged or cannot be written, Interrupted after a signal.
    """
    previous = inputs.get("previous")
    if not (out / MODEL).is_dir():
        _train(options, inputs, out)
    before = previous or inputs.get("start")
    if before is not None and options.train.keep == "last" and _is_main_process():
        shutil.rmtree(before / FINAL, ignore_errors=True)
    metrics: dict[str, Any] = json.loads((out / "train.json").read_bytes())
    return metrics


def _train(options: TrainOptions, inputs: Mapping[str, Path], out: Path) -> None:
    previous = inputs.get("previous")
    tokenizer = load_tokenizer(options.model, options.train.trust_remote_code)
    with_rejected = "rejected" in options.objective.requires
    pairs = read_jsonl(inputs["pairs"] / "pairs.jsonl", Pair)
    rows = tokenize(pairs, tokenizer, options.train.max_length, with_rejected)
    course, counts = _course(options, rows, _steps_per_round(options, len(rows), previous), out)
    course = replace(course, given=read_given(options.objective.requires, inputs, rows))
    args = _arguments(options, course, out)
    if args.process_index == 0:
        sweep(out, keep=2)
    args.distributed_state.wait_for_everyone()
    start = newest(out) or _previous_checkpoint(options, course, previous)
    done = step_of(start) if start else 0
    args.distributed_state.wait_for_everyone()  # before anything in the folder moves again
    if done < course.last_step:
        course = replace(course, teacher=_teacher(options, rows, tokenizer))
        model = student_to_train(options.model, options.train, args.seed)
        if start is None and "start" in inputs:
            begin_from(model, inputs["start"] / MODEL)
        _run(options, model, course, args, start, tokenizer)
    if args.process_index == 0:
        write_text(out / "train.json", json.dumps(_metrics(course, counts), indent=1))
        sweep(out, keep=1)
        publish(_found(newest(out)), out)
    args.distributed_state.wait_for_everyone()


def _run(
    options: TrainOptions, model: Any, course: Course, args: TrainingArguments, start: Path | None, tokenizer: Any
) -> None:
    """Train from a checkpoint, or from the model as it is, to the end of the course and save it there."""
    from orpo_distill.steps import cut_log
    from orpo_distill.trainer import Watch, run

    done = step_of(start) - course.first_step if start else 0
    if args.process_index == 0:
        cut_log(course.log, course.first_step + done)
    longest, limit = max(row.length for step in course.steps for row in step), context_length(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"expected train.max_length of at most the student's context, {limit} tokens, found a row of {longest}"
        )
    with progress(label_of(options), len(course.steps), done) as advance, deferred() as stop:
        watch = Watch(stop, options.train.checkpoint_minutes, advance)
        run(model, tokenizer, args, course, watch, start)


def _teacher(options: TrainOptions, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    if options.teacher is None:
        return None
    teacher = Teacher(options.teacher, options.objective, tokenizer, rows)
    for reason in teacher.reasons if _is_main_process() else ():
        say(f"  the teacher: {reason}; reading with it is slower and larger")
    return teacher


def label_of(options: TrainOptions) -> str:
    """What is said of a stage while it works. Several rounds at once are the control's epochs."""
    if options.first_round == options.last_round:
        return f"train round {options.first_round}"
    return f"train {type_name(type(options.objective))}, {options.last_round - options.first_round + 1} epochs"


def _course(
    options: TrainOptions, rows: Sequence[Row], steps_per_round: int, out: Path
) -> tuple[Course, dict[str, int]]:
    """The rows of every step of the stage, and how many rows that repeats and leaves out."""
    from orpo_distill.trainer import Course

    problem_ids = [row.pair.problem_id for row in rows]
    rounds = [
        schedule(problem_ids, steps_per_round, options.train.pairs_per_step, options.seed, number)
        for number in range(options.first_round, options.last_round + 1)
    ]
    course = Course(
        steps=[[rows[index] for index in step] for each in rounds for step in each.steps],
        first_step=(options.first_round - 1) * steps_per_round,
        steps_per_round=steps_per_round,
        objective=options.objective,
        tokens_per_batch=options.train.tokens_per_batch,
        log=out / "log.jsonl",
    )
    counts = {
        "rows": len(rows),
        "groups": len({row.prompt for row in rows}),
        "rows_repeated": sum(each.repeated for each in rounds),
        "rows_left_out": sum(each.left_out for each in rounds),
    }
    return course, counts


def _steps_per_round(options: TrainOptions, rows: int, previous: Path | None) -> int:
    """Set, or what the first round's rows gave."""
    if options.train.steps_per_round is not None:
        return options.train.steps_per_round
    if options.first_round == 1:
        return default_steps(rows, options.train.pairs_per_step)
    try:
        return int(json.loads((_found(previous) / "train.json").read_bytes())["steps_per_round"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"expected the number of steps per round in {previous}/train.json, found: {error}; train the rounds before "
            "again, or set train.steps_per_round"
        ) from error


def _previous_checkpoint(options: TrainOptions, course: Course, previous: Path | None) -> Path | None:
    """The checkpoint that the round before ended with; None in round 1."""
    if options.first_round == 1:
        return None
    folder = _found(previous) / FINAL
    if not is_whole(folder):
        raise RunError(
            f"expected the last checkpoint of round {options.first_round - 1} in {folder}, found none that is whole; "
            "train that round again (train.keep: last deletes it once the next round is done; train.keep: all keeps it)"
        )
    if (steps := step_of(folder)) != course.first_step:
        raise RunError(
            f"expected {course.first_step} steps of training in {folder}, found {steps}; train the rounds before again"
        )
    return folder


def _arguments(options: TrainOptions, course: Course, out: Path) -> TrainingArguments:
    """The settings in transformers' words. Starts the process group under `accelerate launch`."""
    from transformers import TrainingArguments

    _whole_parameters()
    section = options.train
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # accelerate launch --cpu
    schedule_type = "constant_with_warmup" if section.schedule == "constant" else section.schedule
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        num_train_epochs=options.rounds,
        learning_rate=section.learning_rate,
        lr_scheduler_type=schedule_type,
        warmup_steps=math.ceil(section.warmup_ratio * course.steps_per_round * options.rounds),
        weight_decay=section.weight_decay,
        adam_beta2=section.adam_beta2,
        max_grad_norm=section.max_grad_norm,
        bf16=section.autocast,
        use_cpu=asked_for_cpu or pick_device() == "cpu",
        activation_checkpointing=section.gradient_checkpointing,
        use_cache=True,  # of the saved configuration; scoring asks for none
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        report_to=list(section.report_to) or "none",
        save_strategy="no",  # the trainer's own callback says when
        seed=options.seed % 2**32,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one device; `accelerate launch` starts more
    return args


def _whole_parameters() -> None:
    """Raise ConfigError where accelerate is set to spread a model's parameters over processes."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            raise ConfigError(
                f"expected whole parameters on every process, found ACCELERATE_USE_{name} set (by accelerate's "
                "configuration?); training with sharded parameters is not offered: run `accelerate config` for plain "
                "multi-GPU, or train adapters (train.lora) where the student does not fit one device"
            )


def student_to_train(model: str, train: TrainSection, seed: int) -> Any:
    """The initial student on the CPU, with fresh adapters for LoRA. A checkpoint's weights are loaded over it."""
    loaded = load_model(model, train.dtype, "cpu", train.trust_remote_code)
    if (lora := train.lora) is None:
        return loaded
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_extra("peft", "lora") from error
    from transformers import set_seed

    set_seed(seed)
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with (
        warnings.catch_warnings(),
        _lora_errors_explained(),
    ):  # peft 0.21 asks by a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(loaded, config)


@contextmanager
def _lora_errors_explained() -> Iterator[None]:
    try:
        yield
    except (ValueError, re.error) as error:
        raise ConfigError(f"expected settings in train.lora that fit the student, found: {error}") from error


def _metrics(course: Course, counts: Mapping[str, int]) -> dict[str, Any]:
    """What the stage did, read from its log: counts over all steps, and the mean of the last steps' losses."""
    from orpo_distill.steps import COUNTS

    lines = [json.loads(line) for line in course.log.read_text(encoding="utf-8").splitlines()]
    last = lines[-FINAL_STEPS:]
    metrics: dict[str, Any] = {
        "steps": len(course.steps),
        "steps_per_round": course.steps_per_round,
        **counts,
        **{name: sum(line[name] for line in lines) for name in COUNTS if name in lines[-1]},
        "rejected_probability_max": max(line["rejected_probability_max"] for line in lines),
    }
    if "clamped" in lines[-1]:
        metrics["clamped"] = round(sum(line["clamped"] * line["pairs"] for line in lines))
    own = {"step", "round", "grad_norm", "learning_rate", "clamped", *metrics}
    means = {name: sum(line[name] for line in last) / len(last) for name in last[-1] if name not in own}
    return {**metrics, **means}


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _found(path: Path | None) -> Path:
    """The path, which must be there by now."""
    if path is None:
        raise RunError("expected the folder of the round before and its checkpoint, found none; train it first")
    return path
