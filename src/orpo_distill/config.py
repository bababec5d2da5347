"""Every setting of an experiment, on one page. `loading.load_config` reads it from YAML.

`configs/reference.yaml` shows every key with a comment. Options marked SPEED_ONLY may change cost or rounding, never
the method; all others are part of the fingerprint of the stages that they reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from orpo_distill.component import SPEED_ONLY, Options, type_name
from orpo_distill.judging import Judge
from orpo_distill.mixing import PHI_FORMS, AdaptivePhi, PhiSetting, PhiUnit
from orpo_distill.models import Dtype
from orpo_distill.objectives import INPUTS, Objective
from orpo_distill.priming import PRIMINGS, Priming
from orpo_distill.samplers import Decoding, Greedy, Sampler
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.tasks import Task

TEACHERS = {
    "teacher_scores": "can score given texts",
    "teacher_distribution": "lends its whole distributions, from a local checkpoint,",
}
"""What an objective may want of the teacher beside its texts, in words."""

Share = Annotated[float, Field(ge=0, le=1)]


class ProblemsSection(Options):
    """Which problems are trained on and tested on."""

    train: str = "train"
    validation: str | None = "validation"  # skipped where the task has no such split
    test: str = "test"
    holdout: PositiveInt | None = None  # train problems that become validation where the task has no such split
    limit: PositiveInt | None = None  # train problems; raising it later only adds problems
    seed: int = 0  # which of them `holdout` and `limit` take

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.holdout and self.validation is None:
            raise ValueError("expected a name in validation beside holdout, which makes that split, found null")
        return self


class TeacherSection(Options):
    """The model to learn from: only its text is used, unless the objective asks for more."""

    model: str
    sampler: SerializeAsAny[Sampler] = Field(default="hf", validate_default=True)
    decoding: Decoding = Decoding()
    samples: PositiveInt = 8  # K; raising it later only adds traces
    priming: Priming = "none"  # an instruction that only the teacher sees, by name
    prefix: str = ""  # the same in words of one's own; behind the priming if there are both
    stop_at: PositiveInt | None = None  # correct, diverse traces after which a problem is left: waves of `samples`
    max_samples: PositiveInt | None = None  # most traces of a hard problem, with `stop_at`
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of the waves; the last one goes on
    scorer: str | None = None  # a checkpoint that reads given texts as the teacher; default: `model`, where it is one
    scorer_dtype: Dtype | None = None  # how it is loaded; default: as the sampler does
    scorer_device: Annotated[str, SPEED_ONLY] = "auto"  # where it stands while the student is trained
    scoring: Literal["local", "prompt_logprobs", "echo"] = "local"  # by that checkpoint, or by the sampler's server

    @property
    def instruction(self) -> str:
        """What stands before the question for the teacher alone; empty if nothing does."""
        return "\n\n".join(part for part in (PRIMINGS[self.priming], self.prefix) if part)

    @property
    def scored_by(self) -> str | None:
        """The checkpoint whose weights, or whose tokens at a server, say how likely the teacher finds a given text.

        None where there is none.
        """
        if self.scoring != "local" and isinstance(self.sampler, OpenAI):
            return self.scorer or self.sampler.tokenizer or None
        return self.scorer or (self.model if isinstance(self.sampler, HF | VLLM) else None)

    @property
    def scored_in(self) -> Dtype:
        """The number type of that checkpoint."""
        return self.scorer_dtype or (self.sampler.dtype if isinstance(self.sampler, HF | VLLM) else "auto")

    @model_validator(mode="after")
    def _scores(self) -> Self:
        if self.scoring == "local":
            return self
        if not isinstance(self.sampler, OpenAI):
            raise ValueError(
                f"expected the sampler openai beside scoring: {self.scoring}, found {type_name(type(self.sampler))}, "
                "which asks no server"
            )
        if self.scored_by is None:
            raise ValueError(
                f"expected the tokenizer of what the server runs beside scoring: {self.scoring}, found none; name its "
                "folder or hub id in scorer (its weights are not read)"
            )
        return self

    @model_validator(mode="after")
    def _stops(self) -> Self:
        if self.stop_at is None and (self.max_samples or self.temperatures):
            raise ValueError("expected stop_at beside max_samples and temperatures, found none")
        if self.stop_at is not None and (self.max_samples is None or self.max_samples < self.samples):
            raise ValueError(f"expected max_samples of at least samples ({self.samples}), found {self.max_samples}")
        return self


class StudentSection(Options):
    """The model to train; its own wrong traces are the negatives."""

    model: str
    sampler: SerializeAsAny[Sampler] = Field(default="hf", validate_default=True)
    decoding: Decoding = Decoding()
    samples: PositiveInt = 8


class PairsSection(Options):
    """How verified traces become training rows."""

    phi: PhiSetting = 0.5  # a number, one value a round, {start, end}, or adaptive
    phi_unit: PhiUnit = "problem"
    on_empty: Literal["initial", "skip"] = "initial"  # when the latest student made no wrong trace
    negatives_from: Literal["student", "teacher"] = "student"
    matched: bool = False  # only problems with wrong traces of student and teacher, as many of one as of the other
    traces: PositiveInt | None = None  # use only the first this many traces a problem of each model
    rouge_l_max: Share = 0.8  # drop a trace whose ROUGE-L F1 with a kept one is above this
    pairing: Literal["cycle", "product", "random"] = "cycle"
    per_problem: PositiveInt = 8  # most pairs a problem gives in a round
    max_chosen: PositiveInt | None = None  # chosen traces kept a problem; 1 = single-trace SFT
    min_response_tokens: PositiveInt = 1  # in the student's tokens
    max_response_tokens: PositiveInt | None = None

    @field_validator("phi", mode="wrap")
    @classmethod
    def _phi_in_one_message(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler({"adaptive": "yield"} if value == "adaptive" else value)
        except ValidationError as error:
            raise ValueError(f"expected {PHI_FORMS}, found {value!r}") from error


class LoraSection(Options):
    """Low-rank adapters instead of full fine-tuning (needs the extra `lora`)."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Share = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class TrainSection(Options):
    """How the student is trained."""

    learning_rate: float = Field(5e-6, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # over all rounds together
    warmup_ratio: Share = 0.05  # of all steps of all rounds
    weight_decay: float = Field(0.0, ge=0)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    pairs_per_step: PositiveInt = 32  # over all processes
    steps_per_round: PositiveInt | None = None  # default: what round 1's pairs give
    max_length: PositiveInt = 1024  # tokens of prompt and response together
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    autocast: bool = False  # float32 weights, bfloat16 arithmetic
    lora: LoraSection | None = None
    trust_remote_code: bool = False
    tokens_per_batch: Annotated[PositiveInt, SPEED_ONLY] = 4096  # in one forward pass; lower it when memory runs out
    gradient_checkpointing: Annotated[bool, SPEED_ONLY] = False
    checkpoint_minutes: Annotated[float, Field(gt=0), SPEED_ONLY] = 10.0
    logging_steps: Annotated[PositiveInt, SPEED_ONLY] = 10
    report_to: Annotated[tuple[str, ...], SPEED_ONLY] = ()  # Trainer's trackers: tensorboard, wandb, trackio, ...
    keep: Annotated[Literal["last", "all"], SPEED_ONLY] = "last"  # optimizer states of finished rounds


class WarmupSection(Options):
    """Training before the rounds; its student is where round 1 starts, and the reference of DPO and its relatives."""

    objective: SerializeAsAny[Objective] = Field(default="sft", validate_default=True)
    epochs: PositiveInt = 1
    learning_rate: float | None = Field(None, gt=0)  # default: that of `train`; the schedule is its own
    schedule: Literal["cosine", "linear", "constant"] | None = None  # default: that of `train`

    @model_validator(mode="after")
    def _needs_no_scores(self) -> Self:
        if unknown := self.objective.requires - {"rejected"}:
            raise ValueError(
                f"expected a warm-up by texts alone, such as sft, found one that requires {sorted(unknown)}"
            )
        return self


class ExtrapolateSection(Options):
    """ExPO: the trained student moved on, away from where it started, by the alpha that is best on validation."""

    alpha: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.1, 0.3, 0.5)
    origin: Literal["initial", "warmup"] = "initial"  # the student that the difference is taken from

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if not self.alpha or len({f"{alpha:g}" for alpha in self.alpha}) < len(self.alpha):  # as folders name them
            raise ValueError(
                f"expected different values of alpha, at least one, found {list(self.alpha)}; six digits count"
            )
        return self


