"""How stages are started: whose sampling is spread over processes."""

from pathlib import Path
from typing import Any

import pytest

from orpo_distill import launch
from orpo_distill.config import LaunchSection
from orpo_distill.launch import Launcher
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from tests.test_end_to_end import experiment


def test_all_that_a_checkpoint_writes_is_spread_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and answers alike; in front of the call that merges them. Not what a server is asked for."""
    started: list[tuple[str, int]] = []
    monkeypatch.setattr(launch, "run_jobs", lambda stage, jobs: started.append((stage, len(jobs))))
    monkeypatch.setattr(launch, "call", lambda work, options, inputs, out: {})
    teacher = "teacher.sampler={type: openai, base_url: 'http://127.0.0.1:9/v1'}"
    start: Any = Launcher(LaunchSection.model_validate({"sample": {"processes": 3}}))
    for stage in plan(load_config(experiment(tmp_path), [teacher])):
        if stage.name in ("teacher", "student-0", "baseline", "round-1/evaluate", "round-1/pairs"):
            start(stage, {}, tmp_path)
    assert started == [("student-0", 3), ("baseline", 3), ("round-1/evaluate", 3)]
