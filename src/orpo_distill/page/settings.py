"""What it takes to make a run again: the command, the config, the seeds, the versions."""

from __future__ import annotations

import re
from typing import Any

import yaml

from orpo_distill.page.blocks import Block, Code, Section, Table, Text, plain
from orpo_distill.page.files import Row, RunFiles

_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "(hidden)"


def settings_section(files: RunFiles) -> Section:
    """Command, seeds, versions and the whole config."""
    config = shown(files.config)
    blocks: list[Block] = [
        Text("The same command, run again, makes only what is missing."),
        Code("Command", command(files)),
        Table("Seeds", ["what", "seed"], _seeds(config)),
    ]
    if versions := _versions(files.environment):
        blocks.append(Table("Versions and machine", ["what", "version"], versions))
    if kept := _kept(files):
        blocks.append(Text(kept, "warning"))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "(config.yaml is missing)"
    blocks.append(Code("config.yaml, every setting", text, folded=True))
    return Section("settings", "Config, versions, command", blocks)


def command(files: RunFiles) -> str:
    """What makes the run again from its own config."""
    folder = str(files.config.get("runs", "runs")).rstrip("/")
    return plain(f"orpo-distill run {folder}/{files.name}/config.yaml")


def shown(value: Any, key: str = "") -> Any:
    """Settings without what may be a secret: values of extra_headers, and logins in addresses."""
    if isinstance(value, dict):
        hide = key == "extra_headers"
        return {plain(name): HIDDEN if hide else shown(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [shown(item, key) for item in value]
    return _LOGIN.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def _seeds(config: Row) -> list[list[str]]:
    problems = config.get("problems")
    inner = problems.get("seed") if isinstance(problems, dict) else None
    traces, what = config.get("traces_seed"), "pairing, order of training, phi's coin"
    named = [
        (f"seed: {what}" if traces is not None else f"seed: first traces, {what}", config.get("seed")),
        ("traces_seed: traces of the teacher and the initial student", traces),
        ("problems.seed", inner),
    ]
    return [[name, plain(value)] for name, value in named if value is not None]


def _versions(environment: Row) -> list[list[str]]:
    packages = environment.get("packages")
    rows = [[name, plain(environment[name])] for name in ("python", "platform") if name in environment]
    return rows + [[plain(name), plain(version)] for name, version in (packages or {}).items()]


def _kept(files: RunFiles) -> str:
    """Stages that stand although their settings changed."""
    found = []
    for stage in files.begun:
        manifest = files.manifest(stage)
        if manifest and manifest.asked.kept:
            found.append(f"{stage} ({', '.join(manifest.asked.kept)})")
    return f"Kept as they were although settings changed (--keep): {'; '.join(found)}." if found else ""
