"""What stands in a run folder, finished or not. Stage folders may be links to those of another run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from orpo_distill.errors import DataError, RunError
from orpo_distill.loading import parse_yaml
from orpo_distill.records import Problem, Trace, Verdict, from_json, read_jsonl
from orpo_distill.runs import Manifest, RunFolder

Row = dict[str, Any]
Kind = Literal["sampled", "evaluated", "judged"]


@dataclass(frozen=True)
class Source:
    """A stage whose traces are there: sampled to be trained on, answers of an evaluation, or what a judge said."""

    stage: str
    policy: str
    round: int  # the round that asked for them; of an evaluation, the rounds of training its model has had
    kind: Kind
    traces: Path  # the folder
    verdicts: Path

    @property
    def name(self) -> str:
        """For people: who wrote them, and what for."""
        if self.kind == "evaluated":
            return f"{self.policy}, evaluated"
        return f"{self.policy}, for round {self.round}" if self.round else self.policy


class RunFiles:
    """Reads one run folder. Raises RunError if it is none, DataError for files that are damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunFolder(path)
        if not path.is_dir() or not any((path / name).exists() for name in ("config.yaml", "problems")):
            raise RunError(
                f"expected a run folder with a config.yaml, or a comparison's with a compare.json, at {path}, found "
                "neither; name a folder in runs/"
            )

    @cached_property
    def config(self) -> Row:
        """The settings as `config.yaml` has them, {} without the file."""
        path = self.path / "config.yaml"
        try:
            found = parse_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"expected YAML in {path}, found: {error}; run the experiment again to write it") from error
        if not isinstance(found, dict):
            raise DataError(f"expected a mapping of settings in {path}, found {type(found).__name__}")
        return found

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.path.name)

    @cached_property
    def times(self) -> Row:
        """Seconds by stage."""
        found: Row = self.json("times.json", {})
        return found

    @cached_property
    def environment(self) -> Row:
        """Versions and machine."""
        found: Row = self.json("environment.json", {})
        return found

    @cached_property
    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a folder."""
        names = (folder.name.removeprefix("round-") for folder in self.path.glob("round-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def json(self, name: str, default: Any) -> Any:
        """A JSON file of the run; `default` without it. It must be of the default's type."""
        path = self.path / name
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return default
        except (OSError, ValueError) as error:
            raise DataError(f"expected JSON in {path}, found: {error}; remove the file or make it again") from error
        if not isinstance(found, type(default)):
            wanted = "an object" if isinstance(default, dict) else "a list"
            raise DataError(f"expected {wanted} in {path}, found {type(found).__name__}; make it again")
        return found

    def manifest(self, stage: str) -> Manifest | None:
        """A finished stage's manifest."""
        return self.folder.manifest(stage)

    def metrics(self, stage: str) -> Row:
        """What a finished stage counted, {} if it is not finished."""
        found = self.manifest(stage)
        return dict(found.metrics) if found else {}

    @cached_property
    def evaluations(self) -> dict[str, str]:
        """policy -> stage of every evaluation that has results, in the order of the run."""
        found: dict[str, str] = {}
        for stage, *_ in self._evaluated():
            for row in self.results(stage)[:1]:
                found.setdefault(str(row.get("policy", stage)), stage)
        return found

    def _evaluated(self) -> list[tuple[str, str, int]]:
        """Stages that evaluate, each with its policy and the rounds of training that it has had."""
        last = max([0, *self.rounds])
        alphas = sorted(folder.parent.name for folder in self.path.glob("extrapolate/*/evaluate"))
        found = [("baseline", "student-0", 0), ("warmup/evaluate", "warmup", 0)]
        found += [(f"round-{number}/evaluate", f"student-{number}", number) for number in self.rounds]
        found += [(f"extrapolate/{alpha}/evaluate", f"student-{last}+{alpha}", last) for alpha in alphas]
        return [*found, ("sft/evaluate", "sft", last), ("teacher-evaluate", "teacher", 0)]

    @cached_property
    def final_student(self) -> str | None:
        """The policy that the run is about: the last round's student, or the one moved on by the chosen alpha.

        None while none was evaluated.
        """
        chosen = self.json("extrapolate/chosen/choice.json", {}).get("policy")
        rounds = {number: policy for policy in self.evaluations if (number := round_of(policy)) is not None}
        return str(chosen) if chosen else rounds[max(rounds)] if rounds else None

    def results(self, stage: str) -> list[Row]:
        """The rows of an evaluation's `results.json`."""
        rows: list[Row] = self.json(f"{stage}/results.json", [])
        needed = {"policy", "split", "n", "truncated"}
        if not self.open_ended:
            needed |= {"correct", "accuracy", "low", "high", "parsed"}
        for row in rows:
            if not isinstance(row, dict) or not needed <= row.keys():
                lacking = ", ".join(sorted(needed - set(row if isinstance(row, dict) else ())))
                raise DataError(
                    f"expected {lacking} in every row of {self.path / stage / 'results.json'}, found none; evaluate "
                    "again"
                )
        return rows

    @cached_property
    def open_ended(self) -> bool:
        """Whether the task has no right answers: by its verifier's name, or by what the first evaluation says."""
        task = self.config.get("task")
        verifier = task.get("verifier") if isinstance(task, dict) else None
        rows = self.json("baseline/results.json", [])
        measured = all(not isinstance(row, dict) or row.get("accuracy", 0) is not None for row in rows)
        return not measured or (isinstance(verifier, dict) and verifier.get("type") == "role")

    @cached_property
    def win_rates(self) -> list[Row]:
        """What the judge says of every policy's answers, in the order of the run."""
        return [row for stage in self._judged for row in self.json(f"{stage}/win-rates.json", [])]

    @property
    def _judged(self) -> list[str]:
        return ["baseline-judged", "warmup/judged", *(f"round-{number}/judged" for number in self.rounds), "sft/judged"]

    @cached_property
    def judgements(self) -> list[Source]:
        """Every stage in which a judge was asked."""
        stages = [*(f"round-{number}/pairs" for number in self.rounds), *self._judged]
        found = [Source(stage, "judge", 0, "judged", self.path / stage, self.path / stage) for stage in stages]
        return [source for source in found if any(source.traces.glob("traces*.jsonl"))]

    @cached_property
    def sources(self) -> list[Source]:
        """Every stage that has traces, in the order of the run."""
        sampled = [("teacher", "teacher", 0), ("student-0", "student-0", 0)]
        sampled += [(f"round-{number}/student", f"student-{number - 1}", number) for number in self.rounds]
        found = [
            Source(stage, policy, number, "sampled", self.path / stage, self.path / f"{stage}-verdicts")
            for stage, policy, number in sampled
        ]
        found += [
            Source(stage, policy, number, "evaluated", self.path / stage, self.path / stage)
            for stage, policy, number in self._evaluated()
        ]
        return [source for source in found if any(source.traces.glob("traces*.jsonl"))]

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """Every problem of the run with its split."""
        for split, name in (("train", "problems"), ("validation", "validation"), ("test", "test")):
            path = self.path / "problems" / f"{name}.jsonl"
            if path.exists():
                yield from ((split, problem) for problem in read_jsonl(path, Problem))

    def log(self, stage: str) -> list[Row]:
        """The steps that a train stage has logged so far."""
        return list(whole_rows(self.path / stage / "log.jsonl"))

    @property
    def begun(self) -> list[str]:
        """Stages that have begun, whether or not they have ended."""
        patterns = ("*/stage.json", "*/*/stage.json", "extrapolate/*/*/stage.json")
        found = (path.parent.relative_to(self.path) for pattern in patterns for path in self.path.glob(pattern))
        return sorted(str(stage) for stage in found if stage.parts[0] != "superseded")

    @cached_property
    def unfinished(self) -> list[str]:
        """Stages that have begun and not ended."""
        return [name for name in self.begun if name != "report" and not (self.path / name / "manifest.json").exists()]


