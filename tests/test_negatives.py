"""Sources beside each other: only problems that both can show enough negatives for, and the first few of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orpo_distill.errors import DataError
from orpo_distill.negatives import Comparison, Gathered, Negative, Rules, gather
from orpo_distill.records import Message, Outcome, Pair, Problem, Trace, Verdict, write_jsonl

OUTCOMES = {"c": Outcome.CORRECT, "w": Outcome.WRONG, "u": Outcome.UNPARSEABLE}
PROBLEMS = [Problem(f"p{i}", "?", "1") for i in range(4)]
RULES = Rules(traces=2, scored=10, seed=0)


def negatives(*texts: str) -> list[Negative]:
    return [Negative(text, text[-1], False) for text in texts]


def test_a_problem_counts_where_both_have_enough_and_then_the_first_ones() -> None:
    """p0: of three and two the first two each; p1: one is too few. "a 1" and "b 1" have F1 0.5."""
    comparison = Comparison(RULES)
    comparison.add(PROBLEMS[0], negatives("a 1", "b 1", "c 9"), negatives("a 1", "a 1"))
    comparison.add(PROBLEMS[1], negatives("a 1"), negatives("a 1", "b 2", "c 3"))
    rows = {row["measure"]: row for row in comparison.rows()}
    assert comparison.problems == 1
    assert (rows["rouge_l"]["first"], rows["rouge_l"]["second"], rows["rouge_l"]["problems"]) == (0.5, 1.0, 1)
    assert (rows["unique_answers"]["first"], rows["unique_answers"]["second"]) == (0.5, 0.5)
    (chosen,) = comparison.chosen
    assert [one.text for one in chosen.first] == ["a 1", "b 1"]


def test_a_measure_that_is_undefined_leaves_its_problem_out() -> None:
    comparison = Comparison(RULES)
    comparison.add(PROBLEMS[0], negatives("1", "2"), negatives("a 1", "b 1"))
    assert "distinct_2" not in {row["measure"] for row in comparison.rows()}


def test_the_problems_to_be_scored_are_the_seeds_whatever_else_there_is() -> None:
    problems = [Problem(f"p{i}", "?", "1") for i in range(50)]
    pair = negatives("a 1", "b 1")

    def chosen(seed: int, found: Sequence[Problem]) -> list[str]:
        comparison = Comparison(Rules(2, 5, seed))
        for problem in found:
            comparison.add(problem, pair, pair)
        return [one.problem.id for one in comparison.chosen]

    first = chosen(0, problems)
    assert len(first) == 5
    assert chosen(0, problems[::-1]) == first
    without = [problem for problem in problems if problem.id != first[0]]
    assert chosen(0, without)[:4] == first[1:]
    assert chosen(1, problems) != first


class World:
    """A run folder's traces, verdicts and pairs. A trace is "w:text"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, Path] = {}
        write_jsonl(self._at("problems") / "problems.jsonl", PROBLEMS)

    def _at(self, name: str) -> Path:
        self.inputs[name] = self.folder / name
        self.inputs[name].mkdir(parents=True, exist_ok=True)
        return self.inputs[name]

    def sampled(self, name: str, traces: Mapping[str, Sequence[str]]) -> World:
        made = [
            (Trace(f"{name}/{key}/{i}", key, name, i, spec[2:]), OUTCOMES[spec[0]])
            for key, specs in traces.items()
            for i, spec in enumerate(specs)
        ]
        write_jsonl(self._at(name) / "traces.jsonl", [trace for trace, _ in made])
        verdicts = [Verdict(trace.id, outcome, trace.text[-1], "") for trace, outcome in made]
        write_jsonl(self._at(f"{name}-verdicts") / "verdicts.jsonl", verdicts)
        return self

    def paired(self, number: int, rejected: Mapping[str, Sequence[str]]) -> World:
        prompt = (Message("user", "?"),)
        pairs = [
            Pair(key, prompt, "yes", text, "c", text, "teacher", "student-0")
            for key, texts in rejected.items()
            for text in texts
        ]
        write_jsonl(self._at(f"round-{number}/pairs") / "pairs.jsonl", pairs)
        return self

    def gather(self, *rounds: int) -> Gathered:
        return gather(self.inputs, rounds, RULES)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path).sampled("student-0", {f"p{i}": ["w:a 1", "w:b 2", "c:c 3", "w:d 4"] for i in range(4)})
    return world.paired(1, {"p0": ["a 1", "b 2", "a 1"], "p2": ["a 1", "b 2"]})


def test_the_initial_students_same_samples(world: World) -> None:
    """Of p1 two samples, of p3 one: the initial student's first two (both wrong) and first one (wrong)."""
    world.sampled("round-2/student", {"p1": ["w:x 1", "c:y 2"], "p3": ["u:z 3"]})
    found = world.gather()
    latest, initial = found.samples["round-2/student"].numbers(), found.initial["round-2/student"].numbers()
    assert (latest["samples"], latest["problems"], latest["dried_up"]) == (3, 2, 1)
    assert (latest["wrong"], latest["words"], latest["tokens"]) == (pytest.approx(1 / 3), 2.0, None)
    assert (initial["samples"], initial["wrong"], initial["dried_up"]) == (3, 1.0, 0)
    assert found.samples["student-0"].numbers()["samples"] == 16
    assert found.sources["round-2/student"].problems == 0


def test_a_latest_student_without_traces(world: World) -> None:
    world.sampled("round-2/student", {})
    numbers = world.gather().samples["round-2/student"].numbers()
    assert (numbers["samples"], numbers["wrong"], numbers["words"]) == (0, None, None)


def test_pairs_are_compared_by_their_different_rejected_texts(world: World) -> None:
    """p0: a 1 and b 2 in round 1 (a 1 twice), one text in round 2; p2: two in each."""
    world.sampled("teacher", {}).paired(2, {"p0": ["a 1", "a 1"], "p2": ["q 1", "r 1"]})
    rows = {row["measure"]: row for row in world.gather(2).trained_on[2].rows()}
    assert rows["rouge_l"]["problems"] == 1
    assert (rows["rouge_l"]["first"], rows["rouge_l"]["second"]) == (0.5, 0.0)


def test_files_that_do_not_belong_together(world: World) -> None:
    world.paired(1, {"p9": ["a 1"]})
    with pytest.raises(DataError, match=r"problem 'p9'; make the pairs again"):
        world.gather()
