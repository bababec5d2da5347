"""The whole algorithm, as one pure function from a config to the stages that carry it out.

ORPO-Distill, arXiv 2509.25100: sample teacher and initial student, verify, pair, train; before each later round sample
from the latest student what the coin of phi sends there, verify, pair, train on.
"""

from __future__ import annotations

from orpo_distill.additions import (
    CHOSEN,
    SCORER,
    adapted_phi,
    chosen,
    extrapolated,
    folder_of,
    judged_answers,
    judged_pairs,
    judges_pairs,
    policy_of,
    score_stages,
    scorer_stages,
    teacher_in_training,
)
from orpo_distill.component import type_name
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError
from orpo_distill.mixing import foreseen_phi, phi_of_round
from orpo_distill.objectives import Objective
from orpo_distill.runs import Stage
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.export import ExportOptions
from orpo_distill.stages.mechanisms import FILE as MECHANISMS_FILE
from orpo_distill.stages.mechanisms import MechanismsOptions
from orpo_distill.stages.pair import PairOptions
from orpo_distill.stages.problems import ProblemsOptions
from orpo_distill.stages.report import ReportOptions
from orpo_distill.stages.sample import SampleOptions, StopRule
from orpo_distill.stages.train import TrainOptions
from orpo_distill.stages.verify import VerifyOptions

# Options of a task that a stage's result does not depend on: changing them leaves traces, verdicts, pairs as they are.
SOURCE = ("task.path", "task.hub_id", "task.hub_config")
VERIFIER = ("task.verifier",)
ASKING = ("task.prompt", "task.system", "task.examples")


def plan(config: Config) -> list[Stage]:
    """Every stage of a run, in an order in which each one's inputs come before it."""
    uses_student = any(_reads_student(config, one) for one in _objectives(config))
    stages = [_problems(config), *scorer_stages(config), *_sampled(config, "teacher")]
    if uses_student:
        stages += _sampled(config, "student-0")
    stages += [*_pairs(config, 1), _evaluate(config, "baseline", "student-0", model=config.student.model)]
    stages += _warmup(config)
    for number in range(1, config.rounds + 1):
        if number > 1:
            if _uses_student(config, config.objective):
                stages += _refreshed(config, number)
            stages += _pairs(config, number)
        stages += score_stages(config, number)
        stages += [_train(config, number), _evaluate(config, f"round-{number}/evaluate", f"student-{number}")]
    stages += _extrapolated(config)
    if config.evaluate.teacher:
        stages.append(_evaluate(config, "teacher-evaluate", "teacher", model=config.teacher.model))
    if config.evaluate.sft:
        stages += _sft(config)
    if config.mechanisms.enabled:
        stages.append(_mechanisms(config, stages))
    stages += judged_answers(config, stages)
    return [*stages, _report(config, stages), _export(config)]


def _problems(config: Config) -> Stage:
    return Stage(
        "problems",
        "orpo_distill.stages.problems:problems",
        ProblemsOptions(task=config.task, problems=config.problems),
        outputs=("problems.jsonl", "validation.jsonl", "test.jsonl"),
        grows=frozenset({"problems.limit"}),
        ignores=ASKING,
    )


def _sampled(config: Config, policy: str) -> list[Stage]:
    """Sample and verify the teacher or the initial student on every train problem."""
    role = config.teacher if policy == "teacher" else config.student
    options = SampleOptions(
        task=config.task,
        sampler=role.sampler.for_run(config.name, config.ledger),
        model=role.model,
        decoding=role.decoding,
        samples=role.samples,
        policy=policy,
        prefix=config.teacher.instruction if policy == "teacher" else "",
        seed=config.seed if config.traces_seed is None else config.traces_seed,
        stopping=_stop_rule(config) if policy == "teacher" else None,
    )
    return [_sample_stage(policy, options, {"problems": "problems"}), _verify(config, f"{policy}-verdicts", policy)]


def _stop_rule(config: Config) -> StopRule | None:
    teacher = config.teacher
    if teacher.stop_at is None:
        return None
    return StopRule(
        at=teacher.stop_at,
        most=teacher.max_samples or teacher.samples,
        temperatures=teacher.temperatures,
        rouge_l_max=config.pairs.rouge_l_max,
        verify=config.verify,
    )


def _refreshed(config: Config, number: int) -> list[Stage]:
    """What round `number` takes from the student of the round before, after finding out how much where phi adapts."""
    phi = _phi(config, number)
    if phi == 0:
        return []
    return [*([adapted_phi(config, number)] if phi is None else []), *_sampled_latest(config, number)]


def _sampled_latest(config: Config, number: int) -> list[Stage]:
    """Sample and verify, for round `number`, what the coin sends to the student of the round before."""
    options = SampleOptions(
        task=config.task,
        sampler=config.student.sampler.for_run(config.name, config.ledger),
        model=None,
        decoding=config.student.decoding,
        samples=_student_samples(config),
        policy=f"student-{number - 1}",
        seed=config.seed,
        round=number,
        phi=_phi(config, number),
        phi_unit=config.pairs.phi_unit,
    )
    name = f"round-{number}/student"
    inputs = {"problems": "problems", "model": f"round-{number - 1}/train"}
    if options.phi is None:
        inputs["phi"] = f"round-{number}/phi"
    return [_sample_stage(name, options, inputs), _verify(config, f"{name}-verdicts", name)]


