"""Bring stages up to date: what is finished is skipped, what is missing is made.

A stage is

- *finished* when its options, and the contents of its inputs, are those of its manifest: it is skipped;
- *grown* when only what its `grows` lists changed: its work runs again in the same folder and makes what is missing.
  An option listed by its key may be raised; `name.*` (or `*`) is any change of what is below it; `inputs.NAME` is any
  change of an input;
- *stale* when other options changed: an error, unless the user says `--redo` or `--keep`;
- *outdated* when other inputs changed: it is made anew.

What is made anew is moved to `superseded/`, never deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from orpo_distill import interrupt
from orpo_distill.errors import RunError
from orpo_distill.progress import say
from orpo_distill.runs import Asked, Manifest, Metrics, RunFolder, Stage, content_id, flat_options

REDOING = "redoing"  # the file that marks a stage between `--redo` and its end
Start = Callable[[Stage, Mapping[str, Path], Path], Metrics]
"""How a stage's work is called: inline, in processes, under accelerate (launch.py)."""


def refuse_stale(stages: Sequence[Stage], run: RunFolder, redo: Sequence[str] = (), keep: Sequence[str] = ()) -> None:
    """Raise RunError for stale stages, naming the changed keys, and for patterns that name nothing. Touches nothing.

    `redo` and `keep` are stage names or patterns (`round-*/train`). Stages that depend on a redone one may have changed
    options too, unless they are precious.
    """
    _check_patterns([*redo, *keep], stages)
    dependents = _with_dependents(stages, redo)
    kept = {stage.name for stage in stages if _matches(stage, keep) and _may_keep(stage, run)}
    shared = {stage.name for stage in stages if run.shares and not stage.own}  # get another folder
    unnamed = [stage for stage in stages if not (_matches(stage, redo) or stage.name in kept | shared)]
    stale = {}
    for stage in unnamed:
        before = run.asked(stage.name) if stage.precious or stage not in dependents else None
        if before and (changes := [*_changes(stage, before, flat_options(stage), run), *_rewired(stage, before)]):
            stale[stage.name] = "; ".join(changes)
    if stale:
        roots = [s for s in stages if s.name in stale and (s.precious or not stale.keys() & _ancestors(s, stages))]
        redos = " ".join(f"--redo {stage.name}" for stage in roots)
        keeps = " ".join(f"--keep {stage.name}" for stage in roots if _may_keep(stage, run))
        raise RunError(
            f"expected the settings that {run.path} was made with, found changed ones:\n"
            + "\n".join(f"  {name}: {changes}" for name, changes in stale.items())
            + f"\nadd {redos} to make it, and what depends on it, anew (the old is kept in superseded/), "
            + (f"{keeps} to go on with what is there, " if keeps else "")
            + "or change `name` to start another run"
        )


def due(stages: Sequence[Stage], run: RunFolder, redo: Sequence[str] = (), keep: Sequence[str] = ()) -> list[Stage]:
    """The stages that `execute` may have to work on. The rest have finished as they are asked for, or are kept."""
    found: list[Stage] = []
    for stage in stages:
        sources = set(stage.inputs.values())
        if (
            _matches(stage, redo)
            or sources & {one.name for one in found}
            or not run.finished(stage.name)
            or (not _matches(stage, keep) and _is_changed(stage, run))
        ):
            found.append(stage)
    return found


def _is_changed(stage: Stage, run: RunFolder) -> bool:
    before = run.asked(stage.name)
    return before is None or (before.work, before.options) != (stage.work, flat_options(stage))


def execute(
    stages: Sequence[Stage], run: RunFolder, start: Start, redo: Sequence[str] = (), keep: Sequence[str] = ()
) -> None:
    """Bring every stage up to date, in order. The caller holds the lock and has asked `refuse_stale`.

    What depends on a redone stage is redone too where its own options changed or the new result differs.
    """
    for stage in stages:
        if _matches(stage, keep):
            _keep(stage, run)
        elif _matches(stage, redo):
            _set_aside(stage, run)
    by_name = {stage.name: stage for stage in stages}
    restored = True
    while restored:  # a stage that had to be made again may have come out otherwise
        restored = False
        for stage in stages:
            if state(stage, run) != "finished":
                restored |= _restore_consumed(stage, by_name, run, start)
            run_stage(stage, run, start)


def _set_aside(stage: Stage, run: RunFolder) -> None:
    """Make room for a stage that is to be redone; one whose redoing was broken off goes on where it was."""
    mark = run.of(stage.name) / REDOING
    if mark.exists() or not (old := run.supersede(stage.name)):
        return
    if run.shares and not stage.own:
        mark.parent.unlink()  # linked to another folder when it runs
    else:
        mark.parent.mkdir(parents=True)
        mark.touch()
    say(f"{stage.name}: to be redone, the old one is kept in {old}")


