"""Import: texts that a user owns become traces of a run."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, DataError, RunError
from orpo_distill.experiment import run, status
from orpo_distill.importing import PARTIAL, import_texts
from orpo_distill.loading import load_config
from orpo_distill.records import Message, Trace, read_jsonl
from orpo_distill.runs import RunFolder
from orpo_distill.samplers.prompts import plain_prompt
from tests.test_forms import batch, write

PROBLEMS = 5  # to train on: p0 to p4


def replies(name: str, count: int) -> list[str]:
    return [f"text {number} of {name}" for number in range(count)]


def experiment(folder: Path, *overrides: str) -> Config:
    """The scripted teacher and student answer `text i of pN`; without their file every sample is an error."""
    rows = [{"id": f"p{i}", "question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(PROBLEMS + 1)]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    write(data, *rows[:PROBLEMS], name="train.jsonl")
    write(data, *rows[PROBLEMS:], name="test.jsonl")
    write(folder, *({"id": row["id"], "texts": replies(str(row["id"]), 8)} for row in rows), name="replies.jsonl")
    sampler = {"type": "scripted", "path": str(folder / "replies.jsonl")}
    config = {
        "name": "demo",
        "task": {"type": "jsonl", "path": str(data), "verifier": "number", "prompt": "Q: {question}"},
        "teacher": {"model": "script", "samples": 3, "sampler": sampler, "prefix": "Think first."},
        "student": {"model": "script", "samples": 2, "sampler": sampler},
        "runs": str(folder / "runs"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(path, overrides)


def stage(config: Config, name: str = "teacher") -> Path:
    return config.run_dir / name


def traces(config: Config, name: str = "teacher") -> list[Trace]:
    return list(read_jsonl(stage(config, name) / "traces.jsonl", Trace))


def imported(config: Config, name: str = "teacher") -> dict[str, dict[int, str]]:
    """Problem -> sample index -> text, of the file that `import` writes."""
    found: dict[str, dict[int, str]] = {}
    for trace in read_jsonl(stage(config, name) / PARTIAL, Trace):
        assert trace.sample_index not in found.setdefault(trace.problem_id, {})
        found[trace.problem_id][trace.sample_index] = trace.text
    return found


def test_the_next_run_samples_only_what_is_missing(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, {"id": "p1", "texts": ["mine", "mine too"]}, {"id": "p3", "text": "mine"})
    said = import_texts(config, [path], "teacher")
    assert said == f"imported 3 texts for 2 problems into {stage(config)}"
    assert ("teacher", "unfinished", "3 so far") in status(config.run_dir)
    run(config, until="teacher")
    expected = {f"p{i}": replies(f"p{i}", 3) for i in range(PROBLEMS)}
    expected["p1"][:2], expected["p3"][:1] = ["mine", "mine too"], ["mine"]
    found = traces(config)
    assert [(trace.problem_id, trace.text) for trace in found] == [(n, t) for n in expected for t in expected[n]]
    assert not (stage(config) / PARTIAL).exists()
    for trace in found:
        assert trace.id == Trace.make_id("teacher", trace.problem_id, trace.sample_index, trace.text, "stop")
    assert len({trace.prompt_id for trace in found}) == PROBLEMS


@pytest.mark.parametrize("processes", [1, 2])
def test_a_runs_own_traces_give_the_same_stage_without_sampling(tmp_path: Path, processes: int) -> None:
    """Byte for byte, in another run whose sampler knows nothing, also with several processes."""
    first = experiment(tmp_path)
    for policy in ("teacher", "student-0"):
        run(first, until=policy)
    second = experiment(tmp_path, "name=other", f"launch.sample.processes={processes}")
    for policy in ("teacher", "student-0"):
        import_texts(second, [stage(first, policy) / "traces.jsonl"], policy)
    (tmp_path / "replies.jsonl").write_text("")
    for policy in ("teacher", "student-0"):
        run(second, until=policy)
        assert (stage(second, policy) / "traces.jsonl").read_bytes() == (
            stage(first, policy) / "traces.jsonl"
        ).read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_importing_again_adds_nothing_and_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    """Files with repeated and shared texts, in any order, cut in mid-write, with a run in between: as many copies of a
    text as the file that has most of them.
    """
    coin = random.Random(seed)
    config = experiment(tmp_path)
    files, most = [], Counter[tuple[str, str]]()
    for number in range(3):
        rows = [(f"p{coin.randrange(PROBLEMS)}", coin.choice("abcdef")) for _ in range(12)]
        most |= Counter(rows)
        files.append(write(tmp_path, *({"id": name, "text": text} for name, text in rows), name=f"{number}.jsonl"))
    for path in coin.sample(files, 3):
        import_texts(config, [path], "teacher")
        if coin.random() < 0.5:
            partial = stage(config) / PARTIAL
            partial.write_bytes(partial.read_bytes()[: -coin.randrange(30)])
    import_texts(config, files, "teacher")
    found = imported(config)
    assert Counter((name, text) for name in found for text in found[name].values()) == most
    assert all(sorted(texts) == list(range(len(texts))) for texts in found.values())
    before = (stage(config) / PARTIAL).read_bytes()
    said = import_texts(config, coin.sample(files, 3), "teacher")
    assert said.startswith("imported 0 texts for 0 problems")
    assert "skipped 36: 36 there already" in said
    assert (stage(config) / PARTIAL).read_bytes() == before
    run(config, until="teacher")
    raised = experiment(tmp_path, "teacher.samples=12")
    assert import_texts(raised, files, "teacher").startswith("imported 0")


def test_what_comes_after_samples_is_kept_until_it_is_raised(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, *({"id": f"p{i}", "texts": [f"mine {i} {n}" for n in range(5)]} for i in range(PROBLEMS)))
    assert "10 of them are kept for when teacher.samples (3) is raised" in import_texts(config, [path], "teacher")
    run(config, until="teacher")
    assert len(traces(config)) == 15
    raised = experiment(tmp_path, "teacher.samples=5")
    (tmp_path / "replies.jsonl").write_text("")
    run(raised, until="teacher")
    assert [trace.text for trace in traces(raised)] == [f"mine {i} {n}" for i in range(PROBLEMS) for n in range(5)]


def test_a_stage_that_is_finished_says_so_and_grows_or_begins_anew(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    run(config, until="teacher")
    path = write(tmp_path, {"id": "p1", "texts": ["mine"]})
    with pytest.raises(RunError, match=r"finished; raise teacher\.samples .* --redo teacher"):
        import_texts(config, [path], "teacher")
    raised = experiment(tmp_path, "teacher.samples=4")
    import_texts(raised, [path], "teacher")
    run(raised, until="teacher")
    assert [trace.text for trace in traces(raised) if trace.problem_id == "p1"] == [*replies("p1", 3), "mine"]
    import_texts(raised, [path], "teacher", redo=["teacher"])
    assert imported(raised) == {"p1": {0: "mine"}}
    assert len(list(read_jsonl(config.run_dir / "superseded/1/teacher/traces.jsonl", Trace))) == 20


def test_changed_settings_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, {"id": "p1", "text": "mine"})
    import_texts(config, [path], "teacher")
    before = (config.run_dir / "config.yaml").read_bytes()
    changed = experiment(tmp_path, "teacher.prefix=Hm.")
    with pytest.raises(RunError, match=r"teacher: prefix: .*(?s:.*)--redo teacher"):
        import_texts(changed, [path], "teacher")
    with pytest.raises(RunError, match="prefix"):
        run(changed, until="teacher")
    assert (config.run_dir / "config.yaml").read_bytes() == before
    import_texts(changed, [path], "teacher", redo=["teach*"])
    assert imported(changed) == {"p1": {0: "mine"}}


def test_what_is_skipped_is_counted_with_its_reason(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(
        tmp_path,
        {"problem_id": "p0", "text": "mine", "policy": "teacher"},
        {"problem_id": "p5", "text": "of a test problem"},
        {"problem_id": "zz", "text": "of nothing"},
        {"problem_id": "p1", "text": "", "finish_reason": "error"},
        {"problem_id": "p1", "text": " \n"},
        {"problem_id": "p1", "text": "theirs", "policy": "student-0"},
    )
    said = import_texts(config, [path], "teacher")
    assert "imported 1 texts for 1 problems" in said
    assert "skipped 5: 2 of no train problem of this run (the first: 'p5' at " in said
    for reason in ("1 failed", "1 empty", "1 by another policy (the first: 'student-0' at"):
        assert reason in said


@pytest.mark.parametrize("rows", [[{"id": "zz", "text": "a"}], [{"prompt": "Why?", "completion": "a"}]])
def test_texts_of_no_problem_are_an_error(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    config = experiment(tmp_path)
    with pytest.raises(DataError, match=r"found none: 1 of no train problem .*(zz|Why)"):
        import_texts(config, [write(tmp_path, *rows)], "teacher")
    assert not stage(config).exists()


def test_malformed_rows_are_skipped_and_the_first_is_named(tmp_path: Path) -> None:
    """Of any kind, the first row of a file among them; where all are, nothing is touched."""
    config = experiment(tmp_path)
    good = write(tmp_path, {"id": "p1", "text": "mine"}, name="good.jsonl")
    bad = write(
        tmp_path, "{", {"id": "p2"}, {"id": "p2", "texts": ["one", 2]}, "[1]", {"id": "p3", "text": "x"}, name="b"
    )
    hopeless = write(tmp_path, {"id": "p2"}, {"words": "x"}, name="hopeless.jsonl")
    with pytest.raises(DataError, match=r"found none: 2 malformed \(the first: .*hopeless\.jsonl:1: expected columns"):
        import_texts(config, [hopeless], "teacher")
    assert not stage(config).exists()
    said = import_texts(config, [good, bad], "teacher")
    assert said.startswith("imported 3 texts for 3 problems")
    assert f"skipped 4: 4 malformed (the first: {bad}:1: expected a JSON object" in said
    assert imported(config) == {"p1": {0: "mine"}, "p2": {0: "one"}, "p3": {0: "x"}}


def test_samples_that_failed_are_filled(tmp_path: Path) -> None:
    """Also those of a finished stage, which then goes on; what has not failed stays."""
    config = experiment(tmp_path)
    (tmp_path / "replies.jsonl").write_text(json.dumps({"id": "p0", "texts": replies("p0", 3)}) + "\n")
    run(config, until="teacher")
    assert [trace.error != "" for trace in traces(config)] == [False] * 3 + [True] * 12
    import_texts(config, [write(tmp_path, {"id": "p1", "texts": ["a", "b"]})], "teacher")
    assert imported(config) == {"p1": {0: "a", 1: "b"}}
    run(config, until="teacher")
    assert [trace.text for trace in traces(config)[:6]] == [*replies("p0", 3), "a", "b", ""]
    assert not (stage(config) / PARTIAL).exists()


def test_a_file_that_is_not_there_leaves_everything_as_it_was(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    good = write(tmp_path, {"id": "p1", "text": "mine"}, name="good.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        import_texts(config, [good, tmp_path / "nowhere"], "teacher")
    assert not stage(config).exists()


def prompts(kind: str, number: int) -> Any:
    """A problem's prompt as users may have it."""
    question = f"What is {number} plus {number}?"
    asked = f"Think first.\n\nQ: {question}"
    return {
        "question": question,
        "prompt": f"Q: {question}\n",
        "with prefix": asked,
        "plain": plain_prompt((Message("user", asked),)),
        "messages": [{"role": "user", "content": asked}],
        "other system": [{"role": "system", "content": "Hm."}, {"role": "user", "content": f"Q: {question}"}],
    }[kind]


