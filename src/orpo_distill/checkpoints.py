"""Training checkpoints on disk: which of them are whole, and the ordinary model folder made from the last.

A process may be killed while it writes one. A whole checkpoint holds the file `complete.json`, written last, with every
other file's size; a folder that does not match it is swept away.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from orpo_distill.errors import RunError
from orpo_distill.records import sync_folder, write_text

MARKER = "complete.json"
FINAL = "checkpoint"
MODEL = "model"
TRAINER_FILES = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", MARKER)


def seal(folder: Path) -> None:
    """Flush a checkpoint's files to the disk and mark it whole."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_text(folder / MARKER, json.dumps(sizes))


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was sealed and still has every file at its size."""
    try:
        sizes = json.loads((folder / MARKER).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint has had. Raises RunError if it does not say."""
    try:
        return int(json.loads((folder / "trainer_state.json").read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error


def newest(out: Path) -> Path | None:
    """The whole checkpoint of a train stage's folder that has had the most steps."""
    found = [folder for folder in _folders(out) if is_whole(folder)]
    return max(found, key=step_of, default=None)


def sweep(out: Path, keep: int) -> None:
    """Delete checkpoints that are not whole, and all but the newest `keep` of the others."""
    whole = sorted((folder for folder in _folders(out) if is_whole(folder)), key=step_of)
    for folder in set(_folders(out)) - set(whole[len(whole) - min(keep, len(whole)) :]):
        shutil.rmtree(folder)


def publish(checkpoint: Path, out: Path) -> None:
    """Make `out/model` of a checkpoint's model files (hard links where the disk can) and rename it `out/checkpoint`.

    `out/model` appears last and whole: it means that the stage's training is done.
    """
    if checkpoint.name != FINAL:
        checkpoint = checkpoint.rename(out / FINAL)
    partial = out / f"{MODEL}.tmp"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not path.name.startswith(TRAINER_FILES):
            _link(path, partial / path.name)
    sync_folder(partial)
    partial.rename(out / MODEL)
    sync_folder(out)


def damaged(folder: Path, error: Exception) -> RunError:
    """The error for a checkpoint that cannot be read."""
    return RunError(
        f"expected a whole checkpoint in {folder}, found: {error}; delete that folder and run the same command again"
    )


def _folders(out: Path) -> list[Path]:
    return [path for path in out.glob(f"{FINAL}*") if path.is_dir()]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
