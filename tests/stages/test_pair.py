from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orpo_distill.errors import DataError
from orpo_distill.mixing import latest_share
from orpo_distill.records import (
    FinishReason,
    Message,
    Outcome,
    Pair,
    Problem,
    Trace,
    Verdict,
    read_jsonl,
    write_jsonl,
)
from orpo_distill.stages.pair import PairOptions, pair, pair_indices
from orpo_distill.tasks import Task
from orpo_distill.verifiers import Verifier
from orpo_distill.verifiers.exact import Exact

OUTCOMES = {"c": Outcome.CORRECT, "w": Outcome.WRONG, "u": Outcome.UNPARSEABLE, "a": Outcome.AMBIGUOUS}
OUTCOMES |= {"t": Outcome.TRUNCATED, "f": Outcome.FAILED}
Sampled = Mapping[str, Sequence[str]]


class Plain(Task):
    """Asks the question as it stands."""

    def load(self, split: str) -> list[Problem]:
        return []

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        return (Message("user", problem.question),)

    def judge(self) -> Verifier:
        return Exact()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer that knows no word: one token a word, and one a run of punctuation."""
    folder = tmp_path_factory.mktemp("tokenizer")
    inner = Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return str(folder)


class World:
    """A run folder's files. A trace is written "c:text": its outcome's letter, "!" if it was cut, and its text."""

    def __init__(self, folder: Path, tokenizer: str, problems: Sequence[str] = ("p1",)) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.inputs: dict[str, Path] = {}
        self._at("problems")
        found = (Problem(name, f"question of {name}", "1") for name in problems)
        write_jsonl(folder / "problems" / "problems.jsonl", found)

    def _at(self, name: str) -> Path:
        self.inputs[name] = self.folder / name
        self.inputs[name].mkdir(exist_ok=True)
        return self.inputs[name]

    def sampled(self, name: str, policy: str, traces: Sampled, first: int = 0) -> World:
        made, verdicts = [], []
        for problem_id, specs in traces.items():
            for index, spec in enumerate(specs, start=first):
                kind, _, text = spec.partition(":")
                reason = FinishReason.LENGTH if "!" in kind else FinishReason.STOP
                trace_id = f"{policy}/{problem_id}/{index}"
                made.append(Trace(trace_id, problem_id, policy, index, text, reason))
                verdicts.append(Verdict(trace_id, OUTCOMES[kind[0]], None, ""))
        write_jsonl(self._at(name) / "traces.jsonl", made)
        write_jsonl(self._at(f"{name}-verdicts") / "verdicts.jsonl", verdicts)
        return self

    def run(self, **options: Any) -> dict[str, Any]:
        own = {"phi": 0.0, "round": 1, "seed": 0, "samples": 2, "max_length": 64, "tokenizer": self.tokenizer}
        self.out = self._at("out")
        return pair(PairOptions(task=Plain(), **{**own, **options}), self.inputs, self.out)

    @property
    def pairs(self) -> list[Pair]:
        return list(read_jsonl(self.out / "pairs.jsonl", Pair))

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [(row.chosen, row.rejected) for row in self.pairs]

    @property
    def dropped(self) -> dict[str, str]:
        """trace id, or problem id, -> reason"""
        lines = [json.loads(line) for line in (self.out / "dropped.jsonl").read_text().splitlines()]
        return {line["trace_id"] or line["problem_id"]: line["reason"] for line in lines}


@pytest.fixture
def world(tmp_path: Path, tokenizer: str) -> World:
    return World(tmp_path, tokenizer)


def test_a_pair_says_where_both_sides_come_from(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["w:so 4", "c: so 5 \n"]})
    world.sampled("initial", "student-0", {"p1": ["c:five", "w!:hm 6 and"]})
    metrics = world.run()
    assert world.pairs == [
        Pair(
            problem_id="p1",
            prompt=(Message("user", "question of p1"),),
            chosen="so 5",
            rejected="hm 6 and",
            chosen_id="teacher/p1/1",
            rejected_id="student-0/p1/1",
            chosen_policy="teacher",
            rejected_policy="student-0",
            rejected_cut=True,
        )
    ]
    assert world.dropped == {"teacher/p1/0": "wrong", "student-0/p1/0": "correct"}
    assert metrics == {
        "phi": 0.0,
        "pairs": 1,
        "problems": 1,
        "paired_problems": 1,
        "pairs_per_problem": 1.0,
        "used": {"chosen": 1, "rejected": 1},
        "dropped": {"problem": {}, "chosen": {"wrong": 1}, "rejected": {"correct": 1}},
        "rejected_policies": {"student-0": 1.0},
        "sent_to_latest": 0,
        "fell_back": 0,
        "fell_back_share": None,
    }


def test_every_reason_of_the_chosen_side(world: World) -> None:
    """The question takes 3 tokens, so of 13 there are 13 - 3 - 1 = 9 left for a response."""
    long = " ".join(f"w{i}" for i in range(9))
    traces = {
        "c:two words": "",
        "c: Two words": "too_similar",
        "c:two words\n": "duplicate",
        "w:no": "wrong",
        "u:no": "unparseable",
        "a:no": "ambiguous",
        "t!:no": "truncated",
        "c!:right but cut": "truncated",
        "f:": "failed",
        "c:one": "too_short",
        "c:": "too_short",
        f"c:{long}": "",
        f"c:{long} more": "too_long",
        "c:third kept": "over_max_chosen",
    }
    world.sampled("teacher", "teacher", {"p1": list(traces)})
    world.sampled("initial", "student-0", {"p1": ["w:it is six", "u:hm"]})
    world.run(max_length=13, min_response_tokens=2, max_chosen=2)
    found = world.dropped
    assert [found.get(f"teacher/p1/{index}", "") for index in range(len(traces))] == list(traces.values())
    assert world.texts == [("two words", "it is six"), (long, "it is six")]


def test_the_response_limit_is_in_the_students_tokens(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["c:one two three", "c:one two three four"]})
    world.sampled("initial", "student-0", {"p1": ["w:a b c d", "w:a b"]})
    world.run(max_response_tokens=3)
    assert world.texts == [("one two three", "a b")]
    assert world.dropped == {"teacher/p1/1": "too_long", "student-0/p1/0": "too_long"}


@pytest.mark.parametrize("limit", [3, 6, 9, 12, 15])
def test_a_text_that_fits_in_characters_is_not_counted_and_one_that_may_not_is(world: World, limit: int) -> None:
    """One token a word here; the text of 11 bytes that is not ASCII could have more tokens than characters."""
    texts = ["one two six", "a b c d e f", "élan vital", "antidisestablishment", "a b c d e f g h i j k l m n o p"]
    world.sampled("teacher", "teacher", {"p1": [f"c:{text}" for text in texts]})
    world.sampled("initial", "student-0", {"p1": ["w:x", "w:y"]})
    world.run(max_response_tokens=limit, rouge_l_max=1.0)
    too_long = {f"teacher/p1/{index}" for index, text in enumerate(texts) if len(text.split()) > limit}
    assert {name for name, reason in world.dropped.items() if reason == "too_long"} == too_long


def test_a_too_long_trace_does_not_shadow_a_similar_shorter_one(world: World) -> None:
    """Ten words and the first nine of them have F1 = 18 / 19: only one of them may stay, and ten do not fit."""
    ten = " ".join(f"w{i}" for i in range(10))
    world.sampled("teacher", "teacher", {"p1": [f"c:{ten}", f"c:{ten[:-3]}"]})
    world.sampled("initial", "student-0", {"p1": ["w:six", "w:seven"]})
    world.run(max_length=13, max_chosen=1)
    assert {chosen for chosen, _ in world.texts} == {ten[:-3]}


def test_problems_without_a_side_are_recorded(tmp_path: Path, tokenizer: str) -> None:
    world = World(
        tmp_path, tokenizer, ["both", "wrong teacher", "right student", "nothing", "far too long a name " * 9]
    )
    wrong, right = ["w:six", "w:seven"], ["c:two", "c:three"]
    sides = {"both": right, "wrong teacher": wrong, "right student": right, "nothing": wrong}
    world.sampled("teacher", "teacher", {**sides, "far too long a name " * 9: right})
    sides = {"both": wrong, "wrong teacher": wrong, "right student": right, "nothing": right}
    world.sampled("initial", "student-0", {**sides, "far too long a name " * 9: wrong})
    metrics = world.run(max_length=16)
    assert metrics["dropped"]["problem"] == {"no_chosen": 2, "no_rejected": 1, "prompt_too_long": 1}
    assert metrics["paired_problems"] == 1
    assert world.dropped["wrong teacher"] == "no_chosen"
    assert world.dropped["student-0/wrong teacher/0"] == "unpaired"
    assert world.dropped["right student"] == "no_rejected"
    assert world.dropped["teacher/right student/1"] == "unpaired"


def test_rows_without_negatives(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["c:five", "w:six", "c:so it is five"]})
    world.run(needs_rejected=False)
    assert world.texts == [("five", ""), ("so it is five", "")]
    assert {(row.rejected_id, row.rejected_policy, row.rejected_cut) for row in world.pairs} == {("", "", False)}


def test_negatives_from_the_teacher(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["c:five", "w:six", "w:seven"]})
    metrics = world.run(negatives_from="teacher")
    assert world.texts == [("five", "six"), ("five", "seven")]
    assert metrics["rejected_policies"] == {"teacher": 1.0}


PROBLEMS = [f"p{i}" for i in range(12)]


def mixed_world(folder: Path, tokenizer: str, unit: Any, latest: Sequence[str]) -> tuple[World, dict[str, int]]:
    """12 problems; the latest student's traces are there only where round 2's coin (phi = 0.5, K = 2) asks for them."""
    world = World(folder, tokenizer, PROBLEMS)
    world.sampled("teacher", "teacher", {name: ["c:so it is five"] for name in PROBLEMS})
    world.sampled("initial", "student-0", {name: ["w:old six", "w:quite another seven"] for name in PROBLEMS})
    shares = {name: latest_share(0.5, unit, 0, 2, name, 2) for name in PROBLEMS}
    world.sampled("latest", "student-1", {name: latest[:share] for name, share in shares.items() if share})
    return world, shares


@pytest.mark.parametrize("unit", ["trace", "problem", "round"])
def test_the_coin_decides_which_student_the_negatives_come_from(tmp_path: Path, tokenizer: str, unit: str) -> None:
    world, shares = mixed_world(tmp_path, tokenizer, unit, ["w:new eight", "w:something else nine"])
    metrics = world.run(round=2, phi=0.5, phi_unit=unit)
    found: dict[str, Counter[str]] = {name: Counter() for name in PROBLEMS}
    for row in world.pairs:
        found[row.problem_id][row.rejected_policy] += 1
    assert {name: counts["student-1"] for name, counts in found.items()} == shares
    assert all(counts.total() == 2 for counts in found.values())
    assert metrics["sent_to_latest"] == sum(share > 0 for share in shares.values())
    assert metrics["rejected_policies"].get("student-1", 0) == pytest.approx(sum(shares.values()) / 24)
    assert metrics["fell_back"] == 0


@pytest.mark.parametrize("unit", ["trace", "problem"])
def test_the_initial_student_stands_in_where_the_latest_is_never_wrong(
    tmp_path: Path, tokenizer: str, unit: str
) -> None:
    world, shares = mixed_world(tmp_path, tokenizer, unit, ["c:it is five", "u:hm"])
    sent = sum(share > 0 for share in shares.values())
    assert 0 < sent < 12
    metrics = world.run(round=2, phi=0.5, phi_unit=unit)
    assert metrics["rejected_policies"] == {"student-0": 1.0}
    assert metrics["pairs"] == 24
    assert metrics["sent_to_latest"] == metrics["fell_back"] == sent
    assert metrics["fell_back_share"] == 1.0


def test_or_its_problems_are_skipped(tmp_path: Path, tokenizer: str) -> None:
    world, shares = mixed_world(tmp_path, tokenizer, "problem", ["c:it is five", "u:hm"])
    metrics = world.run(round=2, phi=0.5, on_empty="skip")
    assert metrics["fell_back"] == 0
    assert metrics["dropped"]["problem"] == {"no_rejected": sum(share > 0 for share in shares.values())}


def test_phi_0_repeats_round_1_bit_for_bit(tmp_path: Path, tokenizer: str) -> None:
    world, _ = mixed_world(tmp_path, tokenizer, "problem", ["w:new", "w:newer"])
    options: dict[str, Any] = {"pairing": "random", "per_problem": 1}
    del world.inputs["latest"]
    world.run(**options)
    first = world.pairs
    world.run(round=3, phi=0.0, **options)
    assert world.pairs == first


def test_phi_1_uses_the_latest_only(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["c:five"]})
    world.sampled("latest", "student-1", {"p1": ["w:six", "c:five"]})
    world.run(round=2, phi=1.0, on_empty="skip")
    assert world.texts == [("five", "six")]


@given(
    st.sampled_from(["cycle", "product", "random"]),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_pairing(pairing: Any, chosen: int, rejected: int, most: int, seed: int) -> None:
    found = pair_indices(pairing, chosen, rejected, most, seed)
    assert found == sorted(set(found)) == pair_indices(pairing, chosen, rejected, most, seed)
    total = {"cycle": max(chosen, rejected), "product": chosen * rejected, "random": chosen}[pairing]
    assert len(found) == (min(most, total) if chosen and rejected else 0)
    if found:
        assert {c for c, _ in found} <= set(range(chosen))
        assert len({c for c, _ in found}) == min(chosen, most)
        assert {r for _, r in found} <= set(range(rejected))
        if pairing == "cycle" and most >= total:
            assert {r for _, r in found} == set(range(rejected))


def test_cycling_by_hand() -> None:
    """Three chosen, two rejected: the rejected side is cycled, 0 1 0. Two and three: the chosen side is."""
    assert pair_indices("cycle", 3, 2, 8, 0) == [(0, 0), (1, 1), (2, 0)]
    assert pair_indices("cycle", 2, 3, 8, 0) == [(0, 0), (0, 2), (1, 1)]


specs = st.lists(st.sampled_from(["c:a b", "c:c", "c!:d", "w:e f", "w!:g", "u:h", "c:a b ", "w:e F", "f:"]), max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    teacher=st.tuples(specs, specs, specs),
    initial=st.tuples(*[st.lists(st.sampled_from(["c:x", "w:y", "w:z", "t!:u"]), min_size=3, max_size=3)] * 3),
    pairing=st.sampled_from(["cycle", "product", "random"]),
    per_problem=st.integers(1, 4),
)
def test_nothing_disappears_without_a_count(
    tokenizer: str, teacher: Any, initial: Any, pairing: str, per_problem: int
) -> None:
    """On both sides every trace is used or dropped for one reason; every problem gives pairs or is dropped."""
    names = ["p1", "p2", "p3"]
    with TemporaryDirectory() as folder:
        world = World(Path(folder), tokenizer, names)
        world.sampled("teacher", "teacher", dict(zip(names, teacher, strict=True)))
        world.sampled("initial", "student-0", dict(zip(names, initial, strict=True)))
        try:
            metrics = world.run(samples=3, pairing=pairing, per_problem=per_problem)
        except DataError:
            metrics = None
        used = {row.chosen_id for row in world.pairs} | {row.rejected_id for row in world.pairs}
        dropped = set(world.dropped)
        everything = {
            f"teacher/{name}/{i}" for name, found in zip(names, teacher, strict=True) for i in range(len(found))
        }
        everything |= {f"student-0/{name}/{i}" for name in names for i in range(3)}
        everything |= set(names) - {row.problem_id for row in world.pairs}
        assert used | dropped == everything
        assert not used & dropped
        if metrics:
            sides = ("chosen", "rejected")
            assert sum(metrics["used"][side] for side in sides) == len(used)
            assert sum(sum(found.values()) for found in metrics["dropped"].values()) == len(dropped)


@pytest.mark.parametrize(
    ("teacher", "initial", "options", "message"),
    [
        (["w:six", "w:six", "u:hm"], ["w:a", "w:b"], {}, "correct teacher trace.*2 wrong, 1 unparseable.*easier"),
        (["t!:so", "t!:hm"], ["w:a", "w:b"], {}, "2 truncated.*raise teacher.decoding.max_new_tokens"),
        (["c!:so", "t!:hm"], ["w:a", "w:b"], {}, "2 truncated.*raise teacher.decoding.max_new_tokens"),
        (["c:so"], ["t!:a", "t!:b"], {}, "wrong student trace.*raise student.decoding.max_new_tokens"),
        (["c:so"], ["c:a", "c:b"], {}, "wrong student trace.*2 correct.*objective: sft"),
        (["c:so"], [], {"negatives_from": "teacher"}, "wrong teacher trace.*1 correct"),
        (["c:so"], ["w:a", "w:b"], {"max_length": 3}, "train.max_length.*3 tokens.*raise train.max_length"),
        (["c:so it is"], ["w:a", "w:b"], {"max_length": 6}, "1 too_long.*raise train.max_length"),
        (["c:so it is"], ["w:a", "w:b"], {"min_response_tokens": 4}, "1 too_short.*lower pairs.min_response_tokens"),
    ],
)
def test_nothing_to_train_on_is_one_clear_error(
    world: World, teacher: list[str], initial: list[str], options: dict[str, Any], message: str
) -> None:
    world.sampled("teacher", "teacher", {"p1": teacher}).sampled("initial", "student-0", {"p1": initial})
    with pytest.raises(DataError, match=message):
        world.run(**options)


def test_no_problem_with_both_sides(tmp_path: Path, tokenizer: str) -> None:
    world = World(tmp_path, tokenizer, ["p1", "p2"])
    world.sampled("teacher", "teacher", {"p1": ["c:five"], "p2": ["w:six"]})
    world.sampled("initial", "student-0", {"p1": ["c:a", "c:b"], "p2": ["w:a", "w:b"]})
    with pytest.raises(DataError, match=r"both.*among 2 \(1 no_rejected, 1 no_chosen\)"):
        world.run()


def test_no_problems(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DataError, match="expected problems"):
        World(tmp_path, tokenizer, []).run()


def test_a_coin_that_was_not_sampled_for(world: World) -> None:
    world.sampled("teacher", "teacher", {"p1": ["c:five"]})
    world.sampled("initial", "student-0", {"p1": ["w:a", "w:b"]})
    world.sampled("latest", "student-1", {"p1": ["w:a"]})
    with pytest.raises(DataError, match="expected 2 traces of problem 'p1' from the latest student, found 1"):
        world.run(round=2, phi=1.0)