def _sample_stage(name: str, options: SampleOptions, inputs: dict[str, str]) -> Stage:
    waves = options.stopping is not None and len(set(options.stopping.temperatures)) > 1  # each has its temperature
    return Stage(
        name,
        "orpo_distill.stages.sample:sample",
        options,
        inputs,
        outputs=("traces.jsonl",),
        grows=frozenset(
            {"stopping.at", "stopping.most", "inputs.problems", "inputs.phi"} | (set() if waves else {"samples"})
        ),
        ignores=SOURCE + (() if options.stopping else VERIFIER),
        precious=True,
    )


def _verify(config: Config, name: str, traces: str) -> Stage:
    return Stage(
        name,
        "orpo_distill.stages.verify:verify",
        VerifyOptions(task=config.task, verify=config.verify),
        {"problems": "problems", "traces": traces},
        outputs=("verdicts.jsonl",),
        grows=frozenset({"inputs.traces"}),
        ignores=SOURCE + ASKING,
    )


def _pairs(config: Config, number: int) -> list[Stage]:
    """Round `number`'s pairs; where a judge decides, after those by role that it is asked about."""
    if not judges_pairs(config):
        return [_pair(config, number)]
    candidates = _pair(config, number, name=f"round-{number}/candidates")
    return [candidates, judged_pairs(config, candidates, number)]


def _pair(config: Config, number: int, objective: Objective | None = None, name: str = "") -> Stage:
    objective = objective or config.objective
    uses_student = _uses_student(config, objective)
    phi = _phi(config, number) if uses_student else foreseen_phi(config.pairs.phi, number, config.rounds)
    options = PairOptions(
        **{**dict(config.pairs), "phi": phi},
        task=config.task,
        round=number,
        seed=config.seed,
        samples=_student_samples(config),
        tokenizer=config.student.model,
        trust_remote_code=config.train.trust_remote_code,
        max_length=config.train.max_length,
        needs_rejected="rejected" in objective.requires,
    )
    inputs = {"problems": "problems", "teacher": "teacher", "teacher-verdicts": "teacher-verdicts"}
    if _reads_student(config, objective):
        inputs |= {"initial": "student-0", "initial-verdicts": "student-0-verdicts"}
    if uses_student:
        if phi is None:
            inputs["phi"] = f"round-{number}/phi"
        if phi != 0:
            latest = f"round-{number}/student"
            inputs |= {"latest": latest, "latest-verdicts": f"{latest}-verdicts"}
    return Stage(
        name or f"round-{number}/pairs",
        "orpo_distill.stages.pair:pair",
        options,
        inputs,
        outputs=("pairs.jsonl",),
        grows=frozenset({"samples"}),  # more traces are another input, so the stage is made anew
        ignores=SOURCE + VERIFIER,
    )


def _train(config: Config, number: int) -> Stage:
    inputs = {"pairs": f"round-{number}/pairs"}
    if number > 1:
        inputs["previous"] = f"round-{number - 1}/train"
    elif config.warmup:
        inputs["start"] = "warmup/train"
    inputs |= {stage.name.partition("/")[2]: stage.name for stage in score_stages(config, number)}
    options = _train_options(config, config.objective, number, number)
    return Stage(
        f"round-{number}/train",
        "orpo_distill.stages.train:train",
        options,
        inputs,
        outputs=("model",),
        consumes={"previous": "checkpoint"} if number > 1 else {},
    )


def _train_options(config: Config, objective: Objective, first: int, last: int) -> TrainOptions:
    return TrainOptions(
        model=config.student.model,
        train=config.train,
        objective=objective,
        rounds=config.rounds,
        first_round=first,
        last_round=last,
        seed=config.seed,
        teacher=teacher_in_training(config, objective),
    )


def _warmup(config: Config) -> list[Stage]:
    """Training before the rounds, with a schedule of its own, on pairs made of the same traces as round 1's."""
    section = config.warmup
    if section is None:
        return []
    own = {"learning_rate": section.learning_rate, "schedule": section.schedule}
    changed = {"steps_per_round": None} | {key: value for key, value in own.items() if value is not None}
    options = TrainOptions(
        model=config.student.model,
        train=config.train.model_copy(update=changed),
        objective=section.objective,
        rounds=section.epochs,
        first_round=1,
        last_round=section.epochs,
        seed=config.seed,
    )
    pairs = _pair(config, 1, section.objective, "warmup/pairs")
    work, inputs = "orpo_distill.stages.train:train", {"pairs": pairs.name}
    train = Stage("warmup/train", work, options, inputs, outputs=("model",))
    return [pairs, train, _evaluate(config, "warmup/evaluate", "warmup")]


def _extrapolated(config: Config) -> list[Stage]:
    """The last student moved on by each alpha, all evaluated, and the choice among them (ExPO)."""
    stages: list[Stage] = []
    for alpha in config.extrapolate.alpha if config.extrapolate else ():
        if alpha:
            policy = policy_of(config, alpha)
            stages += [extrapolated(config, alpha), _evaluate(config, f"{folder_of(config, alpha)}/evaluate", policy)]
    return [*stages, chosen(config)] if config.extrapolate else []


