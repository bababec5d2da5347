"""Methods as settings over a config: what each changes, and every way to ask for one that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_distill.compare.methods import (
    DEFAULT,
    METHODS,
    PRIMARY,
    RELATIVES,
    configured,
    is_defined,
    parse_methods,
    parse_sweep,
)
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError
from orpo_distill.loading import parse_config
from orpo_distill.objectives.dpo import Dpo
from orpo_distill.objectives.mallows_orpo import MallowsOrpo
from orpo_distill.objectives.orpo import Orpo
from orpo_distill.objectives.sft import Sft
from orpo_distill.objectives.sppo import Sppo


def config(**changes: Any) -> Config:
    data = {
        "name": "demo",
        "task": {"type": "jsonl", "path": "data", "verifier": "number"},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
    }
    return parse_config(data | changes)


def test_the_controls_differ_in_one_thing_each() -> None:
    off, zero = configured(config(), "orpo-off"), configured(config(), "orpo-zero")
    assert zero == off.model_copy(update={"objective": Orpo(weight=0.0)})
    student, teacher = configured(config(), "orpo-student-negatives"), configured(config(), "orpo-teacher-negatives")
    assert student.pairs.model_copy(update={"negatives_from": "teacher"}) == teacher.pairs
    assert student.pairs.matched


@pytest.mark.parametrize(("phi", "expected"), [(0.25, 0.25), (0, 0.5), (1, 0.5), ([0, 0.2, 0.4, 0.6, 0.8], None)])
def test_mixed_takes_the_configs_phi_where_it_mixes(phi: Any, expected: float | None) -> None:
    base = config(pairs={"phi": phi})
    mixed = configured(base, "orpo-mixed").pairs.phi
    assert mixed == (base.pairs.phi if expected is None else expected)


def test_likelihood_is_measured_as_the_configs_objective_does() -> None:
    base = config(objective={"type": "orpo", "nll_on": "full", "nll_reduction": "batch_tokens", "weight": 0.3})
    single = configured(base, "single-cot")
    assert single.objective == Sft(nll_on="full", nll_reduction="batch_tokens")
    assert single.pairs.max_chosen == 1
    assert configured(base, "orpo-on").objective == base.objective
    assert configured(config(objective="sft"), "orpo-off").objective == Orpo()


def test_what_a_method_is_does_not_follow_the_config() -> None:
    base = config(pairs={"negatives_from": "teacher", "matched": True, "phi": 0})
    for method in ("orpo-zero", "orpo-off", "orpo-mixed", "orpo-on"):
        pairs = configured(base, method).pairs
        assert (pairs.negatives_from, pairs.matched) == ("student", False)


def test_relatives_take_the_rows_of_orpo_off_after_a_warm_up() -> None:
    off = configured(config(), "orpo-off")
    for method in RELATIVES:
        found = configured(config(), method)
        assert found.pairs == off.pairs and found.warmup is not None
        assert found.model_copy(update={"objective": off.objective, "warmup": None}) == off
    assert configured(config(), "dpo-nll").objective == Dpo(nll_weight=1.0)
    longer = config(warmup={"epochs": 3}, objective={"type": "dpo", "beta": 0.02})
    assert configured(longer, "dpo").warmup == longer.warmup
    assert configured(longer, "dpo").objective == Dpo(beta=0.02)
    assert not set(RELATIVES) & set(DEFAULT)


def test_expo_is_mixed_moved_on() -> None:
    expo, mixed = (configured(config(), name) for name in ("orpo-expo", "orpo-mixed"))
    assert expo.extrapolate is not None and expo.model_copy(update={"extrapolate": None}) == mixed
    own = config(extrapolate={"alpha": [0.2]}, pairs={"phi": 0})
    assert configured(own, "orpo-expo") == configured(own, "orpo-mixed")


def test_mallows_orpo_is_off_with_another_weight() -> None:
    base = config(objective={"type": "orpo", "weight": 0.3})
    off, found = (configured(base, name) for name in ("orpo-off", "mallows-orpo"))
    assert found.objective == MallowsOrpo(weight=0.3)
    assert found.model_copy(update={"objective": off.objective}) == off


def test_options_of_one_name_and_two_meanings_are_not_taken_over() -> None:
    """A beta of DPO is no beta of SPPO, nor its reference; how likelihood is measured is the same for both."""
    base = config(objective={"type": "dpo", "beta": 0.3, "nll_on": "full", "nll_weight": 0.2})
    assert configured(base, "sppo").objective == Sppo(nll_on="full", nll_weight=0.2)
    assert configured(base, "orpo-off").objective == Orpo(nll_on="full")


def test_dadpo_needs_a_teacher_that_scores() -> None:
    owned = {"model": "big", "sampler": {"type": "recorded", "path": "texts.jsonl"}}
    with pytest.raises(ConfigError, match="expected a teacher that can score given texts for dadpo, found recorded"):
        configured(config(teacher=owned), "dadpo")
    scored = configured(config(teacher=owned | {"scorer": "weights"}), "dadpo")
    assert scored.teacher.scored_by == "weights" and config().teacher.scored_by == "big"


def test_the_teachers_negatives_bring_their_counterpart() -> None:
    assert parse_methods("orpo-teacher-negatives") == ["orpo-teacher-negatives", "orpo-student-negatives"]
    named = parse_methods(",".join(DEFAULT))
    assert {name for pair in PRIMARY for name in pair} <= set(named)
    assert named == [name for name in METHODS if name in named]


def test_one_trace_a_problem_leaves_no_diversity() -> None:
    single = config(teacher={"model": "gold", "samples": 1})
    assert not any(is_defined("diverse-cot", each) for each in (single, config(pairs={"traces": 1})))
    assert is_defined("single-cot", single) and is_defined("diverse-cot", config())
    assert not is_defined("diverse-cot", config(pairs={"max_chosen": 1}))


def test_an_unknown_method_is_named_with_a_guess() -> None:
    with pytest.raises(ConfigError, match="'orpo-of'; did you mean 'orpo-off'"):
        parse_methods("orpo-of")


def test_a_sweep_is_rows_of_one_setting() -> None:
    sweep = parse_sweep("pairs.phi=0, 0.25,1")
    assert [sweep.method(value) for value in sweep.values] == ["pairs.phi=0", "pairs.phi=0.25", "pairs.phi=1"]
    assert sweep.is_numeric
    assert [configured(config(), sweep.method(value), [sweep]).pairs.phi for value in sweep.values] == [0, 0.25, 1]
    assert parse_sweep("K=2,4").key == "pairs.traces"
    assert not parse_sweep("pairs.pairing=cycle,random").is_numeric
    linear = parse_sweep("pairs.phi=0.5,{start: 0, end: 1}")
    assert configured(config(), linear.method(linear.values[1]), [linear]).pairs.phi.end == 1


@pytest.mark.parametrize(
    "text", ["pairs.phi", "pairs.phi=", "pairs.phi=0.5", "pairs.phi=1,1", "pairs.phi=1,1.0", "K=[1", "=1,2"]
)
def test_a_sweep_of_nothing_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_sweep(text)


@pytest.mark.parametrize("text", ["pairs.fi=0,1", "pears.phi=0,1", "seed.x=1,2"])
def test_a_sweep_of_an_unknown_setting_is_an_error(text: str) -> None:
    sweep = parse_sweep(text)
    with pytest.raises(ConfigError):
        configured(config(), sweep.method(sweep.values[0]), [sweep])
