"""Methods beside ORPO through the real command line: scores, warm-up, extrapolation, killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_distill.errors import ConfigError
from orpo_distill.experiment import run
from orpo_distill.loading import load_config
from orpo_distill.models import load_model
from orpo_distill.plan import plan
from orpo_distill.records import Pair, Score, read_jsonl
from tests.checkpoints import save_tiny_checkpoint
from tests.page.reading import Seen
from tests.test_end_to_end import COMMAND, cli, experiment, stable_files

DADPO = {"type": "dadpo", "beta1": 0.1, "beta2": 0.1}
QUIET = {"evaluate": {"teacher": False}, "mechanisms": {"problems": 4}}


def teacher(folder: Path) -> dict[str, Any]:
    """The scripted teacher, with a checkpoint of other letters that scores for it."""
    scorer = folder / "scorer"
    if not scorer.exists():
        save_tiny_checkpoint(scorer, seed=7)
    sampler = {"type": "scripted", "path": str(folder / "teacher.jsonl")}
    return {"model": "script", "samples": 2, "sampler": sampler, "scorer": str(scorer)}


def whole_experiment(folder: Path) -> Path:
    """daDPO after a warm-up, extrapolated."""
    return experiment(
        folder,
        teacher=teacher(folder),
        objective=DADPO,
        warmup={"epochs": 2, "learning_rate": 2e-3, "schedule": "constant"},
        extrapolate={"alpha": [0, 0.5]},
        **QUIET,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to the end."""
    folder = tmp_path_factory.mktemp("dadpo")
    done = cli("run", whole_experiment(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_scores_are_those_of_the_traces_that_the_pairs_use(finished: Path) -> None:
    run_dir = finished / "runs/demo"
    used: set[str] = set()
    for number in (1, 2):
        for pair in read_jsonl(run_dir / f"round-{number}/pairs/pairs.jsonl", Pair):
            used |= {pair.chosen_id, pair.rejected_id}
        for name in ("reference-scores", "teacher-scores"):
            stage = run_dir / f"round-{number}" / name
            assert {one.trace_id for one in read_jsonl(stage / "scores.jsonl", Score)} == used
    metrics = [json.loads((run_dir / f"round-{n}/teacher-scores/manifest.json").read_text())["metrics"] for n in (1, 2)]
    assert metrics[0]["scored"] + metrics[1]["scored"] == metrics[1]["traces"] == len(used)
    assert metrics[0]["same_tokens"] is True
    assert json.loads((run_dir / "report/report.json").read_text())["stages"]["round-1/teacher-scores"]["metrics"]


def test_the_warm_up_is_where_round_1_starts_and_its_reference(finished: Path) -> None:
    """At the first step the student is its own reference: no reward on either side."""
    run_dir = finished / "runs/demo"
    first = lines(run_dir / "round-1/train/log.jsonl")[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-4)
    warm = lines(run_dir / "warmup/train/log.jsonl")
    assert {line["learning_rate"] for line in warm[1:]} == {2e-3}
    assert [line["round"] for line in warm] == sorted(line["round"] for line in warm) and warm[-1]["round"] == 2
    chosen_only = list(read_jsonl(run_dir / "warmup/pairs/pairs.jsonl", Pair))
    assert all(not pair.rejected for pair in chosen_only)
    policies = [row["policy"] for row in json.loads((run_dir / "report/report.json").read_text())["results"]]
    assert "warmup" in policies
    assert not (run_dir / "warmup/train/checkpoint").exists()


def test_the_moved_student_is_arithmetic_on_the_weights(finished: Path) -> None:
    run_dir = finished / "runs/demo"
    names = (finished / "tiny", run_dir / "round-2/train/model", run_dir / "extrapolate/0.5/train/model")
    first, last, moved = (load_model(str(name), "float32", "cpu").state_dict() for name in names)
    for name in moved:
        assert torch.allclose(moved[name], first[name] + 1.5 * (last[name] - first[name]), atol=1e-6), name
    report = json.loads((run_dir / "report/report.json").read_text())
    assert {"student-2", "student-2+0.5"} <= {row["policy"] for row in report["results"]}
    choice = json.loads((run_dir / "extrapolate/chosen/choice.json").read_text())
    assert [row["alpha"] for row in choice["tried"]] == [0, 0.5]
    assert report["headline"]["policy"] == choice["policy"]
    seen = Seen((run_dir / "report/report.html").read_text())
    assert f"{choice['policy']} answers" in seen.text
    assert seen.row("warmup", "4") and seen.row("student-2+0.5", "4")
    exported = load_model(str(run_dir / "student"), "float32", "cpu").state_dict()
    expected = last if choice["alpha"] == 0 else moved
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_run_again_nothing_is_done(finished: Path) -> None:
    run_dir = finished / "runs/demo"
    stamps = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.jsonl")}
    done = cli("run", finished / "experiment.yaml")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.jsonl")} == stamps


def test_a_warm_up_that_is_taken_away_is_named(finished: Path) -> None:
    done = cli("run", finished / "experiment.yaml", "warmup=null", "extrapolate=null")
    assert done.returncode == 1
    assert "round-1/train: inputs.start: no longer there" in done.stderr and "--redo" in done.stderr


@pytest.mark.slow
def test_killed_in_its_new_stages_it_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    path = whole_experiment(tmp_path)
    environment = {**os.environ, "COLUMNS": "200"}
    for stage in ("warmup/train", "round-1/teacher-scores", "round-1/train", "extrapolate/chosen"):
        command = [*COMMAND, "run", str(path)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stderr is not None
        with process.stderr as said:
            assert any(line.startswith(f"{stage} ...") for line in said)
            process.kill()
        process.wait()
    done = cli("run", path)
    assert done.returncode == 0, done.stderr
    found, expected = (stable_files(folder / "runs/demo") for folder in (tmp_path, finished))
    assert found == expected
    for name in ("round-1/teacher-scores", "round-2/reference-scores"):
        scores = [(folder / "runs/demo" / name / "scores.jsonl").read_bytes() for folder in (tmp_path, finished)]
        assert scores[0] == scores[1]


def test_more_samples_score_only_what_is_new(finished: Path) -> None:
    """The teacher's third trace repeats its texts; the student's make new pairs. Old scores stay as they are."""
    run_dir = finished / "runs/demo"
    before = lines(run_dir / "round-1/reference-scores/scores.partial.jsonl")
    path = finished / "experiment.yaml"
    done = cli("run", path, "student.samples=4", "--until", "round-1/train")
    assert done.returncode == 0, done.stderr
    after = lines(run_dir / "round-1/reference-scores/scores.partial.jsonl")
    assert after[: len(before)] == before
    assert len({line["trace_id"] for line in after}) == len(after)


def test_dadpo_without_the_teachers_weight_trains_the_same_student_as_dpo(tmp_path: Path) -> None:
    """Byte for byte, with the teacher's scores read and weighing nothing."""
    students = []
    for name, objective in (("dpo", {"type": "dpo", "beta": 0.1}), ("dadpo", {**DADPO, "beta2": 0.0})):
        path = experiment(tmp_path, name=name, teacher=teacher(tmp_path), objective=objective, **QUIET)
        folder = run(load_config(path), until="round-2/train")
        students.append((folder / "round-2/train/model/model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_sppo_has_the_latest_student_as_its_reference(tmp_path: Path) -> None:
    path = experiment(tmp_path, objective={"type": "sppo", "beta": 0.05}, **QUIET)
    folder = run(load_config(path), until="round-2/train")
    for number in (1, 2):
        first = lines(folder / f"round-{number}/train/log.jsonl")[0]
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    metrics = [
        json.loads((folder / f"round-{n}/reference-scores/manifest.json").read_text())["metrics"] for n in (1, 2)
    ]
    assert [one["policy"] for one in metrics] == ["student-0", "student-1"]
    assert metrics[1]["scored"] == metrics[1]["traces"]


def test_adapters_go_on_from_the_warm_up_and_are_extrapolated(tmp_path: Path) -> None:
    train = {"pairs_per_step": 4, "learning_rate": 1e-2, "max_length": 256, "lora": {"r": 4, "alpha": 8}}
    path = experiment(
        tmp_path,
        objective={"type": "dpo", "beta": 0.1},
        warmup={"epochs": 1},
        train=train,
        rounds=1,
        extrapolate={"alpha": [0.5]},
        **QUIET,
    )
    folder = run(load_config(path))
    assert lines(folder / "round-1/train/log.jsonl")[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    names = (tmp_path / "tiny", folder / "round-1/train/model", folder / "student")
    first, last, moved = (load_model(str(name), "float32", "cpu").state_dict() for name in names)
    assert any((last[name] != first[name]).any() for name in first)
    for name in moved:
        assert torch.allclose(moved[name], first[name] + 1.5 * (last[name] - first[name]), atol=1e-5), name


def test_compared_they_share_the_warm_up_and_the_references_scores(tmp_path: Path) -> None:
    path = experiment(tmp_path, teacher=teacher(tmp_path), rounds=1, mechanisms={"enabled": False})
    methods = ("zero-shot", "orpo-off", "orpo-expo", "dpo", "dadpo")
    asked = ("--methods", ",".join(methods), "--seeds", 1, "--learning-rates", "1e-3", "--budgets", "epochs")
    done = cli("compare", path, *asked)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/demo-compare"
    cells = {cell["method"]: cell for cell in json.loads((folder / "compare.json").read_bytes())["cells"]}
    assert cells.keys() == set(methods)
    scored = [cells[name]["scored_tokens"] for name in ("orpo-off", "dpo", "dadpo")]
    assert 0 == scored[0] < scored[1] < scored[2]
    assert cells["dpo"]["trained_tokens"] > cells["orpo-off"]["trained_tokens"]
    choice = json.loads((folder / "orpo-expo-epochs-s0/extrapolate/chosen/choice.json").read_bytes())
    assert [row["alpha"] for row in choice["tried"]] == [0, 0.1, 0.3, 0.5]
    off, dpo, dadpo = (folder / f"{name}-epochs-s0" for name in ("orpo-off", "dpo", "dadpo"))
    for stage in ("warmup/train", "round-1/reference-scores"):
        assert (dpo / stage).samefile(dadpo / stage)
    assert (dpo / "round-1/pairs").samefile(off / "round-1/pairs")
    assert not (dpo / "round-1/train").samefile(dadpo / "round-1/train")
    assert not (off / "warmup").exists()


def test_check_and_pilot_know_them(tmp_path: Path) -> None:
    path = experiment(tmp_path, teacher=teacher(tmp_path), objective="dadpo", warmup={"epochs": 1})
    checked = cli("check", path)
    assert checked.returncode == 0 and "round-2/teacher-scores" in checked.stdout, checked.stderr
    piloted = cli("run", path, "--pilot", "6")
    assert piloted.returncode == 0, piloted.stderr
    assert "evaluation, warm-up, scores of given texts and loading not counted" in piloted.stdout
    gone = cli("check", path, f"teacher.scorer={tmp_path / 'gone/away'}")
    assert gone.returncode == 2 and "expected a checkpoint's folder or a hub id, found nothing at" in gone.stderr


def test_without_new_settings_no_new_stage(tmp_path: Path) -> None:
    """ORPO's plan has the stages that it had before there were relatives."""
    names = [stage.name for stage in plan(load_config(experiment(tmp_path)))]
    assert not [name for name in names if "scores" in name or name.startswith(("warmup", "extrapolate"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dadpo"}, "expected a teacher that can score given texts for dadpo, found scripted"),
        ({"warmup": {"objective": "dpo"}}, "expected a warm-up by texts alone, such as sft, found one that requires"),
        ({"extrapolate": {"origin": "warmup"}}, "expected warmup beside extrapolate.origin: warmup, found none"),
        ({"extrapolate": {"alpha": [0.1, 0.1]}}, "expected different values of alpha"),
        ({"extrapolate": {}, "problems": {"validation": None}}, "expected problems.validation beside extrapolate"),
    ],
)
def test_what_cannot_be_is_said_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(experiment(tmp_path, **changes))