class VerifySection(Options):
    """How verdicts are made."""

    timeout: float = Field(10.0, gt=0)  # seconds a trace, for verifiers that can hang: math, and a user's own
    processes: Annotated[PositiveInt, SPEED_ONLY] = 1


class EvaluateSection(Options):
    """How every student is measured: on test, and on validation where the task has it."""

    decoding: Greedy = Decoding(temperature=0.0)
    limit: PositiveInt | None = None  # test problems
    validation_limit: PositiveInt | None = None
    test: bool = True  # false: leave the test problems alone, as long as settings are searched on validation
    teacher: bool = False  # measure the teacher on test too
    sft: bool = False  # train and measure an SFT student on the same chosen traces


class MechanismsSection(Options):
    """What is measured of negatives and training beside accuracy. Never changes what is trained."""

    enabled: bool = True
    problems: NonNegativeInt = 100  # whose negatives are scored by the student of each round; 0: none are
    traces: Annotated[int, Field(ge=2)] = 2  # negatives a problem of each source that is compared


class SampleLaunch(Options):
    """How sampling is started."""

    processes: Annotated[PositiveInt, SPEED_ONLY] = 1  # shards of the problems, one device each


class TrainLaunch(Options):
    """How training is started."""

    launcher: Annotated[Literal["inline", "accelerate"], SPEED_ONLY] = "inline"
    processes: Annotated[PositiveInt, SPEED_ONLY] = 1


