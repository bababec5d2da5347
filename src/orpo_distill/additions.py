"""Stages that some methods add to the plan: an adaptive phi, a judge's pairs and scores of given texts before a round,
extrapolation after the last one, win rates at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orpo_distill.config import Config
from orpo_distill.judging import Judge
from orpo_distill.mixing import PHI_FILE, AdaptivePhi
from orpo_distill.objectives import Objective
from orpo_distill.runs import Stage
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.extrapolate import ChooseOptions, ExtrapolateOptions
from orpo_distill.stages.judge import WIN_RATES, JudgeAnswersOptions, JudgePairsOptions
from orpo_distill.stages.phi import PhiOptions
from orpo_distill.stages.score import ScoreOptions
from orpo_distill.stages.scorer import ScorerOptions, ScoreServer
from orpo_distill.teaching import TeacherOptions

CHOSEN = "extrapolate/chosen"
SCORER = "teacher-scorer"
# Options of a sampler that only writing reads, not scoring.
WRITING = tuple(f"server.sampler.{name}" for name in ("api", "tokenizer", "thinking", "length_field"))


def scorer_stages(config: Config) -> list[Stage]:
    """What finds out whether the teacher's server can score, where the objective requires that it does."""
    server = _server(config)
    if server is None or "teacher_scores" not in config.objective.requires:
        return []
    tokenizer = config.teacher.scored_by or ""
    options = ScorerOptions(server=server, tokenizer=tokenizer, trust_remote_code=_trusted(config))
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
    server = _server(config)
    options = ScoreOptions(
        model=config.teacher.scored_by,
        server=server,
        policy="teacher",
        prefix=config.teacher.instruction,
        student=config.student.model,
        student_trust_remote_code=config.train.trust_remote_code,
        dtype=config.teacher.scored_in,
        trust_remote_code=_trusted(config),
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


def teacher_in_training(config: Config, objective: Objective) -> TeacherOptions | None:
    """The teacher in the train stage, where the objective requires its distribution."""
    if "teacher_distribution" not in objective.requires or config.teacher.scored_by is None:
        return None
    return TeacherOptions(
        model=config.teacher.scored_by,
        prefix=config.teacher.instruction,
        dtype=config.teacher.scored_in,
        device=config.teacher.scorer_device,
        trust_remote_code=_trusted(config),
    )


def _trusted(config: Config) -> bool:
    """Whether the teacher's checkpoint may bring code of its own."""
    sampler = config.teacher.sampler
    return sampler.trust_remote_code if isinstance(sampler, HF | VLLM) else config.train.trust_remote_code


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


def adapted_phi(config: Config, number: int) -> Stage:
    """Find phi of round `number` (3 or later) from the negatives of the round before."""
    setting, before = config.pairs.phi, f"round-{number - 1}"
    assert isinstance(setting, AdaptivePhi)
    inputs = {"problems": "problems", "initial": "student-0", "initial-verdicts": "student-0-verdicts"}
    inputs |= {"latest": f"{before}/student", "latest-verdicts": f"{before}/student-verdicts"}
    if number > 3:
        inputs["phi"] = f"{before}/phi"
    options = PhiOptions(adaptive=setting.adaptive, start=setting.start)
    return Stage(f"round-{number}/phi", "orpo_distill.stages.phi:phi", options, inputs, outputs=(PHI_FILE,))


def policy_of(config: Config, alpha: float) -> str:
    """The name of the last student, moved on by alpha."""
    return f"student-{config.rounds}" + (f"+{alpha:g}" if alpha else "")


def folder_of(config: Config, alpha: float) -> str:
    """The folder with the last student, moved on by alpha, and its evaluation."""
    return f"extrapolate/{alpha:g}" if alpha else f"round-{config.rounds}"


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
    return Stage(f"{folder_of(config, alpha)}/train", work, options, inputs, outputs=("model",))


def chosen(config: Config) -> Stage:
    """The alpha that is best on validation, and its model."""
    section = config.extrapolate
    assert section is not None
    inputs: dict[str, str] = {}
    for alpha in section.alpha:
        folder = folder_of(config, alpha)
        inputs |= {f"model:{alpha:g}": f"{folder}/train", f"evaluate:{alpha:g}": f"{folder}/evaluate"}
    options = ChooseOptions(alpha=section.alpha, policies=tuple(policy_of(config, alpha) for alpha in section.alpha))
    return Stage(CHOSEN, "orpo_distill.stages.extrapolate:choose", options, inputs, outputs=("model", "choice.json"))


def judges_pairs(config: Config) -> bool:
    """Whether a judge decides which text of a pair is preferred."""
    return config.judge is not None and config.judge.pairs and "rejected" in config.objective.requires


def judged_pairs(config: Config, candidates: Stage, number: int) -> Stage:
    """Round `number`'s pairs as the judge prefers them. What it said for earlier rounds is taken over."""
    inputs = {"problems": "problems", "candidates": candidates.name}
    if number > 1:
        inputs["previous"] = f"round-{number - 1}/pairs"
    return Stage(
        f"round-{number}/pairs",
        "orpo_distill.stages.judge:judge_pairs",
        JudgePairsOptions(judge=_judge(config), seed=config.seed),
        inputs,
        outputs=("pairs.jsonl",),
        grows=frozenset(f"inputs.{name}" for name in inputs),
        precious=True,
    )


def judged_answers(config: Config, stages: Sequence[Stage]) -> Iterator[Stage]:
    """Every student's answers against the initial one's and the teacher's, as far as these are evaluated."""
    if config.judge is None:
        return
    evaluated = {stage.options.policy: stage.name for stage in stages if isinstance(stage.options, EvaluateOptions)}
    for policy, name in evaluated.items():
        against = tuple(other for other in ("student-0", "teacher") if other in evaluated and other != policy)
        if policy == "teacher" or not against:
            continue
        inputs = {"problems": "problems", "answers": name} | {other: evaluated[other] for other in against}
        yield Stage(
            name.replace("evaluate", "judged") if "/" in name else f"{name}-judged",
            "orpo_distill.stages.judge:judge_answers",
            JudgeAnswersOptions(judge=_judge(config), seed=config.problems.seed, policy=policy, against=against),
            inputs,
            outputs=(WIN_RATES,),
            grows=frozenset(f"inputs.{other}" for other in inputs),
            ignores=("judge.pairs",),
            precious=True,
        )


def _judge(config: Config) -> Judge:
    """The judge, as this run uses it."""
    judge = config.judge
    assert judge is not None
    return judge.model_copy(update={"sampler": judge.sampler.for_run(config.name, config.ledger)})
