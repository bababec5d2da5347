"""An adaptive phi: its plan, and a run of four rounds in which the student improves until it has no negatives left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_distill.config import Config
from orpo_distill.experiment import run, status
from orpo_distill.loading import load_config, parse_config
from orpo_distill.plan import plan
from orpo_distill.preview import plan_table
from orpo_distill.records import FinishReason, Pair, Trace, read_jsonl
from orpo_distill.runs import Stage
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from tests.test_end_to_end import experiment


class Improving(Sampler):
    """Initially always wrong; after a round every other sample is wrong, after two none. Never writes a text twice."""

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        trained = int(found[1]) if (found := re.search(r"/round-(\d+)/train", model)) else 0

        def generate(requests: Iterable[Request], _: Decoding) -> Iterator[Completion]:
            for request in requests:
                wrong = trained == 0 or (trained == 1 and request.sample_index % 2 == 0)
                answer = 1 if wrong else 2 * int(request.problem_id[1:])
                text = f"Try {request.sample_index} after {trained}. The answer is {answer}."
                yield Completion(request, text, FinishReason.STOP, 5, 8, "")

        yield generate


def config_of(folder: Path, **pairs: Any) -> Config:
    return load_config(
        experiment(
            folder,
            rounds=4,
            pairs={"phi": "adaptive", **pairs},
            student={
                "model": str(folder / "tiny"),
                "samples": 4,
                "sampler": {"type": "tests.test_curriculum:Improving"},
            },
            evaluate={},
        )
    )


def by_name(config: Config) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(config)}


BASE: dict[str, Any] = {
    "name": "x",
    "task": "gsm8k",
    "teacher": {"model": "big"},
    "student": {"model": "little"},
    "rounds": 4,
}


def test_the_word_and_the_mapping_are_the_same_and_survive_writing() -> None:
    short = parse_config(BASE | {"pairs": {"phi": "adaptive"}})
    long = parse_config(BASE | {"pairs": {"phi": {"adaptive": "yield", "start": 0.5}}})
    assert short == long
    assert parse_config(yaml.safe_load(yaml.safe_dump(short.model_dump(mode="json")))) == short


def test_the_plan_finds_phi_from_round_3_on() -> None:
    stages = by_name(parse_config(BASE | {"pairs": {"phi": {"adaptive": "diversity", "start": 0.3}}}))
    assert [name for name in stages if name.endswith("/phi")] == ["round-3/phi", "round-4/phi"]
    assert stages["round-2/student"].options.phi == stages["round-2/pairs"].options.phi == 0.3  # type: ignore[attr-defined]
    assert stages["round-3/phi"].inputs == {
        "problems": "problems",
        "initial": "student-0",
        "initial-verdicts": "student-0-verdicts",
        "latest": "round-2/student",
        "latest-verdicts": "round-2/student-verdicts",
    }
    assert stages["round-4/phi"].inputs["phi"] == "round-3/phi"
    for name in ("round-4/student", "round-4/pairs"):
        assert stages[name].options.phi is None  # type: ignore[attr-defined]
        assert stages[name].inputs["phi"] == "round-4/phi"
    names = list(stages)
    for stage in stages.values():
        assert all(names.index(source) < names.index(stage.name) for source in stage.inputs.values())


@pytest.mark.parametrize("changes", [{"objective": "sft"}, {"pairs": {"negatives_from": "teacher"}}], ids=str)
def test_without_student_negatives_there_is_nothing_to_adapt(changes: dict[str, Any]) -> None:
    pairs = {"phi": "adaptive", **changes.pop("pairs", {})}
    stages = by_name(parse_config(BASE | {"pairs": pairs} | changes))
    assert not [name for name in stages if name.endswith(("/phi", "/student"))]
    assert "phi" not in stages["round-3/pairs"].inputs


def test_check_shows_where_phi_moves(tmp_path: Path) -> None:
    table, _ = plan_table(config_of(tmp_path))
    sizes = dict(table)
    assert sizes["round-3/phi"] == "by what the negatives of round 2 are worth"
    assert sizes["round-2/student"].startswith("about 24 traces")
    assert sizes["round-3/student"].startswith("at most 48 traces")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive")
    run(config_of(folder))
    return folder


def metrics_of(folder: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs" / "demo" / stage / "manifest.json").read_bytes())["metrics"]
    return content


def test_phi_falls_with_the_yield_until_the_latest_is_not_asked(finished: Path) -> None:
    """Student-1 is wrong half as often as the initial student: phi 0.5 * 0.5 / 1. Student-2 never is: 0."""
    found = {stage: metrics_of(finished, stage) for stage in ("round-3/phi", "round-4/phi")}
    assert [(one["phi"], one["latest"], one["initial"]) for one in found.values()] == [
        (0.25, 0.5, 1.0),
        (0.0, 0.0, 1.0),
    ]
    assert [metrics_of(finished, f"round-{number}/pairs")["phi"] for number in (1, 2, 3, 4)] == [0.0, 0.5, 0.25, 0.0]
    run_folder = finished / "runs" / "demo"
    asked = [metrics_of(finished, f"round-{number}/student")["problems"] for number in (2, 3, 4)]
    assert asked[0] > asked[1] > asked[2] == 0
    assert list(read_jsonl(run_folder / "round-4" / "student" / "traces.jsonl", Trace)) == []
    policies = {row.rejected_policy for row in read_jsonl(run_folder / "round-4" / "pairs" / "pairs.jsonl", Pair)}
    assert policies == {"student-0"}


def test_report_and_status_show_phi(finished: Path) -> None:
    run_folder = finished / "runs" / "demo"
    assert "| phi | 0.25 |" in (run_folder / "report" / "report.md").read_text()
    rows = {name: (how, what) for name, how, what in status(run_folder)}
    assert {how for how, _ in rows.values()} == {"finished"}
    assert rows["round-3/phi"][1] == "0.25 phi, 0.5 latest, 1 initial"
    assert rows["round-4/student"][1].startswith("0 traces")


def test_the_second_run_does_nothing_and_another_one_gives_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(load_config(finished / "experiment.yaml"))
    assert "..." not in capsys.readouterr().err
    config = config_of(tmp_path)
    run(config, until="round-3/phi")
    run(config)
    for stage in ("round-3/phi/phi.json", "round-4/phi/phi.json", "round-4/pairs/pairs.jsonl"):
        assert (tmp_path / "runs/demo" / stage).read_bytes() == (finished / "runs/demo" / stage).read_bytes()


def test_another_phi_keeps_the_traces_that_it_still_needs(finished: Path, tmp_path: Path) -> None:
    """With `diversity` phi of round 3 is another one. What round 2 sampled stands, for its phi is still the start."""
    config = config_of(tmp_path)
    run(config, until="round-3/pairs")
    traces = tmp_path / "runs/demo/round-2/student/traces.jsonl"
    before = traces.stat().st_mtime_ns
    changed = config_of(tmp_path, phi={"adaptive": "diversity"})
    run(changed, until="round-3/pairs", redo=["round-3/phi"])
    assert metrics_of(tmp_path, "round-3/phi")["phi"] != 0.25
    assert traces.stat().st_mtime_ns == before
    metrics = metrics_of(tmp_path, "round-3/pairs")
    assert metrics["phi"] == metrics_of(tmp_path, "round-3/phi")["phi"]
