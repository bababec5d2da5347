"""Stages and run folders: what a stage is, what stands in its folder, and who holds the lock.

A stage owns one folder of the run. `stage.json` in it says what was asked for, and is written first; `manifest.json`
says what came out, and is written last: its presence proves that the stage finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from orpo_distill.component import Options, method_options
from orpo_distill.errors import RunError, RunInUse
from orpo_distill.records import write_text

FORMAT = 1
SHARED = "shared"  # the folder of stages that runs beside it share
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
    grows: frozenset[str] = frozenset()  # what may change and the work goes on in its folder, see `execution`
    ignores: tuple[str, ...] = ()  # options that its result does not depend on, with all that is below them
    precious: bool = False  # holds texts that may have been paid for: redone only when named itself
    consumes: Mapping[str, str] = field(default_factory=dict)  # input -> what it may have deleted since it finished
    own: bool = False  # speaks of its run by name: never shared with another run


@dataclass(frozen=True)
class Asked:
    """What a stage was asked for: `stage.json`."""

    work: str
    options: Mapping[str, Any]  # flat: {"decoding.temperature": 0.8}; without speed-only options
    inputs: Mapping[str, str]  # name -> content id of the input stage
    kept: tuple[str, ...] = field(default=(), compare=False)  # options whose change the user accepted with --keep

    @property
    def key(self) -> str:
        """A short hash of what was asked for."""
        plain = json.dumps([self.work, dict(self.options), dict(self.inputs)], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left behind: `manifest.json`."""

    asked: Asked
    content: str  # id of the bytes of its outputs
    metrics: Metrics


class RunFolder:
    """The folder of one run.

    Where a folder `shared` stands beside it (the runs of a comparison), stages are links into that: whatever was asked
    for the same way is made once, see `link`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shared = path.parent / SHARED

    @property
    def shares(self) -> bool:
        """Whether the run shares stages with the runs beside it. A run that is called `shared` is no store."""
        return self._shared.is_dir() and not (self.path == self._shared or (self._shared / "config.yaml").exists())

    def link(self, stage: str, asked: Asked) -> None:
        """Let a stage's folder be a link to the shared one that was asked for the same, or to a new one."""
        target = next(self._same(stage, asked), None) or self._new_shared(f"{_flat(stage)}-{asked.key}")
        target.mkdir(exist_ok=True)
        folder = self.of(stage)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.unlink(missing_ok=True)
        folder.symlink_to(os.path.relpath(target, folder.parent))

    def has_shared(self, stage: str, asked: Asked) -> bool:
        """Whether there is a shared folder that was asked for the same."""
        return any(self._same(stage, asked))

    def _same(self, stage: str, asked: Asked) -> Iterator[Path]:
        return (folder for folder in sorted(self._shared.glob(f"{_flat(stage)}-*")) if _is_asked(folder, asked))

    def _new_shared(self, name: str) -> Path:
        """A shared folder in which nothing was begun; one of this name may since have grown into something else."""
        number, folder = 1, self._shared / name
        while (folder / "stage.json").exists():
            number += 1
            folder = self._shared / f"{name}-{number}"
        return folder

    @contextmanager
    def hold(self, stage: str) -> Iterator[None]:
        """Hold a stage's folder for this process; if another run is making it, wait until it is done."""
        folder = self.of(stage)
        if not folder.is_symlink():
            yield
            return
        with (self._shared / f".{folder.resolve().name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def of(self, stage: str) -> Path:
        """A stage's folder."""
        return self.path / stage

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunInUse if another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunInUse(
                    f"expected the run folder {self.path} to be free, found it in use by {owner}; "
                    "wait for it, stop it, or give this run another name"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def finished(self, stage: str) -> bool:
        """Whether a stage has finished, if perhaps with other settings."""
        return (self.of(stage) / "manifest.json").exists()

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

    def write_asked(self, stage: str, asked: Asked) -> None:
        """Record what a stage is asked for, before its work begins."""
        self.of(stage).mkdir(parents=True, exist_ok=True)
        _write(self.of(stage) / "stage.json", asdict(asked))

    def write_manifest(self, stage: str, manifest: Manifest) -> None:
        """Record that a stage has finished."""
        _write(self.of(stage) / "manifest.json", asdict(manifest))

    def supersede(self, stage: str) -> Path | None:
        """Move a stage's folder out of the way, for all runs that share it. Where it went, None if there was none."""
        folder = self.of(stage)
        if not folder.exists():
            return None
        number, root = 1, self.path
        if folder.is_symlink():
            folder, stage, root = folder.resolve(), folder.resolve().name, self._shared
        while (target := root / "superseded" / str(number) / stage).exists():
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return target


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
    flat = flatten(method_options(stage.options)).items()
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


def _flat(stage: str) -> str:
    return stage.replace("/", "-")


def _is_asked(folder: Path, asked: Asked) -> bool:
    try:
        return _read(folder / "stage.json", Asked) == asked
    except (FileNotFoundError, NotADirectoryError):
        return False


def _asked(data: Mapping[str, Any]) -> Asked:
    return Asked(**{**data, "kept": tuple(data["kept"])})


def _read(path: Path, kind: type[T]) -> T:
    try:
        data = json.loads(path.read_bytes())
        if data.pop("format") != FORMAT:
            raise ValueError(f"another format than {FORMAT}")
        if kind is Manifest:
            return kind(**{**data, "asked": _asked(data["asked"])})
        return kind(**_asked(data).__dict__)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"expected a readable {path}, found: {error!r}; "
            "add --redo STAGE for this stage to make it anew (the old one is kept in superseded/)"
        ) from error


def _write(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps({"format": FORMAT, **data}, indent=1, ensure_ascii=False) + "\n")


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key. An empty mapping is a value."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flatten(item, f"{key}.{name}" if key else str(name))
    return found
