"""Cells: the runs of a comparison, each a config of its own, and how many of their stages are made only once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, get_args

from orpo_distill.additions import CHOSEN
from orpo_distill.compare.methods import METHODS, Sweep, configured, is_defined, overlaid, parse_methods, parse_sweep
from orpo_distill.component import type_name
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError
from orpo_distill.objectives.dpo import AgainstReference
from orpo_distill.plan import plan, select
from orpo_distill.runs import SHARED, Stage, flat_options

Budget = Literal["epochs", "tokens"]
SEARCHED = "search"  # in the names of runs that only look for a learning rate
LONGEST_NAME = 100  # letters of a run's name that are kept as they are
FACTORS = (0.5, 1, 2)  # of the config's learning rate: what is tried
LOW_FACTORS = (0.003, 0.01, 0.03, 0.1)  # for losses on sums of log-ratios (Zephyr: 5e-7 behind likelihood's 2e-5)
FIXED = {
    "train.learning_rate": "; give the rates to choose from with --learning-rates",
    "train.steps_per_round": "; see --budgets",
    "seed": "; see --seeds",
    "traces_seed": "; see --vary traces",
    "evaluate.limit": "; differences are taken on the same test problems",
    **dict.fromkeys(
        ("problems.test", "problems.seed", "task.type", "task.path", "task.hub_id", "task.hub_config"),
        "; differences are taken on the same test problems",
    ),
    **dict.fromkeys(("evaluate.test", "evaluate.sft", "evaluate.teacher", "train.keep", "name", "runs", "ledger"), ""),
}
"""Settings that a comparison decides itself, each with where to ask for something like it: they cannot be swept."""


@dataclass(frozen=True)
class Block:
    """One student on one task: a config of the comparison. Differences are taken inside a block."""

    name: str  # in front of its runs' names; empty if there is only one
    config: Config

    @property
    def task(self) -> str:
        """The task's name."""
        return type_name(type(self.config.task))

    @property
    def student(self) -> str:
        """The student's name, without folders."""
        return Path(self.config.student.model).name


@dataclass(frozen=True)
class Cell:
    """One run of a comparison. `seed` and `budget` are None where they change nothing (zero-shot)."""

    block: Block
    method: str
    seed: int | None
    budget: Budget | None
    config: Config
    until: str  # the stage that it needs

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.seed is not None


