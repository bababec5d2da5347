"""What a late stage would refuse is refused before the first. More: test_white_box_end_to_end, test_open_ended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.ahead import check_ahead
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.experiment import run
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from tests.test_end_to_end import experiment
from tests.test_white_box_end_to_end import taught


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"extrapolate": {"alpha": [0, 0.1]}}, "for extrapolate"),
        ({"evaluate": {"test": False, "teacher": False}}, "for evaluate.test: false"),
    ],
)
def test_what_is_measured_on_validation_needs_some(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = experiment(tmp_path, **changes)
    check_ahead(plan(load_config(path)))
    (tmp_path / "data/validation.jsonl").unlink()
    with pytest.raises(ConfigError, match=f"expected validation problems {what}, found none in the task"):
        run(load_config(path))
    assert not list(tmp_path.rglob("stage.json"))
    check_ahead(plan(load_config(path, ["problems.holdout=2"])))


def test_what_stands_is_not_asked_for_and_what_will_be_made_anew_is(tmp_path: Path) -> None:
    """A finished run needs its white-box teacher no more, until it grows or a stage that reads it is redone."""
    path = taught(tmp_path, rounds=1, problems={"limit": 4})
    run(load_config(path), until="round-1/train")
    shutil.rmtree(tmp_path / "scorer")
    made = {stage: stage.stat().st_mtime_ns for stage in tmp_path.rglob("manifest.json")}
    run(load_config(path), until="round-1/train")
    for overrides, redo in (["problems.limit=6"], []), ([], ["teacher"]):
        with pytest.raises(ModelError, match=r"found nothing at .*scorer"):
            run(load_config(path, overrides), until="round-1/train", redo=redo)
    assert {stage: stage.stat().st_mtime_ns for stage in tmp_path.rglob("manifest.json")} == made


def test_a_model_that_is_to_score_is_looked_for(tmp_path: Path) -> None:
    path = taught(tmp_path, objective="dadpo", mechanisms={"enabled": False})
    shutil.rmtree(tmp_path / "scorer")
    with pytest.raises(ModelError, match=r"found nothing at .*scorer"):
        run(load_config(path))
    assert not list(tmp_path.rglob("stage.json"))


def test_problems_that_stand_say_whether_there_is_validation(tmp_path: Path) -> None:
    path = experiment(tmp_path, rounds=1)
    (tmp_path / "data/validation.jsonl").unlink()
    run(load_config(path), until="problems")
    with pytest.raises(ConfigError, match="expected validation problems for extrapolate"):
        run(load_config(path, ["extrapolate={}"]))
