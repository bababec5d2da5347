"""Stages that some methods add to the plan: scores of given texts before a round, extrapolation after the last one."""

from __future__ import annotations

from orpo_distill.config import Config
from orpo_distill.runs import Stage
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.stages.extrapolate import ChooseOptions, ExtrapolateOptions
from orpo_distill.stages.score import ScoreOptions
from orpo_distill.stages.scorer import ScorerOptions, ScoreServer

CHOSEN = "extrapolate/chosen"
SCORER = "teacher-scorer"
# Options of a sampler that only writing reads, not scoring.
WRITING = tuple(f"server.sampler.{name}" for name in ("api", "tokenizer", "thinking", "length_field"))


def scorer_stages(config: Config) -> list[Stage]:
    """What finds out whether the teacher's server can score, where the objective requires that it does."""
    server = _server(config)
    if server is None or "teacher_scores" not in config.objective.requires:
        return []
    tokenizer, trusted = config.teacher.scored_by or "", config.train.trust_remote_code
    options = ScorerOptions(server=server, tokenizer=tokenizer, trust_remote_code=trusted)
    work = "orpo_distill.stages.scorer:scorer"
    return [Stage(SCORER, work, options, outputs=("scorer.json",), ignores=WRITING)]


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
    sampler, server = config.teacher.sampler, _server(config)
    own = sampler if isinstance(sampler, HF | VLLM) else None
    options = ScoreOptions(
        model=config.teacher.scored_by,
        server=server,
        policy="teacher",
        prefix=config.teacher.instruction,
        student=config.student.model,
        student_trust_remote_code=config.train.trust_remote_code,
        dtype=own.dtype if own else "auto",
        trust_remote_code=own.trust_remote_code if own else config.train.trust_remote_code,
        tokens_per_batch=config.train.tokens_per_batch,
    )
    return _score(f"round-{number}/teacher-scores", options, {"scorer": SCORER} if server else {}, number - 1)


def _server(config: Config) -> ScoreServer | None:
    """The teacher's server, if that scores."""
    teacher = config.teacher
    if teacher.scoring == "local":
        return None
    sampler = teacher.sampler.for_run(config.name, config.ledger)
    return ScoreServer(sampler=sampler, model=teacher.model, way=teacher.scoring)


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
        ignores=WRITING,
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