@dataclass(frozen=True)
class Design:
    """What is compared: `methods` and values of `sweeps`, over `seeds` seeds, with the best of `learning_rates`."""

    blocks: tuple[Block, ...]
    folder: Path
    methods: tuple[str, ...]
    sweeps: tuple[Sweep, ...] = ()
    seeds: int = 3
    learning_rates: tuple[float, ...] = ()  # empty: multiples of each config's
    budgets: tuple[Budget, ...] = ("epochs", "tokens")
    vary_traces: bool = False

    def trained_methods(self, block: Block) -> list[str]:
        """All rows of a block that are trained: methods that its data allow, then values of sweeps."""
        own = [name for name in self.methods if METHODS[name].trains and is_defined(name, block.config)]
        return own + self.swept()

    def left_out(self, method: str) -> list[Block]:
        """The blocks that have too few traces for a method."""
        return [block for block in self.blocks if not is_defined(method, block.config)]

    def swept(self) -> list[str]:
        """The rows of sweeps, one a value."""
        return [sweep.method(value) for sweep in self.sweeps for value in sweep.values]

    def seeds_of(self, block: Block) -> range:
        """The seeds of a block's runs."""
        return range(block.config.seed, block.config.seed + self.seeds)

    @property
    def searches(self) -> bool:
        """Whether learning rates are chosen on validation."""
        return len(self.learning_rates) != 1

    def rates_of(self, block: Block, method: str) -> tuple[float, ...]:
        """The learning rates that a method chooses from."""
        config = block.config
        low = isinstance(self._of(block, method).objective, AgainstReference)
        factors = LOW_FACTORS if low and not isinstance(config.objective, AgainstReference) else FACTORS
        return self.learning_rates or tuple(float(f"{config.train.learning_rate * each:.6g}") for each in factors)

    def baseline(self, block: Block) -> Cell:
        """The initial student, as it is."""
        return Cell(block, "zero-shot", None, None, self._config(block, block.config, "zero-shot", {}), "baseline")

    def searching(self, block: Block, method: str, rate: float) -> Cell:
        """A run that measures one learning rate on validation, with the block's first seed and equal epochs."""
        seed = self.seeds_of(block)[0]
        name = f"{SEARCHED}-{method}-lr{rate:g}-s{seed}"
        extra = {"evaluate.test": False}
        config = self._config(block, self._of(block, method), name, self._seeded(block, seed, rate, None) | extra)
        until = CHOSEN if config.extrapolate else f"round-{config.rounds}/evaluate"
        return Cell(block, method, seed, "epochs", config, until)

    def trained(
        self, block: Block, method: str, seed: int, rate: float, budget: Budget, steps: int | None = None
    ) -> Cell:
        """A run that counts: rounds of `steps` optimizer steps, or an epoch each."""
        config = self._config(
            block, self._of(block, method), f"{method}-{budget}-s{seed}", self._seeded(block, seed, rate, steps)
        )
        return Cell(block, method, seed, budget, config, "report")

    def _of(self, block: Block, method: str) -> Config:
        return configured(block.config, method, self.sweeps)

    def _seeded(self, block: Block, seed: int, rate: float, steps: int | None) -> dict[str, object]:
        base = block.config
        fixed = base.seed if base.traces_seed is None else base.traces_seed
        return {
            "seed": seed,
            "traces_seed": seed if self.vary_traces else fixed,
            "train.learning_rate": rate,
            "train.steps_per_round": steps,
            "train.keep": "all",  # rounds are shared; what nobody needs any more is deleted between seeds
        }

    def _config(self, block: Block, config: Config, name: str, settings: Mapping[str, object]) -> Config:
        own = {"name": (f"{block.name}-" if block.name else "") + _file_name(name), "runs": str(self.folder)}
        controls = {"evaluate.test": True, "evaluate.sft": False, "evaluate.teacher": False}  # methods of their own
        return overlaid(config, {**controls, **settings, **own, **self._accounts(config), **_warmup(block, config)})

    def _accounts(self, config: Config) -> dict[str, str]:
        """One account for what all runs buy, so that a budget holds for the comparison and not for each run."""
        samplers = {"teacher": config.teacher.sampler, "student": config.student.sampler}
        return {
            f"{role}.sampler.account": self.folder.name
            for role, sampler in samplers.items()
            if getattr(sampler, "account", None) == ""
        }


def _warmup(block: Block, config: Config) -> dict[str, float]:
    """A warm-up keeps the config's learning rate, whatever the rounds behind it are trained with."""
    if config.warmup is None or config.warmup.learning_rate is not None:
        return {}
    return {"warmup.learning_rate": block.config.train.learning_rate}


def _file_name(name: str) -> str:
    """A name that a run may have, another one for every name: `pairs.phi=0.5` becomes `pairs.phi-0.5`.

    What needs more than that for its equals sign, or is long, gets a part of its hash.
    """
    plain = name.replace("=", "-", 1)
    written = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in plain)
    if written == plain and len(plain) <= LONGEST_NAME:
        return plain
    return f"{written[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Wanted:
    """A comparison in the words of the command line."""

    methods: str
    sweeps: tuple[str, ...] = ()
    seeds: int = 3
    learning_rates: str | None = None
    budgets: str = "epochs,tokens"
    vary_traces: bool = False
    name: str | None = None


