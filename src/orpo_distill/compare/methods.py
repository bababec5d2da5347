"""Methods: what each row of the paper's table, and each control, is as settings laid over a config.

The paper (arXiv 2509.25100, section 3) compares zero-shot, single-CoT, diverse-CoT and ORPO with off-, on- and
mixed-policy negatives. `orpo-zero` is our control for the contrast: the rows and the order of `orpo-off`, weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml

from orpo_distill.component import component_class
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError
from orpo_distill.loading import parse_config, parse_yaml
from orpo_distill.objectives import Objective

ORPO = {"objective": "orpo"}
FROM_STUDENT = {"pairs.negatives_from": "student", "pairs.matched": False}
AGAINST_STUDENT = {**ORPO, **FROM_STUDENT}
# DPO without a warm-up collapses (Zephyr).
WARMED = {"warmup": {"objective": "sft", "epochs": 1}}
AFTER_SFT = {**FROM_STUDENT, "pairs.phi": 0.0, **WARMED}


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained on what. `settings` are dotted keys of the config."""

    about: str
    settings: Mapping[str, Any]
    trains: bool = True
    needs_several_traces: bool = False  # undefined where one teacher trace a problem is used


METHODS: Mapping[str, Method] = {
    "zero-shot": Method("the initial student", {}, trains=False),
    "single-cot": Method(
        "likelihood of the first correct teacher trace of each problem", {"objective": "sft", "pairs.max_chosen": 1}
    ),
    "diverse-cot": Method(
        "likelihood of every diverse correct teacher trace", {"objective": "sft"}, needs_several_traces=True
    ),
    "orpo-zero": Method(
        "the rows and the order of orpo-off, the odds-ratio term weighing nothing",
        {**AGAINST_STUDENT, "objective.weight": 0.0, "pairs.phi": 0.0},
    ),
    "orpo-teacher-negatives": Method(
        "ORPO against the teacher's wrong traces, where student and teacher have some, as many of one as of the other",
        {**ORPO, "pairs.phi": 0.0, "pairs.negatives_from": "teacher", "pairs.matched": True},
    ),
    "orpo-student-negatives": Method(
        "ORPO against the initial student's wrong traces, on the problems of orpo-teacher-negatives",
        {**ORPO, "pairs.phi": 0.0, "pairs.negatives_from": "student", "pairs.matched": True},
    ),
    "orpo-off": Method(
        "ORPO against the initial student's wrong traces (phi 0)", {**AGAINST_STUDENT, "pairs.phi": 0.0}
    ),
    "orpo-mixed": Method(
        "ORPO with part of the wrong traces from the latest student (phi of the config)", AGAINST_STUDENT
    ),
    "orpo-on": Method(
        "ORPO against the latest student's wrong traces only (phi 1)",
        {**AGAINST_STUDENT, "pairs.phi": 1.0, "pairs.on_empty": "skip"},
    ),
    "orpo-adaptive": Method(
        "ORPO with a phi that follows the yield of the latest student's wrong traces (from round 3 on)",
        {**AGAINST_STUDENT, "pairs.phi": "adaptive"},
    ),
    "orpo-expo": Method(
        "orpo-mixed, its student moved on along what training changed (ExPO, alpha chosen on validation)",
        {**AGAINST_STUDENT, "extrapolate": {}},
    ),
    "mallows-orpo": Method(
        "orpo-off, its weight scaled by how sure the initial student is of the two texts",
        {"objective": "mallows_orpo", **FROM_STUDENT, "pairs.phi": 0.0},
    ),
    "dpo": Method(
        "dDPO: DPO on the rows of orpo-off, after an epoch of likelihood that is also its reference",
        {"objective": "dpo", **AFTER_SFT},
    ),
    "dpo-nll": Method(
        "dpo with the chosen side's likelihood beside it (3D-properties)",
        {"objective": "dpo", "objective.nll_weight": 1.0, **AFTER_SFT},
    ),
    "flex-dpo": Method("dpo with a smaller weight on the rejected side", {"objective": "flex_dpo", **AFTER_SFT}),
    "mallows-dpo": Method(
        "dpo scaled by how sure the reference is of the two texts", {"objective": "mallows_dpo", **AFTER_SFT}
    ),
    "sppo": Method(
        "SPPO: both sides regressed to targets, against the student that each round starts from",
        {"objective": "sppo", **AFTER_SFT},
    ),
    "dadpo": Method(
        "daDPO: dpo held close to the teacher's distribution too; needs the teacher's log-probabilities of given texts",
        {"objective": "dadpo", **AFTER_SFT},
    ),
    "uld": Method(
        "ULD: likelihood, and the teacher's sorted probabilities; needs its distributions, in whatever tokens",
        {"objective": "uld"},
    ),
    "gkd": Method(
        "GKD: the teacher's distributions on its texts and on the student's own; needs a teacher of one vocabulary",
        {"objective": "gkd"},
    ),
    "minillm": Method(
        "MiniLLM: reverse KL to the teacher, on texts that both write together; needs a teacher of one vocabulary",
        {"objective": "minillm", **WARMED},
    ),
}
RELATIVES = ("dpo", "dpo-nll", "flex-dpo", "mallows-dpo", "sppo", "dadpo")
WHITE_BOX = ("uld", "gkd", "minillm")
EXTRA = ("orpo-student-negatives", "orpo-adaptive", "orpo-expo", "mallows-orpo", *RELATIVES, *WHITE_BOX)
"""Not in the default list: what comes with another, or is not the paper's."""
DEFAULT = tuple(name for name in METHODS if name not in EXTRA)
PRIMARY = (
    ("orpo-mixed", "orpo-off"),
    ("orpo-mixed", "orpo-on"),
    ("orpo-off", "orpo-zero"),
    ("orpo-student-negatives", "orpo-teacher-negatives"),
)
"""The contrasts that the paper's claims stand on, first minus second."""