@pytest.mark.parametrize("kind", ["question", "prompt", "with prefix", "plain", "messages", "other system"])
def test_problems_are_found_by_their_prompts(tmp_path: Path, kind: str) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, *({"prompt": prompts(kind, i), "completion": f"mine {i}"} for i in (3, 1)))
    import_texts(config, [path], "teacher")
    assert imported(config) == {"p3": {0: "mine 3"}, "p1": {0: "mine 1"}}


def test_a_question_of_two_problems_names_neither(tmp_path: Path) -> None:
    config = experiment(tmp_path, "task.prompt='{question} {choices}'", "task.verifier=choice")
    rows = [
        {"id": f"c{number}", "question": "Which?", "choices": choices, "answer": "A"}
        for number, choices in enumerate((["oak", "plum"], ["ash", "fir"]))
    ]
    write(tmp_path / "data", *rows, name="train.jsonl")
    write(tmp_path / "data", rows[0] | {"id": "t", "question": "What?"}, name="test.jsonl")
    asked = {"prompt": "Which? (A) ash\n(B) fir", "completion": "The answer is (A)."}
    path = write(tmp_path, {"prompt": "Which?", "completion": "lost"}, asked)
    assert "skipped 1: 1 of no train problem" in import_texts(config, [path], "teacher")
    assert imported(config) == {"c1": {0: "The answer is (A)."}}