def design_of(configs: Sequence[Config], wanted: Wanted) -> Design:
    """The comparison that was asked for. Raises ConfigError for words that mean nothing, or settings that clash."""
    if not configs:
        raise ConfigError("expected a config to compare methods on, found none; name at least one file")
    if open_ended := next((config.name for config in configs if config.task.open_ended), None):
        raise ConfigError(
            f"expected tasks with gold answers, found an open-ended one in {open_ended}: compare counts right answers; "
            "run the configs one by one, their reports have win rates against the initial student"
        )
    methods = parse_methods(wanted.methods)
    sweeps, budgets = _sweeps(wanted.sweeps), _budgets(wanted.budgets)
    if sweeps and "epochs" not in budgets:
        raise ConfigError(
            f"expected epochs in --budgets beside --sweep, which is run with equal epochs, found {wanted.budgets!r}; "
            "add epochs or leave --sweep out"
        )
    name = _folder_name(wanted.name or f"{configs[0].name}-compare")
    design = Design(
        blocks=_blocks(configs),
        folder=configs[0].runs / name,
        methods=tuple(methods),
        sweeps=sweeps,
        seeds=wanted.seeds,
        learning_rates=_rates(wanted.learning_rates),
        budgets=budgets,
        vary_traces=wanted.vary_traces,
    )
    if not any(design.trained_methods(block) for block in design.blocks) and "zero-shot" not in methods:
        found = "diverse-cot, where one teacher trace a problem is used" if methods else "none"
        raise ConfigError(f"expected methods or a sweep to compare, found {found}; see --methods and --sweep")
    for block in design.blocks:  # every config is made once, so that what is wrong is said now
        for method in design.trained_methods(block):
            design.trained(block, method, block.config.seed, block.config.train.learning_rate, "epochs")
    return design


def _folder_name(name: str) -> str:
    if name == SHARED or name != _file_name(name) or name.startswith((".", "-")):
        raise ConfigError(
            f"expected a --name of at most {LONGEST_NAME} letters, digits, dots, - and _, other than {SHARED!r}, found "
            f"{name!r}"
        )
    return name


def _sweeps(texts: Sequence[str]) -> tuple[Sweep, ...]:
    """Raises ConfigError for a setting that stands twice or is not free."""
    sweeps = tuple(parse_sweep(text) for text in texts)
    for place, sweep in enumerate(sweeps):
        if sweep.key in [other.key for other in sweeps[:place]]:
            raise ConfigError(f"expected one --sweep of each setting, found {sweep.key} twice; name its values in one")
        for fixed, instead in FIXED.items():
            if f"{fixed}.".startswith(f"{sweep.key}."):
                raise ConfigError(f"expected --sweep of a setting that compare leaves alone, found {fixed}{instead}")
    return sweeps


def _rates(text: str | None) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(",")) if text else ()
    except ValueError:
        rates = (0.0,)
    if any(not 0 < rate < inf for rate in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"expected different numbers above 0, with commas, in --learning-rates, found {text!r}")
    return rates


def _budgets(text: str) -> tuple[Budget, ...]:
    names = [name.strip() for name in text.split(",")]
    if not names or not set(names) <= set(get_args(Budget)):
        raise ConfigError(f"expected epochs, tokens or both, with a comma, in --budgets, found {text!r}")
    return tuple(budget for budget in get_args(Budget) if budget in names)


def _blocks(configs: Sequence[Config]) -> tuple[Block, ...]:
    """One block a config. Raises ConfigError if two have the same name."""
    twice = [name for name, count in Counter(config.name for config in configs).items() if count > 1]
    if twice:
        raise ConfigError(f"expected configs with different names, found {twice[0]!r} twice; change its `name`")
    return tuple(Block(config.name if len(configs) > 1 else "", config) for config in configs)


def stages_of(cell: Cell) -> list[Stage]:
    """The stages that a cell needs."""
    return select(plan(cell.config), cell.until)


def recipes(stages: Iterable[Stage]) -> dict[str, str]:
    """A key for each stage that is the same for two stages exactly if they do the same from the same beginnings."""
    keys: dict[str, str] = {}
    for stage in stages:
        inputs = {name: keys[source] for name, source in stage.inputs.items()}
        plain = json.dumps([stage.work, flat_options(stage), inputs, stage.own and stage.name], sort_keys=True)
        keys[stage.name] = hashlib.sha256(plain.encode()).hexdigest()
    return keys