EXPLORATORY = (
    ("single-cot", "zero-shot"),
    ("diverse-cot", "single-cot"),
    ("orpo-off", "diverse-cot"),
    ("orpo-mixed", "diverse-cot"),
    ("orpo-on", "diverse-cot"),
    ("orpo-mixed", "zero-shot"),
    ("orpo-adaptive", "orpo-mixed"),
    ("orpo-expo", "orpo-mixed"),
    ("mallows-orpo", "orpo-off"),
    ("dpo", "orpo-off"),
    ("dadpo", "dpo"),
    *((name, "diverse-cot") for name in (*RELATIVES, *WHITE_BOX)),
)
PHI_OF_MIXED = 0.5  # where the config has 0 or 1


@dataclass(frozen=True, slots=True)
class Sweep:
    """One setting at several values. `method` names the value's row."""

    key: str
    values: tuple[Any, ...]

    def method(self, value: Any) -> str:
        """The name of one value's row, such as `pairs.phi=0.25`."""
        return f"{self.key}={value}"

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers, which may have a trend."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def parse_sweep(text: str) -> Sweep:
    """A sweep from `key=value,value,...`; `K` stands for `pairs.traces`. Raises ConfigError."""
    key, equals, values = text.partition("=")
    try:
        found = parse_yaml(f"[{values}]") if key and equals and values else []
    except yaml.YAMLError as error:
        raise ConfigError(f"expected key=value,value,... in --sweep, found {text!r}: {error}") from error
    if len(found) < 2 or any(value in found[:place] for place, value in enumerate(found)):
        raise ConfigError(
            f"expected --sweep key=value,value,... with two different values or more, found {text!r}; "
            "for instance pairs.phi=0,0.5,1"
        )
    return Sweep("pairs.traces" if key == "K" else key, tuple(found))


def parse_methods(text: str) -> list[str]:
    """Method names from a list with commas, in the table's order. Raises ConfigError for an unknown one.

    `orpo-teacher-negatives` brings its counterpart with it.
    """
    asked = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(asked - METHODS.keys()):
        near = get_close_matches(unknown[0], METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"expected methods out of {', '.join(METHODS)}, found {unknown[0]!r}{hint}")
    if "orpo-teacher-negatives" in asked:
        asked.add("orpo-student-negatives")
    return [name for name in METHODS if name in asked]


def is_defined(method: str, config: Config) -> bool:
    """Whether the config has what a method is about: several traces of the teacher a problem, where it needs them."""
    most = config.teacher.max_samples or config.teacher.samples
    trained = min(most, *(limit or most for limit in (config.pairs.traces, config.pairs.max_chosen)))
    return trained > 1 or not METHODS[method].needs_several_traces


def configured(config: Config, method: str, sweeps: Sequence[Sweep] = ()) -> Config:
    """The config of a method, or of one value of a sweep. Raises ConfigError."""
    for sweep in sweeps:
        for value in sweep.values:
            if sweep.method(value) == method:
                return overlaid(config, {sweep.key: value})
    settings = dict(METHODS[method].settings)
    for section in ("warmup", "extrapolate"):
        if getattr(config, section) is not None:
            settings.pop(section, None)  # the config's own
    if method in ("orpo-mixed", "orpo-expo") and config.pairs.phi in (0, 1):
        settings["pairs.phi"] = PHI_OF_MIXED
    if name := settings.get("objective"):
        settings["objective"] = _objective(config, name)
    return overlaid(config, settings)


def _objective(config: Config, name: str) -> dict[str, Any]:
    """An objective with the options that mean the same in the config's: those of the base that both have.

    An option that the objective gives a default of its own (SPPO's reference) is its own.
    """
    own = component_class(Objective, name)
    shared: Any = next(base for base in own.__mro__ if isinstance(config.objective, base))
    fields = {option: field.default for option, field in shared.model_fields.items()}
    kept = [option for option in sorted(fields) if own.model_fields[option].default == fields[option]]
    return {"type": name, **{option: getattr(config.objective, option) for option in kept}}


def overlaid(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values at dotted keys. Raises ConfigError, naming the key."""
    data = config.model_dump(mode="json")
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                raise ConfigError(f"expected a setting of the config, found {key!r}: {parent!r} holds no settings")
            place = place[parent]
        place[last] = value
    return parse_config(data)