def run_stage(stage: Stage, run: RunFolder, start: Start) -> Manifest:
    """Finish one stage whose inputs are finished, doing only what is missing."""
    asked = _asked_now(stage, run)
    while True:
        if _shared(stage, run):
            _link(stage, asked, run)
        with run.hold(stage.name):
            if not (_shared(stage, run) and _needs_link(stage, asked, run)):  # since then another run may have had it
                return _run_held(stage, asked, run, start)


def _shared(stage: Stage, run: RunFolder) -> bool:
    return run.shares and not stage.own


def _link(stage: Stage, asked: Asked, run: RunFolder) -> None:
    """Link a stage to the shared folder that was asked for the same. A link to what can grow into it stays."""
    if _needs_link(stage, asked, run) or (run.asked(stage.name) != asked and run.has_shared(stage.name, asked)):
        run.link(stage.name, asked)


def _needs_link(stage: Stage, asked: Asked, run: RunFolder) -> bool:
    """Whether a shared stage's folder is not there, or has become something else."""
    before = run.asked(stage.name)
    return not run.of(stage.name).is_dir() or (before is not None and bool(_outdated(stage, before, asked, run)))


def _run_held(stage: Stage, asked: Asked, run: RunFolder, start: Start) -> Manifest:
    folder = run.of(stage.name)
    before, manifest = run.asked(stage.name), run.manifest(stage.name)
    if manifest and manifest.asked == asked:
        _require_outputs(stage, run)
        return manifest
    if before and (changed := _outdated(stage, before, asked, run)):
        run.supersede(stage.name)
        say(f"{stage.name}: made anew because of {', '.join(changed)}; the old one is kept in superseded/")
    elif before:
        asked = replace(asked, kept=before.kept)
    run.write_asked(stage.name, asked)
    (folder / "manifest.json").unlink(missing_ok=True)
    interrupt.check()
    metrics = start(stage, {name: run.of(source) for name, source in stage.inputs.items()}, folder)
    interrupt.check()
    _require_outputs(stage, run)
    finished = Manifest(asked, content_id([folder / name for name in stage.outputs]), metrics)
    run.write_manifest(stage.name, finished)
    (folder / REDOING).unlink(missing_ok=True)
    return finished


def state(stage: Stage, run: RunFolder) -> str:
    """`finished`, `unfinished`, `not started`, or `to be updated`: finished once, with other options or inputs."""
    manifest = run.manifest(stage.name)
    if manifest is None:
        return "not started" if run.asked(stage.name) is None else "unfinished"
    inputs_finished = all(run.manifest(source) for source in stage.inputs.values())
    return "finished" if inputs_finished and manifest.asked == _asked_now(stage, run) else "to be updated"


def _asked_now(stage: Stage, run: RunFolder) -> Asked:
    contents = {}
    for name, source in stage.inputs.items():
        manifest = run.manifest(source)
        if manifest is None:
            raise RunError(f"expected the stage {source} to be finished, found that it is not; run it first")
        contents[name] = manifest.content
    return Asked(stage.work, flat_options(stage), contents)


def _restore_consumed(stage: Stage, by_name: Mapping[str, Stage], run: RunFolder, start: Start) -> bool:
    """Make inputs again that have deleted, to save space, what this stage needs of them. True if there was one."""
    restored = False
    if stage.consumes and _lacks_only_its_manifest(stage, run):
        return False
    for name, file in stage.consumes.items():
        source = by_name[stage.inputs[name]]
        if run.manifest(source.name) and not (run.of(source.name) / file).exists():
            say(f"{source.name}: made again, because {stage.name} needs its {file}, which was deleted to save space")
            _restore_consumed(source, by_name, run, start)
            with run.hold(source.name):
                if not _made_beside(source, file, run, start) and not (run.of(source.name) / file).exists():
                    run.supersede(source.name)
            run_stage(source, run, start)
            restored = True
    return restored


def _lacks_only_its_manifest(stage: Stage, run: RunFolder) -> bool:
    """Whether a stage was broken off when its outputs were whole, and had perhaps deleted what it consumes."""
    whole = all((run.of(stage.name) / name).exists() for name in stage.outputs)
    return whole and run.manifest(stage.name) is None and run.asked(stage.name) == _asked_now(stage, run)


def _made_beside(source: Stage, file: str, run: RunFolder, start: Start) -> bool:
    """Make a deleted part of a shared stage beside it, because other runs may be reading what stands.

    False where there is nothing to do, or where the stage comes out otherwise than it was and must be replaced.
    """
    folder, manifest = run.of(source.name).resolve(), run.manifest(source.name)
    if not _shared(source, run) or manifest is None or (folder / file).exists():
        return False
    beside = folder.with_name(f".{folder.name}")
    beside.mkdir(exist_ok=True)
    start(source, {name: run.of(each) for name, each in source.inputs.items()}, beside)
    same = content_id([beside / name for name in source.outputs]) == manifest.content
    if same:
        (beside / file).rename(folder / file)
    shutil.rmtree(beside)
    return same


