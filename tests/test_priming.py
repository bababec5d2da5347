"""Primed teachers: what only the teacher reads, and what a comparison of them shares."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest

from orpo_distill.compare.cells import Wanted, design_of, recipes, stages_of
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from orpo_distill.priming import PRIMINGS, Priming
from orpo_distill.records import Message, Pair, read_jsonl
from orpo_distill.samplers.asking import Asking
from orpo_distill.sampling import with_prefix
from tests.compare.test_methods import config
from tests.servers import faulty_server
from tests.test_end_to_end import cli, experiment

API = {"model": "big", "sampler": {"type": "openai", "base_url": "http://localhost/v1"}}
QUESTION = (Message("user", "What is 1 + 1?"),)
NAMES = get_args(Priming)


def prefixes(found: Config) -> dict[str, str]:
    """What each stage puts before the question, of those that could."""
    return {stage.name: stage.options.prefix for stage in plan(found) if hasattr(stage.options, "prefix")}


def test_every_name_has_words_of_its_own() -> None:
    assert tuple(PRIMINGS) == NAMES
    assert len(set(PRIMINGS.values())) == len(NAMES)
    assert [name for name, words in PRIMINGS.items() if not words] == ["none"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_by_the_teacher_alone(name: Priming) -> None:
    """Sampled, scored and evaluated, the teacher has it before its question; no stage of the student's has."""
    found = config(teacher={"model": "big", "priming": name}, objective="dadpo", rounds=2, evaluate={"teacher": True})
    behind = prefixes(found)
    read = {stage for stage, prefix in behind.items() if prefix}
    assert {behind[stage] for stage in read} <= {PRIMINGS[name]}
    scored = {f"round-{number}/teacher-scores" for number in (1, 2)}
    assert read == ({"teacher", "teacher-evaluate", *scored} if name != "none" else set())
    assert {"student-0", "baseline", "round-2/student", "round-1/reference-scores"} <= behind.keys() - read


def test_it_stands_before_a_prefix_of_ones_own() -> None:
    teacher = config(teacher={"model": "big", "priming": "check_yourself", "prefix": "Use metres."}).teacher
    assert teacher.instruction == f"{PRIMINGS['check_yourself']}\n\nUse metres."
    assert config(teacher={"model": "big", "prefix": "Use metres."}).teacher.instruction == "Use metres."


def test_the_ledger_knows_each_as_another_prompt() -> None:
    keys = set()
    for name in NAMES:
        (stage,) = [one for one in plan(config(teacher=API | {"priming": name})) if one.name == "teacher"]
        options: Any = stage.options
        asked = Asking(options.sampler, "big", options.decoding).asked(with_prefix(QUESTION, options.prefix))
        assert json.loads(asked.request)["messages"][0]["content"].startswith(PRIMINGS[name])
        keys.add(asked.key)
    assert len(keys) == len(NAMES)


def test_an_unknown_name_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.priming: expected 'none', 'teach_student', .* found 'kindly'"):
        config(teacher={"model": "big", "priming": "kindly"})


def test_a_sweep_samples_the_teacher_anew_and_shares_the_rest() -> None:
    design = design_of([config(rounds=1)], Wanted("orpo-off", (f"teacher.priming={','.join(NAMES)}",)))
    (block,) = design.blocks
    rows = [recipes(stages_of(design.trained(block, row, 0, 1e-3, "epochs"))) for row in design.swept()]
    different = {name for name in rows[0] if len({row[name] for row in rows}) == len(NAMES)}
    assert {"teacher", "teacher-verdicts", "round-1/pairs", "round-1/train"} <= different
    assert all(len({row[name] for row in rows}) == 1 for name in ("problems", "student-0", "baseline"))


@pytest.mark.slow
def test_a_comparison_buys_the_primed_texts_and_trains_on_plain_prompts(tmp_path: Path) -> None:
    with faulty_server(right=1) as server:
        api = {"type": "openai", "base_url": server.base_url, "ledger": str(tmp_path / "ledger.sqlite")}
        teacher = {"model": "faulty", "samples": 2, "sampler": api}
        path = experiment(tmp_path, teacher=teacher, rounds=1, mechanisms={"enabled": False})
        for split in (tmp_path / "data").iterdir():  # sums that the server can do
            split.write_text(split.read_text().replace(" plus ", " + "))
        asked = ("--methods", "zero-shot", "--sweep", "teacher.priming=none,teach_student", "--seeds", 1)
        done = cli("compare", path, *asked, "--learning-rates", "1e-3")
    assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        bought = [json.loads(request)["messages"] for (request,) in ledger.execute("SELECT request FROM asked")]
    words = [messages[0]["content"] for messages in bought]
    plain = {word for word in words if not word.startswith(PRIMINGS["teach_student"])}
    assert len(plain) == 12
    assert {word.removeprefix(PRIMINGS["teach_student"]).strip() for word in words} == plain
    runs = [tmp_path / f"runs/demo-compare/teacher.priming-{name}-epochs-s0" for name in ("none", "teach_student")]
    assert (runs[0] / "student-0").samefile(runs[1] / "student-0")
    for run in runs:
        pairs = list(read_jsonl(run / "round-1/pairs/pairs.jsonl", Pair))
        assert pairs and {pair.prompt[0].content for pair in pairs} <= plain
    primed = load_config(runs[1] / "config.yaml").teacher
    assert (primed.priming, primed.prefix) == ("teach_student", "")
