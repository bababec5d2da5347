"""The page of a comparison: every seed and the mean, and no winner that the test does not carry."""

import copy
import re

import pytest

from orpo_distill.errors import DataError
from orpo_distill.page import comparison_page
from tests.page.reading import Seen

PLACE = {"task": "toy", "student": "tiny", "budget": "epochs"}


def cell(method: str, seed: int, correct: int) -> dict:
    accuracy = correct / 200
    counts = {"n": 200, "correct": correct, "accuracy": accuracy, "low": accuracy - 0.07, "high": accuracy + 0.07}
    tokens = {"trained_tokens": 1000 * seed, "sampled_tokens": 5000, "scored_tokens": 700}
    cost = {"learning_rate": 0.001, **tokens, "seconds": 60.0}
    rest = {"parsed": 1.0, "truncated": None, "majority": 0.1, "run": f"runs/{method}-{seed}"}
    return {"method": method, "seed": seed, **PLACE, **counts, **cost, **rest}


def contrast(a: str, b: str, difference: float | None, p_holm: float | None, family: str, weak: bool = True) -> dict:
    seeds = [{"seed": seed, "n": 200, "difference": difference, "only_a": 9, "only_b": 2, "p": 0.06} for seed in (0, 1)]
    spread = None if difference is None else 0.05
    low, high = (None, None) if spread is None else (difference - spread, difference + spread)
    numbers = {"difference": difference, "low": low, "high": high, "p": 0.01, "p_holm": p_holm, "smallest": 0.081}
    return {
        "a": a,
        "b": b,
        **PLACE,
        "n": 200,
        "seeds": seeds,
        **numbers,
        "family": family,
        "interval": "t",
        "weak": weak,
    }


CONTENT = {
    "name": "toys",
    "version": "0.1.0",
    "command": "orpo-distill compare toy.yaml",
    "notes": ["Results on one trace set."],
    "methods": {
        "orpo-mixed": {"about": "half and half", "settings": {"pairs.phi": 0.5}},
        "orpo-off": {"about": "initial student", "settings": {"pairs.phi": 0}},
        "orpo-on": {"about": "latest student", "settings": {}},
    },
    "cells": [
        *(cell("orpo-mixed", seed, 150 + 10 * seed) for seed in (0, 1)),
        *(cell("orpo-off", seed, 130) for seed in (0, 1)),
        cell("orpo-on", 0, 190),
    ],
    "search": [
        {"method": "orpo-off", **PLACE, "seed": 0, "learning_rate": rate, "n": 50, "correct": correct, "chosen": chosen}
        for rate, correct, chosen in ((0.001, 40, True), (0.01, 20, False))
    ],
    "contrasts": [
        contrast("orpo-mixed", "orpo-off", 0.125, 0.02, "primary"),
        contrast("orpo-mixed", "orpo-on", -0.15, 0.30, "primary", weak=False),
        contrast("orpo-off", "orpo-zero", None, None, "primary"),
        contrast("orpo-on", "orpo-off", 0.3, 0.001, "exploratory"),
    ],
    "trends": [
        {
            "key": "pairs.phi",
            **PLACE,
            "values": [0, 0.5, 1],
            "accuracies": [0.65, 0.775, 0.95],
            "slope": 0.3,
            "low": 0.1,
            "high": 0.5,
            "p": 0.004,
            "interval": "t over seeds",
            "weak": True,
        }
    ],
}


def test_every_seed_and_the_mean_stand_in_the_table() -> None:
    seen = Seen(comparison_page(CONTENT))
    row = seen.row("orpo-mixed", "epochs")
    assert row[2:5] == ["75.0% (68.0% to 82.0%)", "80.0% (73.0% to 87.0%)", "77.5%"]
    assert seen.row("orpo-on", "epochs")[3] == "–"
    assert seen.row("orpo-off", "toy, tiny", "0", "80.0%, chosen", "40.0%")
    assert seen.row("pairs.phi")[-2:] == ["0.004", "t over seeds (weak)"]
    assert seen.row("orpo-mixed", "toy, tiny, epochs", "2", "0.001", "500", "5,000", "700", "60 s")


