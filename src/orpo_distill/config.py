"""Every setting of an experiment, on one page. `load_config` reads it from YAML.

`configs/reference.yaml` shows every key with a comment. Options marked SPEED_ONLY may change cost or rounding, never
the method; all others are part of the fingerprint of the stages that they reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from orpo_distill.component import SPEED_ONLY, Component, Options, component_class, type_name
from orpo_distill.errors import ConfigError
from orpo_distill.mixing import PHI_FORMS, AdaptivePhi, PhiSetting, PhiUnit
from orpo_distill.objectives import INPUTS, Objective
from orpo_distill.samplers import Decoding, Sampler
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.vllm import VLLM
from orpo_distill.tasks import Task

C = TypeVar("C", bound=Component)
M = TypeVar("M", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]


class ProblemsSection(Options):
    """Which problems are trained on and tested on."""

    train: str = "train"
    validation: str | None = "validation"  # skipped where the task has no such split
    test: str = "test"
    limit: PositiveInt | None = None  # train problems; raising it later only adds problems
    seed: int = 0  # which of them `limit` takes


class TeacherSection(Options):
    """The model to learn from: only its text is used."""

    model: str
    sampler: SerializeAsAny[Sampler] = Field(default="hf", validate_default=True)
    decoding: Decoding = Decoding()
    samples: PositiveInt = 8  # K; raising it later only adds traces
    prefix: str = ""  # an instruction that only the teacher sees
    stop_at: PositiveInt | None = None  # correct, diverse traces after which a problem is left: waves of `samples`
    max_samples: PositiveInt | None = None  # most traces of a hard problem, with `stop_at`
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of the waves; the last one goes on
    scorer: str | None = None  # a checkpoint that scores given texts as the teacher; default: `model`, where it is one

    @property
    def scored_by(self) -> str | None:
        """The checkpoint that can say how likely the teacher finds a given text; None where there is none."""
        return self.scorer or (self.model if isinstance(self.sampler, HF | VLLM) else None)

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
        if not self.alpha or len(set(self.alpha)) < len(self.alpha):
            raise ValueError(f"expected different values of alpha, at least one, found {list(self.alpha)}")
        return self


class VerifySection(Options):
    """How verdicts are made."""

    timeout: float = Field(10.0, gt=0)  # seconds a trace, for verifiers that can hang: math, and a user's own
    processes: Annotated[PositiveInt, SPEED_ONLY] = 1


class EvaluateSection(Options):
    """How every student is measured: on test, and on validation where the task has it."""

    decoding: Decoding = Decoding(temperature=0.0)
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
        phi = self.pairs.phi
        if isinstance(phi, tuple) and (len(phi) != self.rounds or phi[0]):
            raise ValueError(
                f"expected pairs.phi with one value a round ({self.rounds}), the first 0 because round 1 has only the "
                f"initial student, found {list(phi)}"
            )
        if not self.evaluate.test and self.problems.validation is None:
            raise ValueError("expected problems.validation beside evaluate.test: false, found null: nothing to measure")
        if self.pairs.matched and phi != 0:
            raise ValueError(f"expected pairs.phi: 0 beside pairs.matched, found {phi!r}")
        if isinstance(phi, AdaptivePhi) and self.rounds < 3:
            raise ValueError(
                f"expected rounds of at least 3 with an adaptive pairs.phi, because round 2 is the first whose "
                f"negatives can be compared and round 3 the first whose phi can move, found {self.rounds}"
            )
        for role in (self.teacher, self.student):
            if role.samples > 1 and role.decoding.temperature == 0:
                where = "teacher" if role is self.teacher else "student"
                raise ValueError(
                    f"expected {where}.decoding.temperature > 0 to draw {role.samples} different traces, found 0"
                )
        return self

    def _check_scores(self) -> None:
        """That whatever the objective and extrapolation need can be had."""
        if unknown := self.objective.requires - INPUTS.keys():
            raise ValueError(f"expected an objective that requires {' or '.join(INPUTS)}, found {sorted(unknown)}")
        if "teacher_scores" in self.objective.requires and self.teacher.scored_by is None:
            raise ValueError(
                f"expected a teacher that can score given texts for {type_name(type(self.objective))}, found "
                f"{type_name(type(self.teacher.sampler))}, which only writes texts; name the teacher's checkpoint in "
                "teacher.scorer, or take an objective that needs no more than texts, such as orpo or dpo"
            )
        if self.extrapolate and self.problems.validation is None:
            raise ValueError("expected problems.validation beside extrapolate, which chooses alpha on it, found null")
        if self.extrapolate and self.extrapolate.origin == "warmup" and self.warmup is None:
            raise ValueError("expected warmup beside extrapolate.origin: warmup, found none")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment. `overrides` are `dotted.key=value`. Raises ConfigError with every problem found."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a YAML file at {path}, found: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, found: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> Config:
    """Validate settings that are already plain data. Raises ConfigError with every problem found."""
    return _validate(Config, data, "")


def parse_component(family: type[C], spec: dict[str, Any], where: str) -> C:
    """A component from its options, for instance of the command line's flag `where`. Raises ConfigError."""
    return _validate(family, spec, f"{where}: ")