class LaunchSection(Options):
    """How stages are started. Never changes what they compute."""

    sample: Annotated[SampleLaunch, SPEED_ONLY] = SampleLaunch()
    train: Annotated[TrainLaunch, SPEED_ONLY] = TrainLaunch()


class Config(Options):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    traces_seed: int | None = None  # of the teacher's and the initial student's traces; default: `seed`
    task: SerializeAsAny[Task]
    problems: ProblemsSection = ProblemsSection()
    teacher: TeacherSection
    student: StudentSection
    rounds: PositiveInt = 5
    verify: VerifySection = VerifySection()
    pairs: PairsSection = PairsSection()
    objective: SerializeAsAny[Objective] = Field(default="orpo", validate_default=True)
    warmup: WarmupSection | None = None
    train: TrainSection = TrainSection()
    extrapolate: ExtrapolateSection | None = None
    evaluate: EvaluateSection = EvaluateSection()
    judge: Judge | None = None
    mechanisms: MechanismsSection = MechanismsSection()
    launch: Annotated[LaunchSection, SPEED_ONLY] = LaunchSection()
    runs: Annotated[Path, SPEED_ONLY] = Path("runs")  # the folder of run folders
    ledger: Annotated[Path | None, SPEED_ONLY] = None  # of paid calls; default: in the user's data folder

    @property
    def run_dir(self) -> Path:
        """The run folder: `runs/<name>`."""
        return self.runs / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_scores()
        self._check_judge()
        phi = self.pairs.phi
        if isinstance(phi, tuple) and (len(phi) != self.rounds or phi[0]):
            raise ValueError(
                f"expected pairs.phi with one value a round ({self.rounds}), the first 0 because round 1 has only the "
                f"initial student, found {list(phi)}"
            )
        if not self.evaluate.test and self.problems.validation is None:
            raise ValueError("expected problems.validation beside evaluate.test: false, found null: nothing to measure")
        if not self.evaluate.test and self.evaluate.teacher:
            raise ValueError("expected evaluate.test: true beside evaluate.teacher, measured there, found false")
        if self.pairs.matched and phi != 0:
            raise ValueError(f"expected pairs.phi: 0 beside pairs.matched, found {phi!r}")
        if isinstance(phi, AdaptivePhi) and self.rounds < 3:
            raise ValueError(
                f"expected rounds of at least 3 with an adaptive pairs.phi, because round 2 is the first whose "
                f"negatives can be compared and round 3 the first whose phi can move, found {self.rounds}"
            )
        in_waves = 1 if self.teacher.temperatures else self.teacher.max_samples or 1
        for where, role, most in (("teacher", self.teacher, in_waves), ("student", self.student, 1)):
            if (several := max(role.samples, most)) > 1 and role.decoding.temperature == 0:
                raise ValueError(
                    f"expected {where}.decoding.temperature > 0 to draw {several} different traces, found 0"
                )
        return self

    def _check_scores(self) -> None:
        """That whatever the objective and extrapolation need can be had."""
        if unknown := self.objective.requires - INPUTS.keys():
            raise ValueError(f"expected an objective that requires {' or '.join(INPUTS)}, found {sorted(unknown)}")
        name, wanted = type_name(type(self.objective)), self.objective.requires & TEACHERS.keys()
        if wanted and self.teacher.scored_by is None:
            server = " or how its server scores in teacher.scoring" if "teacher_scores" in wanted else ""
            raise ValueError(
                f"expected a teacher that {TEACHERS[min(wanted)]} for {name}, found "
                f"{type_name(type(self.teacher.sampler))}, which only writes texts; name the teacher's checkpoint in "
                f"teacher.scorer{server}, or take an objective that needs no more than texts, such as orpo or dpo"
            )
        if "teacher_distribution" in wanted and self.teacher.scoring != "local":
            raise ValueError(
                f"expected teacher.scoring: local for {name}, which reads whole distributions, found "
                f"{self.teacher.scoring}: no server lends them; leave scoring out and name the teacher's checkpoint in "
                "teacher.scorer"
            )
        if self.objective.across_tokenizers and self.objective.writing:
            raise ValueError(
                f"expected the student to write texts only where teacher and student have the same tokens, found that "
                f"{name} wants both"
            )
        if self.extrapolate and self.problems.validation is None:
            raise ValueError("expected problems.validation beside extrapolate, which chooses alpha on it, found null")
        if self.extrapolate and self.extrapolate.origin == "warmup" and self.warmup is None:
            raise ValueError("expected warmup beside extrapolate.origin: warmup, found none")

    def _check_judge(self) -> None:
        """That a judge stands in for gold answers only, and that without these nothing counts right and wrong ones."""
        if not self.task.open_ended:
            if self.judge:
                name = type_name(type(self.task.judge()))
                raise ValueError(f"expected task.verifier: role beside judge, found {name}, which knows what is right")
            return
        phi = self.pairs.phi
        counting = {
            "pairs.negatives_from: teacher": self.pairs.negatives_from == "teacher",
            "pairs.matched: true": self.pairs.matched,
            "pairs.phi: {adaptive: yield}": isinstance(phi, AdaptivePhi) and phi.adaptive == "yield",
            "extrapolate": self.extrapolate is not None,
        }
        for setting in (name for name, is_set in counting.items() if is_set):
            raise ValueError(
                f"expected a task with gold answers for {setting}, which counts right or wrong ones, found an "
                "open-ended one (task.verifier: role); leave the setting out"
            )