def test_only_what_the_corrected_test_carries_is_called_a_difference() -> None:
    seen = Seen(comparison_page(CONTENT))
    assert seen.row("orpo-mixed - orpo-off")[-2] == "differs (weak: few seeds)"
    assert seen.row("orpo-mixed - orpo-on")[-2] == "no difference shown"
    assert seen.row("orpo-off - orpo-zero")[-2] == "not tested (weak: few seeds)"
    assert seen.row("orpo-on - orpo-off")[-2] == "exploratory (weak: few seeds)"
    headline = "1 of 3 primary contrasts differ at the corrected 5% level: orpo-mixed above orpo-off by 12.5 points"
    assert headline in seen.text
    assert not seen.tags & {"b", "em"}


def test_without_a_carried_contrast_nobody_is_above_anybody() -> None:
    content = copy.deepcopy(CONTENT)
    for each in content["contrasts"]:
        each["p_holm"] = 0.051 if each["family"] == "primary" else 1e-9
    seen = Seen(comparison_page(content))
    assert "0 of 3 primary contrasts differ" in seen.text
    assert " above " not in seen.text
    assert "differs" not in seen.text


def test_what_runs_warn_of_is_named_once_with_its_runs() -> None:
    content = copy.deepcopy(CONTENT)
    assert "What runs warn of" not in Seen(comparison_page(content)).text
    for each in content["cells"][:2]:
        each["warnings"] = ["chosen falls while the margin grows: round 1, -1.0 to -1.2"]
    row = Seen(comparison_page(content)).row("chosen falls while the margin grows")
    assert row[1:] == ["2", "runs/orpo-mixed-0, runs/orpo-mixed-1"]


def test_a_negative_difference_names_the_other_one() -> None:
    content = copy.deepcopy(CONTENT)
    content["contrasts"] = [contrast("orpo-mixed", "orpo-on", -0.15, 0.01, "primary")]
    assert "orpo-on above orpo-mixed by 15.0 points" in Seen(comparison_page(content)).text


def test_every_number_may_be_missing() -> None:
    def emptied(value: object) -> object:
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [emptied(item) for item in value]
        return None if isinstance(value, int | float) and not isinstance(value, bool) else value

    content = emptied(CONTENT)
    content["search"] = []
    seen = Seen(comparison_page(content))
    assert "0 of 3 primary contrasts differ" in seen.text
    assert not re.search(r"\bNone\b|\bnan\b", seen.text)


def test_nothing_measured_yet_is_a_page_too() -> None:
    content = {**CONTENT, "cells": [], "contrasts": [], "search": [], "trends": []}
    seen = Seen(comparison_page(content))
    assert "No cell has been measured yet." in seen.text


@pytest.mark.parametrize("spoil", [{"cells": [{}]}, {"cells": None}, {"contrasts": [{"family": "primary"}]}])
def test_another_format_is_one_message(spoil: dict) -> None:
    with pytest.raises(DataError, match="expected a comparison"):
        comparison_page({**CONTENT, **spoil})


def test_the_page_is_a_function_of_its_content() -> None:
    assert comparison_page(CONTENT) == comparison_page(copy.deepcopy(CONTENT))


def test_configs_with_the_same_task_and_student_stand_apart() -> None:
    """Two configs that differ in something else: neither their means nor their learning rates are mixed."""
    content = copy.deepcopy(CONTENT)
    for rows in (content["cells"], content["search"], content["contrasts"], content["trends"]):
        for row in rows:
            row["block"] = "first"
        rows += [{**copy.deepcopy(row), "block": "second"} for row in rows]
    for row in content["cells"]:
        if row["block"] == "second":
            row["accuracy"] = 0.1
    for row in content["search"]:
        if row["block"] == "second":
            row["correct"], row["chosen"] = 5, not row["chosen"]
    seen = Seen(comparison_page(content))
    text = seen.text
    assert "Accuracy, first, toy, tiny" in text
    assert "Accuracy, second, toy, tiny" in text
    for mean in ("77.5%", "10.0%"):  # of mixed: 75% and 80%; of everything in the second
        assert mean in text
    assert "first, toy, tiny, epochs" in text
    assert seen.row("orpo-off", "first, toy, tiny", "0", "80.0%, chosen", "40.0%")
    assert seen.row("orpo-off", "second, toy, tiny", "0", "10.0%", "10.0%, chosen")