def _validate(model: type[M], data: dict[str, Any], where: str) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A default that could not be computed follows from another error.
        found = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
        problems = [where + _explain(item, model, data) + _how_to_add(item, where, data) for item in found]
        raise ConfigError(problems) from error


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"expected key=value, found {override!r}; for instance train.learning_rate=1e-5")
    if not text.strip():
        raise ConfigError(f"expected a value behind {key}=, found none; write {key}=null for no value, or '{key}=\"\"'")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"expected a YAML value in {override!r}, found: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        child = data.get(parent)
        if isinstance(child, str):  # `task: gsm8k` and an option of it
            child = {"type": child}
        data[parent] = child if isinstance(child, dict) else {}
        data = data[parent]
    data[last] = value


WANTED = {  # in a user's words, by the kind of pydantic's error
    "model": "expected settings ({key: value, ...})",
    "model_attributes": "expected settings ({key: value, ...})",
    "dict": "expected settings ({key: value, ...})",
    "string": "expected text",
    "int": "expected a whole number",
    "float": "expected a number",
    "bool": "expected true or false",
    "list": "expected a list",
    "tuple": "expected a list",
    "path": "expected a path",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 (no dot) as text; everybody who writes it means the number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice: plain YAML takes the last one without a word."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?|\.\d)\d*[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain data from YAML, by the safe loader. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # PyYAML's own slips
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def _explain(error: Any, model: type[BaseModel], data: Any) -> str:
    """One of pydantic's errors in a user's words."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = get_close_matches(location[-1], _known_keys(model, location[:-1], data), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: expected {_wanted(model, location, data)}, found none; add it"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    message = re.sub(r"^input should be (?=greater|less)", "expected a number ", message)
    message = re.sub(r"^input should (be|have|match) ", "expected ", message)
    message = WANTED.get(error["type"].partition("_parsing")[0].removesuffix("_type"), message)
    message = message if "found" in message else f"{message}, found {error['input']!r}"
    return f"{where}: {message}" if where else message


def _how_to_add(error: Any, where: str, data: Mapping[str, Any]) -> str:
    """How an option that is missing is written on the command line, behind the flag `where`."""
    if not where or error["type"] != "missing":
        return ""
    return f": {where.removesuffix(': ')} '{{type: {data.get('type')}, {error['loc'][-1]}: ...}}'"


def _wanted(model: type[BaseModel], location: Sequence[str], data: Any) -> str:
    """What a key stands for that is missing: the names of its family, where it has one."""
    field = _field(model, location, data)
    for kind in _classes(field.annotation if field else None):
        if issubclass(kind, Component) and kind.types:
            return f"one of {', '.join(sorted(kind.types))} or module:Class"
    return "a value"


def _known_keys(model: type[BaseModel], location: Sequence[str], data: Any) -> list[str]:
    """The keys that are known at a place of the settings."""
    found = _model_at(model, location, data)
    return list(found.model_fields) if found else []


def _field(model: type[BaseModel], location: Sequence[str], data: Any) -> FieldInfo | None:
    """The field at a place of the settings, None where no model has it."""
    found = _model_at(model, location[:-1], data)
    return found.model_fields.get(location[-1]) if found and location else None


def _model_at(model: type[BaseModel], location: Sequence[str], data: Any) -> type[BaseModel] | None:
    """The model whose keys stand at a place of the settings: of a component, the one that is named there."""
    if issubclass(model, Component) and "types" in model.__dict__:
        name = data.get("type", model.default_type) if isinstance(data, dict) else str(data)
        try:
            model = component_class(model, name)
        except ValueError:  # named in an error of its own
            return None
    if not location:
        return model
    field = model.model_fields.get(location[0])
    kinds = [kind for kind in _classes(field.annotation if field else None) if issubclass(kind, BaseModel)]
    inner = data.get(location[0]) if isinstance(data, dict) else None
    return _model_at(kinds[0], location[1:], inner) if kinds else None


def _classes(annotation: Any) -> list[type[Any]]:
    """Every class in an annotation such as `LoraSection | None`."""
    if isinstance(annotation, type):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _classes(part)]