def judged(source: Source) -> Iterator[tuple[Trace, Verdict | None]]:
    """The traces of a stage, each with its verdict where there is one by now."""
    paths = _written(source.verdicts, "verdicts")
    verdicts = {verdict.trace_id: verdict for path in paths for verdict in _records(path, Verdict)}
    for path in _written(source.traces, "traces"):
        for trace in _records(path, Trace):
            yield trace, verdicts.get(trace.id)


def _written(folder: Path, name: str) -> list[Path]:
    """The finished file, or those that are being written."""
    finished = folder / f"{name}.jsonl"
    return [finished] if finished.exists() else sorted(folder.glob(f"{name}.partial*.jsonl"))


def _records(path: Path, kind: Any) -> Iterator[Any]:
    """The records of a file; of one that is being written, without a line that has no end yet."""
    if ".partial" not in path.name:
        yield from read_jsonl(path, kind)
        return
    for row in whole_rows(path):
        yield from_json(kind, row)


def whole_rows(path: Path) -> Iterator[Row]:
    """The lines of a JSON Lines file that another process may be writing; none without the file."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    yield _row(line, path, number)
    except FileNotFoundError:
        return


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: expected JSON, found {error}; make the stage anew with --redo") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}:{number}: expected an object, found {type(found).__name__}; make the stage anew")
    return found


def round_of(policy: str) -> int | None:
    """The rounds of training that a student has had; None for other policies."""
    found = re.fullmatch(r"student-(\d+)", policy)
    return int(found[1]) if found else None


def place_of(policy: str) -> float | None:
    """Where a student stands on its way, in rounds: the warm-up at one half, one moved on by alpha behind its round.

    None for other policies.
    """
    if policy == "warmup":
        return 0.5
    found = re.fullmatch(r"student-(\d+)(\+\d+(?:\.\d+)?(?:e[-+]?\d+)?)?", policy)
    return int(found[1]) + float(found[2] or 0) if found else None
