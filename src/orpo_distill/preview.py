"""What a config will do, before it does it: the plan with its sizes, rendered prompts, and one training row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orpo_distill.ahead import check_ahead
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, MissingVariable, OrpoDistillError
from orpo_distill.mixing import phi_of_round
from orpo_distill.models import checkpoint_folder
from orpo_distill.plan import plan
from orpo_distill.records import Problem, read_jsonl
from orpo_distill.runs import Stage
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.sampling import with_prefix
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.judge import JudgeAnswersOptions
from orpo_distill.stages.problems import ProblemsOptions, said_dropped
from orpo_distill.stages.problems import problems as make_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Table = list[tuple[str, ...]]
A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """How many problems there are to train and to test on (None: all of a data set on the hub), and were left out."""

    train: int | None
    test: int | None
    validation: int | None
    dropped: str = ""  # in words


def plan_table(config: Config) -> tuple[Table, list[str]]:
    """Stages with their sizes. Loads a local data set, but no model. Raises ConfigError with every problem found.

    Variables that the environment lacks, such as keys, are no such problem: they come behind the table, in words.
    """
    missing: list[str] = []
    counts = _checked_counts(config, missing)
    table: Table = [("stage", "size"), *((stage.name, _size(stage, config, counts)) for stage in plan(config))]
    return table, list(dict.fromkeys(missing))


def rendered(config: Config, count: int) -> str:
    """`count` prompts as teacher and student read them, and one training row with its masked part marked.

    Loads the tokenizers of local and hub checkpoints (not the models). The row's response is a stand-in that only
    states the gold answer, because no trace exists yet.
    """
    from orpo_distill.models import load_tokenizer
    from orpo_distill.samplers.prompts import render

    problems = _made(config)[1][:count]
    student = load_tokenizer(config.student.model, config.train.trust_remote_code)
    teacher: PreTrainedTokenizerBase | None = None
    if isinstance(config.teacher.sampler, HF | VLLM):
        teacher = load_tokenizer(config.teacher.model, config.teacher.sampler.trust_remote_code)
    parts = []
    for problem in problems:
        messages = config.task.messages(problem)
        asked = with_prefix(messages, config.teacher.instruction)
        text = render(teacher, asked) if teacher else "\n".join(f"[{m.role}] {m.content}" for m in asked)
        parts += [f"--- teacher, {problem.id}", text, f"--- student, {problem.id}", render(student, messages)]
    if config.judge:
        parts += [f"--- judge, {problems[0].id}", config.judge.asks(problems[0].question, "(a text)", "(another)")]
    return "\n".join([*parts, *_training_row(config, problems[0], student)])


def _training_row(config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from orpo_distill.groups import encode_responses
    from orpo_distill.samplers.prompts import encode_prompt

    prompt = encode_prompt(tokenizer, config.task.messages(problem))
    stated = f"... The answer is {problem.answer}." if problem.answer else "..."
    ids = encode_responses([(stated, False)], tokenizer)[stated, False]
    return [
        f"--- training row: {len(prompt)} masked tokens between [[ and ]], then {len(ids)} trained ones",
        f"[[{tokenizer.decode(prompt)}]]{tokenizer.decode(list(ids))}",
    ]


def _checked_counts(config: Config, missing: list[str]) -> Counts:
    problems: list[str] = []

    def attempt(check: Callable[[A], T], argument: A, where: str) -> T | None:
        try:
            return check(argument)
        except MissingVariable as error:
            missing.append(str(error))
            return None
        except OrpoDistillError as error:
            problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            return None

    if isinstance(config.teacher.sampler, HF | VLLM):
        attempt(checkpoint_folder, config.teacher.model, "teacher.model")
    if config.teacher.scorer is not None:
        attempt(checkpoint_folder, config.teacher.scorer, "teacher.scorer")
    attempt(checkpoint_folder, config.student.model, "student.model")
    samplers = {"teacher": config.teacher.sampler, "student": config.student.sampler}
    if config.judge is not None:
        samplers["judge"] = config.judge.sampler
        if isinstance(config.judge.sampler, HF | VLLM):
            attempt(checkpoint_folder, config.judge.model, "judge.model")
    for role, sampler in samplers.items():
        attempt(type(sampler).check, sampler, f"{role}.sampler")
    if not problems:
        attempt(check_ahead, plan(config), "")
    counts = None
    if getattr(config.task, "path", None) is not None:
        counts = attempt(lambda config: _made(config)[0], config, "task")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if counts is None:
        return Counts(config.problems.limit, config.evaluate.limit, config.evaluate.validation_limit)
    test, validation = (
        _capped(counts[split], limit)
        for split, limit in (("test", config.evaluate.limit), ("validation", config.evaluate.validation_limit))
    )
    return Counts(counts["train"], test, validation, said_dropped(counts["dropped"]))


def _made(config: Config) -> tuple[dict[str, Any], list[Problem]]:
    """What the problems stage will count, and the train problems, from making its files in passing."""
    options = ProblemsOptions(task=config.task, problems=config.problems)
    with tempfile.TemporaryDirectory() as folder:
        counts = make_problems(options, {}, Path(folder))
        return counts, list(read_jsonl(Path(folder) / "problems.jsonl", Problem))


def _capped(found: int, limit: int | None) -> int:
    return found if limit is None else min(found, limit)


def _size(stage: Stage, config: Config, counts: Counts) -> str:
    """A stage's size in words; sizes that depend on what models write are upper bounds."""
    train, test = counts.train, counts.test
    number = int(stage.name.split("/")[0].removeprefix("round-")) if stage.name.startswith("round-") else 0
    kind = stage.work.partition(":")[2]
    if kind == "score":
        return f"at most {_times(train, config.pairs.per_problem * 2)} texts, those of earlier rounds left out"
    if kind == "scorer":
        return "one text, to find out whether the server scores"
    if kind == "problems":
        dropped = f", {counts.dropped}" if counts.dropped else ""
        return f"{_times(train, 1)} to train on, {_times(test, 1)} to test on{dropped}"
    if kind in ("sample", "verify"):
        role = config.teacher if stage.name.startswith("teacher") else config.student
        known = phi_of_round(config.pairs.phi, number, config.rounds) if number else 1.0
        share = 1.0 if known is None else known
        about = "at most " if known is None else "" if share == 1 else "about "
        most = config.teacher.max_samples if stage.name.startswith("teacher") else None
        about = f"{_times(train, role.samples)} to " if most else about
        traces = f"{about}{_times(train, (most or role.samples) * share)} traces"
        return f"{traces} of at most {role.decoding.max_new_tokens} tokens" if kind == "sample" else traces
    if kind == "phi":
        return f"by what the negatives of round {number - 1} are worth"
    if kind == "pair":
        return f"at most {_times(train, config.pairs.per_problem)} pairs"
    if kind == "train":
        rounds = config.rounds if stage.name.startswith("sft") else 1
        steps = config.train.steps_per_round
        if config.warmup and stage.name == "warmup/train":
            rounds, steps = config.warmup.epochs, None
        if steps is None and train is not None:
            return f"at most {rounds * ceil(train * config.pairs.per_problem / config.train.pairs_per_step)} steps"
        return f"{rounds * steps} steps" if steps else "steps as round 1's pairs give"
    if kind == "mechanisms":
        return f"negatives of at most {config.mechanisms.problems} problems scored a round"
    if isinstance(stage.options, EvaluateOptions):
        measured = {"test": test, "validation": counts.validation}
        there = [split for split in stage.options.limits if measured[split] != 0]
        return " and ".join(f"{_times(measured[split], 1)} answers on {split}" for split in there)
    if kind == "judge_pairs":
        return f"at most {_times(train, config.pairs.per_problem)} pairs judged, each in both orders"
    if isinstance(stage.options, JudgeAnswersOptions):
        return f"{_times(test, len(stage.options.against))} pairs of answers judged, each in both orders"
    return ""


def _times(count: int | None, factor: float) -> str:
    if count is None:
        return "all" if factor == 1 else f"all problems x {factor:g}"
    return f"{count * factor:.0f}"
