"""What a late stage would refuse is refused before the first. More: test_white_box_end_to_end, test_open_ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_distill.ahead import check_ahead
from orpo_distill.errors import ConfigError
from orpo_distill.experiment import run
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from tests.test_end_to_end import experiment


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
    with pytest.raises(ConfigError, match=f"expected validation problems {what}, found no split 'validation'"):
        run(load_config(path))
    assert not list(tmp_path.rglob("stage.json"))
    check_ahead(plan(load_config(path, ["problems.holdout=2"])))
