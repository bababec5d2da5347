"""The runs of a comparison: names that never meet, and settings that are the comparison's own."""

from __future__ import annotations

import pytest

from orpo_distill.compare.cells import Design, Wanted, design_of
from orpo_distill.compare.results import _notes
from orpo_distill.errors import ConfigError
from tests.compare.test_methods import config


def designed(*sweeps: str) -> Design:
    return design_of([config(rounds=1)], Wanted("orpo-off", sweeps))


def test_every_run_has_a_name_of_its_own() -> None:
    """Letters that no name may have are replaced: what differs only in them must not share a folder."""
    design = designed(
        'task.prompt="{question}?","{question}!","{question}é"',
        f'teacher.prefix="{"a" * 300}b","{"a" * 300}c"',
        "pairs.phi=0,0.5",
    )
    block = design.blocks[0]
    names = [
        design.trained(block, method, 0, 1e-3, "epochs").config.name
        for method in design.trained_methods(design.blocks[0])
    ]
    assert len(set(names)) == len(names) == 8
    assert all(len(name) < 200 for name in names)
    assert "pairs.phi-0.5-epochs-s0" in names


@pytest.mark.parametrize(
    "sweep",
    [
        "train.learning_rate=1e-5,1e-4",
        "train.steps_per_round=2,4",
        "seed=1,2",
        "traces_seed=1,2",
        "evaluate.limit=10,20",
        "problems.seed=0,1",
        "problems={seed: 0},{seed: 1}",
        "task.path=a,b",
        "task=gsm8k,strategyqa",
        "evaluate={test: true},{limit: 5}",
        "name=a,b",
    ],
)
def test_what_a_comparison_decides_itself_cannot_be_swept(sweep: str) -> None:
    with pytest.raises(ConfigError, match="compare leaves alone"):
        designed(sweep)


def test_a_method_is_left_out_only_where_it_is_undefined() -> None:
    """One trace a problem is single-cot."""
    one = config(name="one", teacher={"model": "big", "samples": 1})
    design = design_of([config(name="many"), one], Wanted("single-cot,diverse-cot"))
    assert [design.trained_methods(block) for block in design.blocks] == [["single-cot", "diverse-cot"], ["single-cot"]]
    assert any(note.startswith("diverse-cot is left out of one:") for note in _notes(design, {}))
    assert [note for note in _notes(design_of([one], Wanted("single-cot,diverse-cot")), {}) if "left out: one" in note]
    with pytest.raises(ConfigError, match="found diverse-cot, where one teacher trace"):
        design_of([one], Wanted("diverse-cot"))


def test_a_setting_is_swept_once() -> None:
    with pytest.raises(ConfigError, match=r"pairs\.traces twice"):
        designed("K=1,2", "pairs.traces=2,4")


@pytest.mark.parametrize("name", ["shared", "..", "a/b", "-x", "é"])
def test_a_comparison_has_a_plain_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        design_of([config()], Wanted("orpo-off", name=name))


def test_a_budget_holds_for_the_whole_comparison() -> None:
    """Runs would each have an account of their own, and each could spend all of it."""
    api = {"type": "openai", "base_url": "http://localhost/v1"}
    design = design_of([config(teacher={"model": "big", "sampler": api})], Wanted("orpo-off,orpo-on"))
    block = design.blocks[0]
    runs = [design.trained(block, method, seed, 1e-3, "epochs") for method in design.methods for seed in (0, 1)]
    assert {run.config.teacher.sampler.account for run in runs} == {"demo-compare"}
    named = design_of([config(teacher={"model": "big", "sampler": {**api, "account": "mine"}})], Wanted("orpo-off"))
    assert named.trained(named.blocks[0], "orpo-off", 0, 1e-3, "epochs").config.teacher.sampler.account == "mine"


def test_a_warm_up_has_the_learning_rate_of_the_config_whatever_the_rounds_have() -> None:
    design = design_of([config()], Wanted("dpo,orpo-off"))
    block = design.blocks[0]
    for rate in (1e-5, 1e-3):
        trained = design.trained(block, "dpo", 0, rate, "epochs").config
        assert trained.train.learning_rate == rate
        assert trained.warmup is not None
        assert trained.warmup.learning_rate == block.config.train.learning_rate
    assert design.trained(block, "orpo-off", 0, 1e-3, "epochs").config.warmup is None


def test_losses_on_log_ratios_try_lower_learning_rates() -> None:
    """Unless the config has one itself, whose learning rate is then meant for it, or the rates are given."""
    methods = Wanted("orpo-off,dpo,dadpo,minillm,zero-shot")
    base = config(train={"learning_rate": 1e-3})
    design = design_of([base], methods)
    rates = {method: design.rates_of(design.blocks[0], method) for method in design.trained_methods(design.blocks[0])}
    usual, low = (5e-4, 1e-3, 2e-3), (3e-6, 1e-5, 3e-5, 1e-4)
    assert rates == {"orpo-off": usual, "dpo": low, "dadpo": low, "minillm": usual}
    own = design_of([config(objective="dpo", train={"learning_rate": 1e-6})], methods)
    assert own.rates_of(own.blocks[0], "dpo") == (5e-7, 1e-6, 2e-6)
    given = design_of([base], Wanted("orpo-off,dpo", learning_rates="1e-4,1e-5"))
    assert given.rates_of(given.blocks[0], "dpo") == given.rates_of(given.blocks[0], "orpo-off") == (1e-4, 1e-5)
