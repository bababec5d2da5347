"""The problems stage: what is dropped is recorded, a larger limit only adds, the same settings give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.errors import DataError
from orpo_distill.records import Problem, read_jsonl
from orpo_distill.stages.problems import ProblemsOptions, problems, question_key, said_dropped
from orpo_distill.tasks import take
from orpo_distill.tasks.question import file_split

SHARED = Path(__file__).parents[2] / "../shared/data"


def row(identity: str, question: str, answer: str = "1", **fields: Any) -> dict[str, Any]:
    return {"id": identity, "question": question, "answer": answer, **fields}


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    return folder


def run(folder: Path, out: Path, verifier: str = "number", **section: Any) -> dict[str, Any]:
    task = {"type": "jsonl", "path": str(folder), "verifier": verifier}
    out.mkdir(exist_ok=True)
    return problems(ProblemsOptions.model_validate({"task": task, "problems": section}), {}, out)


def ids(path: Path) -> list[str]:
    return [problem.id for problem in read_jsonl(path, Problem)]


def test_train_problems_that_stand_in_test_or_validation_are_dropped_and_counted(tmp_path: Path) -> None:
    data = write(
        tmp_path / "data",
        train=[row("a", "Say: one!"), row("b", "two"), row("c", "three"), row("d", "Two?"), row("e", "four")],
        validation=[row("v", "FOUR")],
        test=[row("t", "say one"), row("u", "five")],
    )
    metrics = run(data, tmp_path / "out")
    assert metrics == {
        "train": 2,
        "train_available": 2,
        "validation": 1,
        "test": 2,
        "dropped": {"in_test": 1, "in_validation": 1, "repeated": 1},
    }
    assert said_dropped(metrics["dropped"]) == "3 left out (1 in test too, 1 in validation too, 1 repeated in train)"
    assert said_dropped({}) == ""
    assert ids(tmp_path / "out/problems.jsonl") == ["b", "c"]
    assert ids(tmp_path / "out/validation.jsonl") == ["v"]
    assert ids(tmp_path / "out/test.jsonl") == ["t", "u"]
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert dropped == [
        {"id": "a", "split": "train", "reason": "in_test", "repeats": "t"},
        {"id": "d", "split": "train", "reason": "repeated", "repeats": "b"},
        {"id": "e", "split": "train", "reason": "in_validation", "repeats": "v"},
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 2+2?", "what  is 2 + 2", True),
        ("It costs 1,000 dollars.", "It costs 1000 dollars", True),
        ("A well-known “oak”", "a well known 'oak'", True),
        ("３ apples", "3 apples", True),
        ("What is 7 - 2?", "What is 7 + 2?", False),
        ("What is 1.5 * 2?", "What is 15 * 2?", False),
        ("Solve x-y.", "Solve x+y.", False),
        ("1 2", "12", False),
        ("?!", "!?", False),
        ("日本の首都は？", "日本の首都は", True),
    ],
)
def test_what_makes_two_questions_the_same(one: str, other: str, same: bool) -> None:
    """Case, spacing and punctuation do not tell questions apart; numbers and signs do."""
    keys = [question_key(Problem(text, text, "1")) for text in (one, other)]
    assert (keys[0] == keys[1]) is same


def test_choices_are_part_of_a_question_whatever_their_order() -> None:
    def key(*choices: str) -> str:
        return question_key(Problem("a", "Which?", "A", choices))

    assert key("oak", "fig") == key("Fig.", "oak") != key("oak", "elm")


@given(st.sets(st.text(max_size=3), max_size=20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_a_larger_limit_only_adds_problems(names: set[str], limit: int, more: int, seed: int) -> None:
    found = [Problem(name, "q", "1") for name in sorted(names)]
    few, many = take(found, limit, seed), take(found, limit + more, seed)
    assert len(few) == min(limit, len(found))
    assert [problem for problem in many if problem in few] == few
    assert many == [problem for problem in found if problem in many]
    assert take(found, None, seed) == found


def test_the_limit_counts_what_is_left_and_the_seed_decides_which(tmp_path: Path) -> None:
    train = [row(str(number), f"question {number}") for number in range(50)]
    data = write(tmp_path / "data", train=train, test=[row("t", "question 0")])
    metrics = run(data, tmp_path / "out", limit=10)
    assert (metrics["train"], metrics["train_available"], metrics["dropped"]) == (10, 49, {"in_test": 1})
    first = ids(tmp_path / "out/problems.jsonl")
    run(data, tmp_path / "out", limit=10, seed=1)
    assert ids(tmp_path / "out/problems.jsonl") != first


def test_train_problems_are_held_out_where_there_is_no_validation_split(tmp_path: Path) -> None:
    rows = [row(f"p{i}", f"question {i}") for i in range(20)]
    data = write(tmp_path / "data", train=rows, test=[row("t", "other")])
    first = run(data, tmp_path / "first", holdout=5, limit=4)
    assert (first["validation"], first["train"], first["train_available"]) == (5, 4, 15)
    run(data, tmp_path / "more", holdout=5, limit=9)
    held_out = ids(tmp_path / "first/validation.jsonl")
    assert held_out == ids(tmp_path / "more/validation.jsonl") == sorted(held_out, key=lambda name: int(name[1:]))
    assert set(ids(tmp_path / "first/problems.jsonl")) < set(ids(tmp_path / "more/problems.jsonl"))
    assert not set(held_out) & set(ids(tmp_path / "more/problems.jsonl"))
    run(data, tmp_path / "other", holdout=5, seed=1)
    assert set(ids(tmp_path / "other/validation.jsonl")) != set(held_out)
    with pytest.raises(DataError, match=r"more train problems than problems\.holdout \(20\), found 20"):
        run(data, tmp_path / "none", holdout=20)
    run(data, tmp_path / "named", holdout=5, validation="dev")
    assert ids(tmp_path / "named/validation.jsonl") == held_out
    write(data, validation=[row("v", "its own")])
    assert run(data, tmp_path / "own", holdout=5)["train_available"] == 20
    assert ids(tmp_path / "own/validation.jsonl") == ["v"]


def test_a_file_whose_parts_have_no_validation_problem_holds_some_out(tmp_path: Path) -> None:
    """One file is split by a hash of each id: few problems may leave a part empty."""
    names = [f"q{i}" for i in range(40) if file_split(f"q{i}") != "validation"]
    write(tmp_path / "data", all=[row(name, f"question {name}") for name in names])
    assert run(tmp_path / "data/all.jsonl", tmp_path / "out")["validation"] == 0
    held_out = run(tmp_path / "data/all.jsonl", tmp_path / "held", holdout=3)
    assert held_out["validation"] == 3
    assert held_out["train"] + 3 + held_out["test"] == len(names)


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    train = [row(str(number), f"question {number}") for number in range(50)]
    data = write(tmp_path / "data", train=train, test=[row("t", "q")])
    for out in ("one", "two"):
        run(data, tmp_path / out, limit=5)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"problems.jsonl", "validation.jsonl", "test.jsonl", "dropped.jsonl"}


def test_only_a_default_validation_split_may_be_absent(tmp_path: Path) -> None:
    data = write(tmp_path / "data", train=[row("a", "x")], test=[row("b", "y")], dev=[row("c", "z")])
    assert run(data, tmp_path / "out")["validation"] == 0
    assert run(data, tmp_path / "out", validation=None)["validation"] == 0
    assert (tmp_path / "out/validation.jsonl").read_bytes() == b""
    with pytest.raises(DataError, match=r"expected a split 'valid' in .*, found dev, test, train"):
        run(data, tmp_path / "out", validation="valid")
    assert run(data, tmp_path / "out", validation="dev")["validation"] == 1


@pytest.mark.parametrize(
    ("splits", "section", "message"),
    [
        ({"train": [row("a", "x")], "test": [row("b", "y")]}, {"test": "tst"}, "expected a split 'tst' .* test, train"),
        ({"train": [row("a", "x")], "test": [row("b", "X!")]}, {}, "split 'train', found none, 1 were dropped"),
        ({"train": [row("a", "x")], "test": []}, {}, r"test\.jsonl: expected at least one problem"),
        ({"train": [row("a", "x")], "test": [row("a", "y")]}, {}, "'a' for different ones in splits 'train' and 'tes"),
        ({"train": [row("a", "x"), row("a", "y")], "test": [row("b", "z")]}, {}, r"train\.jsonl:2: expected a new id"),
    ],
)
def test_data_that_cannot_be_used_leaves_nothing_behind(
    tmp_path: Path, splits: dict[str, Any], section: dict[str, str], message: str
) -> None:
    data = write(tmp_path / "data", **splits)
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "out", **section)
    assert not list((tmp_path / "out").iterdir())


def test_an_id_may_stand_in_two_splits_for_the_same_problem(tmp_path: Path) -> None:
    data = write(tmp_path / "data", train=[row("a", "x"), row("b", "y")], test=[row("a", "x")])
    assert run(data, tmp_path / "out")["dropped"] == {"in_test": 1}


@pytest.mark.parametrize(
    ("verifier", "answers", "rate"),
    [("yes_no", ["yes", "no", "yes", "yes"], 0.75), ("choice", ["A", "B", "C", "A"], 0.5), ("number", ["1"], None)],
)
def test_the_majority_rate_of_test_is_told_where_guessing_pays(
    tmp_path: Path, verifier: str, answers: list[str], rate: float | None
) -> None:
    choices = ["x", "y", "z"] if verifier == "choice" else None
    rows = [row(f"t{n}", f"question {n}", answer, choices=choices) for n, answer in enumerate(answers)]
    data = write(tmp_path / "data", train=[row("a", "x", answers[0], choices=choices)], test=rows)
    assert run(data, tmp_path / "out", verifier).get("test_majority_rate") == rate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "in_test"), [("openbookqa", 4952, 14), ("arc_easy", 2251, 3), ("strategyqa", 1603, 1)]
)
def test_the_known_overlaps_of_real_data_are_found(name: str, train: int, in_test: int, tmp_path: Path) -> None:
    """../shared/data/README.md counts them by its own normal form (no case, no punctuation, same choices)."""
    task = {"type": name, "path": str(SHARED / name)}
    metrics = problems(ProblemsOptions.model_validate({"task": task, "problems": {}}), {}, tmp_path)
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert len({drop["repeats"] for drop in dropped if drop["reason"] == "in_test"}) == in_test
    assert metrics["train"] + len(dropped) == train
