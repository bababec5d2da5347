"""Stages and run folders: what is finished, what is stale, what may grow, and who holds the lock.

A stage owns one folder of the run. `stage.json` in it says what was asked for, and is written first; `manifest.json`
says what came out, and is written last: its presence proves that the stage finished. A stage is

- *finished* when its options, and the contents of its inputs, are those of its manifest: it is skipped;
- *grown* when only options in `grows` were raised, or inputs in `grows` changed: its work runs again in the same
  folder and makes what is missing;
- *stale* when other options changed: an error, unless the user says `--redo` or `--keep`;
- *outdated* when other inputs changed: it is redone.

Whatever is redone is moved to `superseded/`, never deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from orpo_distill.component import Options, method_options
from orpo_distill.errors import RunError
from orpo_distill.progress import say
from orpo_distill.records import write_text

FORMAT = 1
Metrics = dict[str, Any]
T = TypeVar("T", "Asked", "Manifest")


@dataclass(frozen=True)
class Stage:
    """A unit of work that owns one folder of the run."""

    name: str  # also its folder: "round-1/pairs"
    work: str  # "module:function", called as function(options, inputs, out) -> metrics
    options: Options
    inputs: Mapping[str, str] = field(default_factory=dict)  # the work's name for it -> stage name
    outputs: tuple[str, ...] = ()  # the files and folders that are its result
    grows: frozenset[str] = frozenset()  # options that may be raised, and `inputs.NAME` that may change
    ignores: tuple[str, ...] = ()  # options that its work does not read, with all that is below them
    precious: bool = False  # holds texts that may have been paid for: redone only when named itself


@dataclass(frozen=True)
class Asked:
    """What a stage was asked for: `stage.json`."""

    work: str
    options: Mapping[str, Any]  # flat: {"decoding.temperature": 0.8}; without speed-only options
    inputs: Mapping[str, str]  # name -> content id of the input stage


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left behind: `manifest.json`."""

    asked: Asked
    content: str  # id of the bytes of its outputs
    metrics: Metrics
    kept: tuple[str, ...] = ()  # options whose change the user accepted with --keep


Start = Callable[[Stage, Mapping[str, Path], Path], Metrics]
"""How a stage's work is called: inline, in processes, under accelerate (launch.py)."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, stage: str) -> Path:
        """A stage's folder."""
        return self.path / stage

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunError if another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunError(
                    f"expected the run folder {self.path} to be free, found it in use by {owner}; "
                    "wait for it, stop it, or give this run another name"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def manifest(self, stage: str) -> Manifest | None:
        """A finished stage's manifest, None if it is not finished. Raises RunError if it is damaged."""
        try:
            return read_manifest(self.of(stage))
        except FileNotFoundError:
            return None

    def asked(self, stage: str) -> Asked | None:
        """What a stage was asked for when it started, None if it never did. Raises RunError if it is damaged."""
        try:
            return _read(self.of(stage) / "stage.json", Asked)
        except FileNotFoundError:
            return None

    def supersede(self, stage: str) -> Path | None:
        """Move a stage's folder out of the way. Returns where it went, None if there was none."""
        folder = self.of(stage)
        if not folder.exists():
            return None
        number = 1
        while (target := self.path / "superseded" / str(number) / stage).exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return target


def execute(
    stages: Sequence[Stage], run: RunFolder, start: Start, redo: Sequence[str] = (), keep: Sequence[str] = ()
) -> None:
    """Bring every stage up to date, in order. The caller holds the lock.

    `redo` and `keep` are stage names or patterns (`round-*/train`). What depends on a redone stage is redone too where
    its own options changed or the new result differs, but a precious stage only if it is named too. Raises RunError for
    stale stages, naming the changed keys, before anything is touched.
    """
    _check_patterns([*redo, *keep], stages)
    dependents = _with_dependents(stages, redo)
    unnamed = [stage for stage in stages if not _matches(stage, [*redo, *keep])]
    _refuse_stale([stage for stage in unnamed if stage.precious or stage not in dependents], run)
    for stage in stages:
        if _matches(stage, redo) and (old := run.supersede(stage.name)):
            say(f"{stage.name}: to be redone, the old one is kept in {old}")
        elif _matches(stage, keep):
            _keep(stage, run)
    for stage in stages:
        run_stage(stage, run, start)


def run_stage(stage: Stage, run: RunFolder, start: Start) -> Manifest:
    """Finish one stage whose inputs are finished, doing only what is missing."""
    folder = run.of(stage.name)
    contents = {name: _content_of(run, source) for name, source in stage.inputs.items()}
    asked = Asked(stage.work, flat_options(stage), contents)
    before, manifest = run.asked(stage.name), run.manifest(stage.name)
    if manifest and manifest.asked == asked:
        _require_outputs(stage, run)
        return manifest
    if before and (changed := _outdated(stage, before, asked)):
        run.supersede(stage.name)
        say(f"{stage.name}: made anew because of {', '.join(changed)}; the old one is kept in superseded/")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "stage.json", asdict(asked))
    (folder / "manifest.json").unlink(missing_ok=True)
    metrics = start(stage, {name: run.of(source) for name, source in stage.inputs.items()}, folder)
    _require_outputs(stage, run)
    finished = Manifest(asked, content_id([folder / name for name in stage.outputs]), metrics)
    _write(folder / "manifest.json", asdict(finished))
    return finished


@contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Inside the block an OSError (disk full, no permission) becomes a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"expected to read and write in {path}, found: {error}; make room or mend it, then run the same command: "
            "what was finished is kept"
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished stage's folder. Raises FileNotFoundError, or RunError if it is damaged."""
    return _read(folder / "manifest.json", Manifest)


def flat_options(stage: Stage) -> dict[str, Any]:
    """A stage's options by dotted key, without speed-only and ignored ones: its part of the fingerprint."""
    flat = _flatten(method_options(stage.options), "")
    return {key: value for key, value in flat if not any(f"{key}.".startswith(f"{name}.") for name in stage.ignores)}


def content_id(paths: Sequence[Path]) -> str:
    """sha256 over the names and bytes of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(str(file.relative_to(path.parent)).encode() + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions and machine, for `environment.json`. Never compared."""
    packages = ("orpo-distill", "torch", "transformers", "accelerate", "peft", "datasets", "math-verify", "vllm")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": versions}


def _read(path: Path, kind: type[T]) -> T:
    try:
        data = json.loads(path.read_bytes())
        if data.pop("format") != FORMAT:
            raise ValueError(f"another format than {FORMAT}")
        if kind is Manifest:
            data = {**data, "asked": Asked(**data["asked"]), "kept": tuple(data["kept"])}
        return kind(**data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"expected a readable {path}, found: {error!r}; "
            "add --redo STAGE for this stage to make it anew (the old one is kept in superseded/)"
        ) from error


def _write(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps({"format": FORMAT, **data}, indent=1, ensure_ascii=False) + "\n")


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _changes(stage: Stage, before: Asked, options: Mapping[str, Any]) -> list[str]:
    """Options that changed in a way that the stage cannot grow into, as `key: old -> new`."""
    keys = sorted({*before.options, *options})
    changed = [key for key in keys if before.options.get(key) != options.get(key)]
    return [
        f"{key}: {before.options.get(key)!r} -> {options.get(key)!r}"
        for key in changed
        if not (key in stage.grows and _grew(before.options.get(key), options.get(key)))
    ]


def _grew(old: int | None, new: int | None) -> bool:
    """Whether a limit was raised; None is no limit."""
    return new is None or (old is not None and new >= old)


def _outdated(stage: Stage, before: Asked, asked: Asked) -> list[str]:
    """Options and inputs that changed in a way that the stage cannot grow into."""
    names = sorted({*before.inputs, *asked.inputs})
    changed = [name for name in names if before.inputs.get(name) != asked.inputs.get(name)]
    inputs = [f"a changed input ({name})" for name in changed if f"inputs.{name}" not in stage.grows]
    return [*_changes(stage, before, asked.options), *inputs]


def _refuse_stale(stages: Sequence[Stage], run: RunFolder) -> None:
    lines, names = [], []
    for stage in stages:
        before = run.asked(stage.name)
        if before and (changes := _changes(stage, before, flat_options(stage))):
            names.append(stage.name)
            lines.append(f"  {stage.name}: " + "; ".join(changes))
    if lines:
        raise RunError(
            f"expected the settings that {run.path} was made with, found changed ones:\n"
            + "\n".join(lines)
            + f"\nadd --redo {names[0]} to make it, and what depends on it, anew (the old is kept in superseded/), "
            f"--keep {names[0]} to go on with what is there, or change `name` to start another run"
        )


def _keep(stage: Stage, run: RunFolder) -> None:
    manifest = run.manifest(stage.name)
    if manifest is None:
        raise RunError(f"expected a finished stage to --keep, found that {stage.name} is not finished; use --redo")
    options = flat_options(stage)
    changed = [change.partition(":")[0] for change in _changes(stage, manifest.asked, options)]
    if changed:
        asked = Asked(stage.work, options, manifest.asked.inputs)
        kept = tuple(sorted({*manifest.kept, *changed}))
        _write(run.of(stage.name) / "stage.json", asdict(asked))
        _write(run.of(stage.name) / "manifest.json", asdict(Manifest(asked, manifest.content, manifest.metrics, kept)))
        say(f"{stage.name}: kept as it is although these settings changed: {', '.join(changed)}")


def _with_dependents(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    chosen: list[Stage] = []
    names: set[str] = set()
    for stage in stages:
        if _matches(stage, patterns) or names & set(stage.inputs.values()):
            chosen.append(stage)
            names.add(stage.name)
    return chosen


def _matches(stage: Stage, patterns: Sequence[str]) -> bool:
    return any(fnmatch(stage.name, pattern) for pattern in patterns)


def _check_patterns(patterns: Sequence[str], stages: Sequence[Stage]) -> None:
    for pattern in patterns:
        if not any(fnmatch(stage.name, pattern) for stage in stages):
            known = ", ".join(stage.name for stage in stages)
            raise RunError(f"expected a stage of this run, found {pattern!r}; the stages are: {known}")


def _content_of(run: RunFolder, stage: str) -> str:
    manifest = run.manifest(stage)
    if manifest is None:
        raise RunError(f"expected the stage {stage} to be finished, found that it is not; run it first")
    return manifest.content


def _require_outputs(stage: Stage, run: RunFolder) -> None:
    for name in stage.outputs:
        if not (run.of(stage.name) / name).exists():
            raise RunError(
                f"expected {run.of(stage.name) / name}, found nothing; add --redo {stage.name} to make it anew"
            )