def _changes(stage: Stage, before: Asked, options: Mapping[str, Any], run: RunFolder) -> list[str]:
    """Options that changed in a way that the stage cannot grow into, as `key: old -> new`.

    The limits of a stage that has not finished may also be lowered again, but for one that another run may be making.
    Another work has other options altogether: then it is the one change.
    """
    if before.work != stage.work:
        old, new = (work.rpartition(":")[2] for work in (before.work, stage.work))
        return [f"work: {old} -> {new}"]
    finished = _shared(stage, run) or run.finished(stage.name)
    keys = sorted({*before.options, *options})
    changed = [key for key in keys if before.options.get(key) != options.get(key)]
    return [
        f"{key}: {before.options.get(key)!r} -> {options.get(key)!r}"
        for key in changed
        if not (key in stage.grows and not finished)
        and not _may_grow(stage, key, before.options.get(key), options.get(key))
    ]


def _rewired(stage: Stage, before: Asked) -> list[str]:
    """Inputs that came or went, such as a warm-up's: another method, not only other contents."""
    if before.work != stage.work:
        return []
    return [
        f"inputs.{name}: none -> {stage.inputs[name]}" if name in stage.inputs else f"inputs.{name}: no longer there"
        for name in sorted(before.inputs.keys() ^ stage.inputs.keys())
        if not _may_grow(stage, f"inputs.{name}", None, None)
    ]


def _may_grow(stage: Stage, key: str, old: Any, new: Any) -> bool:
    if any(fnmatch(f"{key}.", pattern) for pattern in stage.grows if pattern.endswith("*")):
        return True
    return key in stage.grows and (new is None or (old is not None and new >= old))  # None is no limit


def _outdated(stage: Stage, before: Asked, asked: Asked, run: RunFolder) -> list[str]:
    """Options and inputs that changed in a way that the stage cannot grow into."""
    names = sorted({*before.inputs, *asked.inputs})
    changed = [name for name in names if before.inputs.get(name) != asked.inputs.get(name)]
    inputs = [name for name in changed if f"inputs.{name}" not in stage.grows]
    shown = ", ".join(inputs[:3]) + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "")
    return [*_changes(stage, before, asked.options, run), *([f"changed inputs ({shown})"] if inputs else [])]


def _may_keep(stage: Stage, run: RunFolder) -> bool:
    """Whether a stage has finished and its work would be called the same way now, on inputs of the same names."""
    manifest = run.manifest(stage.name)
    return manifest is not None and manifest.asked.work == stage.work and not _rewired(stage, manifest.asked)


def _keep(stage: Stage, run: RunFolder) -> None:
    """Accept changed options of a finished stage. What it can grow into is still made."""
    manifest = run.manifest(stage.name)
    if manifest is None:
        return
    options = flat_options(stage)
    changed = [change.partition(": ")[0] for change in _changes(stage, manifest.asked, options, run)]
    if not changed:
        return
    accepted = {key: value for key, value in manifest.asked.options.items() if key not in changed}
    accepted |= {key: options[key] for key in changed if key in options}
    asked = replace(manifest.asked, options=accepted, kept=tuple(sorted({*manifest.asked.kept, *changed})))
    run.write_asked(stage.name, asked)
    run.write_manifest(stage.name, replace(manifest, asked=asked))
    say(f"{stage.name}: kept as it is although these settings changed: {', '.join(changed)}")


def _with_dependents(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    chosen: list[Stage] = []
    names: set[str] = set()
    for stage in stages:
        if _matches(stage, patterns) or names & set(stage.inputs.values()):
            chosen.append(stage)
            names.add(stage.name)
    return chosen


def _ancestors(stage: Stage, stages: Sequence[Stage]) -> set[str]:
    by_name = {each.name: each for each in stages}
    direct = set(stage.inputs.values())
    return direct.union(*(_ancestors(by_name[name], stages) for name in direct))


def _matches(stage: Stage, patterns: Sequence[str]) -> bool:
    return any(fnmatch(stage.name, pattern) for pattern in patterns)


def _check_patterns(patterns: Sequence[str], stages: Sequence[Stage]) -> None:
    for pattern in patterns:
        if not any(fnmatch(stage.name, pattern) for stage in stages):
            known = ", ".join(stage.name for stage in stages)
            raise RunError(f"expected a stage of this run, found {pattern!r}; the stages are: {known}")


def _require_outputs(stage: Stage, run: RunFolder) -> None:
    for name in stage.outputs:
        if not (run.of(stage.name) / name).exists():
            raise RunError(
                f"expected {run.of(stage.name) / name}, found nothing; add --redo {stage.name} to make it anew"
            )
