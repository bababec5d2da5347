"""Stages that some methods add to the plan: scores of given texts before a round, extrapolation after the last one."""

from __future__ import annotations

from orpo_distill.config import Config
from orpo_distill.runs import Stage
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.stages.extrapolate import ChooseOptions, ExtrapolateOptions
from orpo_distill.stages.score import ScoreOptions

CHOSEN = "extrapolate/chosen"


def score_stages(config: Config, number: int) -> list[Stage]:
    """What makes the scores that the objective requires of the traces of round `number`'s pairs."""
    wanted = []
    if "reference_scores" in config.objective.requires:
        wanted.append(_reference(config, number))
    if "teacher_scores" in config.objective.requires:
        wanted.append(_teacher(config, number))
    return wanted


def _reference(config: Config, number: int) -> Stage:
    """By the student that round 1 starts from, or that this round starts from."""
    train, latest = config.train, config.objective.reference_policy == "latest" and number > 1
    source = f"round-{number - 1}/train" if latest else "warmup/train" if config.warmup else None
    options = ScoreOptions(
        model=None if source else config.student.model,
        policy=f"student-{number - 1}" if latest else "warmup" if source else "student-0",
        student=config.student.model,
        student_trust_remote_code=train.trust_remote_code,
        dtype=train.dtype,
        autocast=train.autocast,
        trust_remote_code=train.trust_remote_code,
        tokens_per_batch=train.tokens_per_batch,
    )
    inputs = {"model": source} if source else {}
    return _score(f"round-{number}/reference-scores", options, inputs, None if latest else number - 1)


def _teacher(config: Config, number: int) -> Stage:
    """By the teacher, behind the prompt that it was asked with."""
    sampler, scorer = config.teacher.sampler, config.teacher.scored_by
    own = sampler if isinstance(sampler, HF | VLLM) else None
    options = ScoreOptions(
        model=scorer,
        policy="teacher",
        prefix=config.teacher.instruction,
        student=config.student.model,
        student_trust_remote_code=config.train.trust_remote_code,
        dtype=own.dtype if own else "auto",
        trust_remote_code=own.trust_remote_code if own else config.train.trust_remote_code,
        tokens_per_batch=config.train.tokens_per_batch,
    )
    return _score(f"round-{number}/teacher-scores", options, {}, number - 1)


def _score(name: str, options: ScoreOptions, inputs: dict[str, str], before: int | None) -> Stage:
    """With the scores of the round `before`, if there was one: they are taken over."""
    head, _, kind = name.partition("/")
    inputs = {"pairs": f"{head}/pairs", **inputs}
    if before:
        inputs["previous"] = f"round-{before}/{kind}"
    return Stage(
        name,
        "orpo_distill.stages.score:score",
        options,
        inputs,
        outputs=("scores.jsonl",),
        grows=frozenset({"inputs.pairs", "inputs.previous"}),
    )


def policy_of(config: Config, alpha: float) -> str:
    """The name of the last student, moved on by alpha."""
    return f"student-{config.rounds}" + (f"+{alpha:g}" if alpha else "")


def folder_of(alpha: float) -> str:
    """The folder of the student that was moved on by alpha."""
    return f"extrapolate/{alpha:g}"


def extrapolated(config: Config, alpha: float) -> Stage:
    """The last student, moved on by alpha away from where it started."""
    section, inputs = config.extrapolate, {"model": f"round-{config.rounds}/train"}
    assert section is not None
    if section.origin == "warmup":
        inputs["origin"] = "warmup/train"
    options = ExtrapolateOptions(
        alpha=alpha,
        initial=config.student.model,
        dtype=config.train.dtype,
        trust_remote_code=config.train.trust_remote_code,
    )
    work = "orpo_distill.stages.extrapolate:extrapolate"
    return Stage(f"{folder_of(alpha)}/train", work, options, inputs, outputs=("model",))


def chosen(config: Config) -> Stage:
    """The alpha that is best on validation, and its model."""
    section = config.extrapolate
    assert section is not None
    last = f"round-{config.rounds}"
    inputs: dict[str, str] = {}
    for alpha in section.alpha:
        folder = folder_of(alpha) if alpha else last
        inputs |= {f"model:{alpha:g}": f"{folder}/train", f"evaluate:{alpha:g}": f"{folder}/evaluate"}
    options = ChooseOptions(alpha=section.alpha, policies=tuple(policy_of(config, alpha) for alpha in section.alpha))
    return Stage(CHOSEN, "orpo_distill.stages.extrapolate:choose", options, inputs, outputs=("model", "choice.json"))
