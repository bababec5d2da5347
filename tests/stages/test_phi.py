"""The phi stage: golden values of both worths, what it falls back on, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.errors import DataError
from orpo_distill.records import Outcome, Problem, Trace, Verdict, write_jsonl
from orpo_distill.stages.phi import PhiOptions, phi

OUTCOMES = {"c": Outcome.CORRECT, "w": Outcome.WRONG, "u": Outcome.UNPARSEABLE, "t": Outcome.TRUNCATED}
Sampled = Mapping[str, Sequence[str]]


class World:
    """Three problems and what both students wrote for them. A trace is "w:text": its outcome's letter and its text."""

    def __init__(self, folder: Path, latest: Sampled, initial: Sampled) -> None:
        self.folder = folder
        self.inputs = {"problems": folder / "problems"}
        self.inputs["problems"].mkdir()
        write_jsonl(folder / "problems" / "problems.jsonl", (Problem(f"p{i}", "?", "1") for i in range(3)))
        self._sampled("latest", "student-1", latest)
        self._sampled("initial", "student-0", initial)

    def _sampled(self, name: str, policy: str, traces: Sampled) -> None:
        made = [
            (Trace(f"{policy}/{key}/{i}", key, policy, i, spec[2:]), spec[0])
            for key, specs in traces.items()
            for i, spec in enumerate(specs)
        ]
        for part in ("", "-verdicts"):
            self.inputs[name + part] = self.folder / (name + part)
            self.inputs[name + part].mkdir()
        write_jsonl(self.inputs[name] / "traces.jsonl", [trace for trace, _ in made])
        verdicts = [Verdict(trace.id, OUTCOMES[kind], None, "") for trace, kind in made]
        write_jsonl(self.inputs[f"{name}-verdicts"] / "verdicts.jsonl", verdicts)

    def run(self, adaptive: str = "yield", before: float | None = None) -> dict[str, Any]:
        if before is not None:
            self.inputs["phi"] = self.folder / "before"
            self.inputs["phi"].mkdir(exist_ok=True)
            (self.inputs["phi"] / "phi.json").write_text(json.dumps({"phi": before}))
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        metrics = phi(PhiOptions(adaptive=adaptive, start=0.5), self.inputs, out)
        assert json.loads((out / "phi.json").read_bytes()) == metrics
        return metrics


INITIAL = {"p0": ["w:a", "w:b", "c:c", "w:d"], "p1": ["w:a", "w:b", "w:c", "w:d"], "p2": ["w:a", "u:b", "c:c", "c:d"]}


def test_yield_on_the_same_problems_and_sample_indices(tmp_path: Path) -> None:
    """p0 is asked 2 of its 4 times, p1 not at all, p2 4 times: latest 1 + 1 of 6, initial 2 + 1 of 6 (p1 is left out,
    and so is p0's fourth sample). phi = 0.5 * (2/6) / (3/6) = 1/3.
    """
    world = World(tmp_path, {"p0": ["w:x", "t:y"], "p2": ["w:x", "u:y", "c:z", "c:q"]}, INITIAL)
    found = world.run()
    assert found["phi"] == pytest.approx(1 / 3)
    assert (found["latest"], found["initial"]) == (pytest.approx(2 / 6), pytest.approx(3 / 6))
    assert (found["problems"], found["traces"], found["reason"]) == (2, 6, "")


def test_diversity_where_both_have_two_negatives_and_as_many_of_each(tmp_path: Path) -> None:
    """Only p0: the first two of each. "a b c d" and "a b x y" share 2 of 4 words, F1 = 0.5; the latest's share 3, 0.75.

    phi = 0.5 * 0.25 / 0.5. The initial's third, alike to its first, is not looked at.
    """
    initial = {"p0": ["w:a b c d", "w:a b x y", "w:a b c d"], "p1": ["w:a", "w:b", "w:c"], "p2": ["w:a", "c:b", "c:c"]}
    latest = {"p0": ["w:a b c d", "c:so", "w:a b c x"], "p1": ["w:a", "c:b", "c:c"], "p2": ["w:a", "w:b", "w:c"]}
    found = World(tmp_path, latest, initial).run("diversity")
    assert found["phi"] == pytest.approx(0.25)
    assert (found["latest"], found["initial"]) == (pytest.approx(0.25), pytest.approx(0.5))
    assert (found["problems"], found["traces"]) == (1, 2)


@pytest.mark.parametrize(
    ("adaptive", "latest", "initial", "reason"),
    [
        ("yield", {}, INITIAL, "given no problem"),
        ("yield", {"p0": ["w:x"]}, {"p0": ["c:1"]}, "no wrong trace"),
        ("diversity", {"p0": ["w:x", "c:y"]}, INITIAL, "for no problem do both"),
        ("diversity", {"p0": ["w:x", "w:y"]}, {"p0": ["w:same", "w:same"]}, "all alike"),
    ],
)
def test_what_cannot_be_measured_leaves_phi_as_it_was(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    adaptive: str,
    latest: Sampled,
    initial: Sampled,
    reason: str,
) -> None:
    world = World(tmp_path, latest, initial)
    assert world.run(adaptive)["phi"] == 0.5
    found = world.run(adaptive, before=0.3)
    assert found["phi"] == 0.3
    assert reason in found["reason"]
    assert f"phi stays 0.3: {found['reason']}" in capsys.readouterr().err


def test_a_student_that_makes_no_mistake_is_not_asked_again(tmp_path: Path) -> None:
    found = World(tmp_path, {"p1": ["c:x", "c:y"]}, INITIAL).run(before=0.4)
    assert (found["phi"], found["latest"], found["initial"]) == (0.0, 0.0, 1.0)


def test_traces_of_an_unknown_problem_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample and verify again"):
        World(tmp_path, {"p7": ["w:x"]}, INITIAL).run()