def _sft(config: Config) -> list[Stage]:
    """The control: as many epochs of plain likelihood on the chosen side of round 1's rows."""
    options = _train_options(config, Objective.model_validate("sft"), 1, config.rounds)
    train = Stage(
        "sft/train", "orpo_distill.stages.train:train", options, {"pairs": "round-1/pairs"}, outputs=("model",)
    )
    return [train, _evaluate(config, "sft/evaluate", "sft")]


def _evaluate(config: Config, name: str, policy: str, model: str | None = None) -> Stage:
    """Evaluate a policy; without `model` it is the one trained by the stage `train` beside the evaluation."""
    is_teacher = policy == "teacher"
    role = config.teacher if is_teacher else config.student
    limits = {"test": config.evaluate.limit} if config.evaluate.test else {}
    if not is_teacher and config.problems.validation is not None:
        limits["validation"] = config.evaluate.validation_limit
    options = EvaluateOptions(
        task=config.task,
        sampler=role.sampler.for_run(config.name, config.ledger),
        decoding=config.evaluate.decoding,
        model=model,
        policy=policy,
        prefix=config.teacher.instruction if is_teacher else "",
        limits=limits,
        seed=config.problems.seed,
        verify=config.verify,
    )
    inputs = {"problems": "problems"} | ({} if model else {"model": name.replace("evaluate", "train")})
    # Another verifier judges the same answers again.
    grows = frozenset({"limits.test", "limits.validation", "inputs.problems", "task.verifier.*"})
    return Stage(
        name, "orpo_distill.stages.evaluate:evaluate", options, inputs, ("results.json",), grows, ignores=SOURCE
    )


def _mechanisms(config: Config, stages: list[Stage]) -> Stage:
    options = MechanismsOptions(
        mechanisms=config.mechanisms,
        task=config.task,
        model=config.student.model,
        train=config.train,
        rounds=config.rounds,
        seed=config.seed,
    )
    return Stage(
        "mechanisms",
        "orpo_distill.stages.mechanisms:mechanisms",
        options,
        _all(stages),
        outputs=(MECHANISMS_FILE,),
        grows=frozenset("*"),
        ignores=SOURCE + VERIFIER,
    )


def _all(stages: list[Stage]) -> dict[str, str]:
    """Every stage as an input under its name; evaluations under that of their policy."""
    return {
        f"evaluate:{stage.options.policy}" if isinstance(stage.options, EvaluateOptions) else stage.name: stage.name
        for stage in stages
    }


def _report(config: Config, stages: list[Stage]) -> Stage:
    options = ReportOptions(name=config.name, rounds=config.rounds)
    outputs = ("report.json", "report.md")
    return Stage(
        "report", "orpo_distill.stages.report:report", options, _all(stages), outputs, frozenset("*"), own=True
    )


def _export(config: Config) -> Stage:
    options = ExportOptions(
        name=config.name,
        teacher=config.teacher.model,
        student=config.student.model,
        task=type_name(type(config.task)),
        objective=type_name(type(config.objective)),
        rounds=config.rounds,
        dtype=config.train.dtype,
        trust_remote_code=config.train.trust_remote_code,
    )
    inputs = {"model": CHOSEN if config.extrapolate else f"round-{config.rounds}/train", "report": "report"}
    outputs = ("config.json",)
    return Stage("student", "orpo_distill.stages.export:export", options, inputs, outputs, frozenset("*"), own=True)


def _objectives(config: Config) -> list[Objective]:
    return [config.objective, *([config.warmup.objective] if config.warmup else [])]


def _student_samples(config: Config) -> int:
    """K: how many traces of the student a problem's negatives are taken from."""
    return min(config.student.samples, config.pairs.traces or config.student.samples)


def _reads_student(config: Config, objective: Objective) -> bool:
    """Whether the initial student's traces are needed: as negatives, or to match the teacher's with."""
    return "rejected" in objective.requires and (config.pairs.negatives_from == "student" or config.pairs.matched)


def _uses_student(config: Config, objective: Objective) -> bool:
    return "rejected" in objective.requires and config.pairs.negatives_from == "student"


def _phi(config: Config, number: int) -> float | None:
    return phi_of_round(config.pairs.phi, number, config.rounds)


def select(stages: list[Stage], until: str) -> list[Stage]:
    """The stages that `until` needs, and itself. Raises ConfigError for a name that is no stage."""
    by_name = {stage.name: stage for stage in stages}
    if until not in by_name:
        raise ConfigError(f"expected one of the stages {', '.join(by_name)}, found {until!r}")
    wanted, queue = set(), [until]
    while queue:
        name = queue.pop()
        wanted.add(name)
        queue += [source for source in by_name[name].inputs.values() if source not in wanted]
    if "teacher" in wanted:  # its server is asked whether it scores before it is asked for texts
        wanted.add(SCORER)
    return [stage for stage in stages if stage.name in wanted]