def test_pairs_give_each_side_to_its_policy_once(tmp_path: Path) -> None:
    """Also where a text stands in several pairs."""
    config = experiment(tmp_path)
    rows = [("good", "bad"), ("good", "worse"), ("better", "bad")]
    path = write(
        tmp_path,
        *({"prompt": prompts("question", 2), "chosen": chosen, "rejected": rejected} for chosen, rejected in rows),
    )
    assert "skipped 1: 1 repeated in other pairs" in import_texts(config, [path], "teacher")
    import_texts(config, [path], "student-0")
    assert imported(config) == {"p2": {0: "good", 1: "better"}}
    assert imported(config, "student-0") == {"p2": {0: "bad", 1: "worse"}}


def test_batch_answers_take_the_places_they_were_asked_for(tmp_path: Path) -> None:
    """Whatever the order of the lines; a place that is taken, or that nobody asks for, is another's."""
    config = experiment(tmp_path)
    path = write(
        tmp_path,
        batch("p1#1", ("b", "stop"), ("c", "length")),
        batch("p1#0", ("a", "stop")),
        batch("p2#1", ("e", "stop")),
        batch("p2#1", ("f", "stop")),
        batch("p2#9", ("g", "stop")),
        batch("p3#0", status=500),
    )
    said = import_texts(config, [path], "teacher")
    assert "imported 6 texts for 2 problems" in said
    assert "skipped 1: 1 failed" in said
    assert imported(config) == {"p1": {0: "a", 1: "b", 2: "c"}, "p2": {0: "f", 1: "e", 2: "g"}}


def test_a_policy_that_is_not_sampled(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "p1", "text": "mine"})
    for policy, overrides in (("student-0", ["objective=sft"]), ("student-1", []), ("problems", [])):
        with pytest.raises(ConfigError, match=f"teacher.*found '{policy}'"):
            import_texts(experiment(tmp_path, *overrides), [path], policy)


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, {"id": "p1", "text": "mine"})
    with RunFolder(config.run_dir).lock(), pytest.raises(RunError, match="in use"):
        import_texts(config, [path], "teacher")
    assert not stage(config).exists()


def test_texts_that_utf8_cannot_hold_are_the_same_text_again(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    path = write(tmp_path, json.dumps({"id": "p1", "text": "a \ud83d"}))
    import_texts(config, [path], "teacher")
    assert "1 there already" in import_texts(config, [path], "teacher")
