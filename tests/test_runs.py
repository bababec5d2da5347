"""Stages in a run folder: skip, grow, stale, outdated, redo, keep, lock, damage."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_distill.component import Options
from orpo_distill.errors import RunError
from orpo_distill.execution import execute, refuse_stale, state
from orpo_distill.runs import SHARED, Metrics, RunFolder, Stage


class Count(Options):
    samples: int | None = 2
    letter: str = "a"


class Recorder:
    """Starts stages whose work is to append to a file, and remembers which ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        self.ran.append(stage.name)
        options = stage.options
        assert isinstance(options, Count)
        base = "".join((path / "text").read_text() for path in inputs.values())
        (out / "text").write_text(base + options.letter * (options.samples or 9))
        return {"samples": options.samples}


def stages(first: Count, second: Count) -> list[Stage]:
    grows = frozenset({"samples"})
    return [
        Stage("first", "m:f", first, outputs=("text",), grows=grows),
        Stage("deep/second", "m:f", second, {"source": "first"}, ("text",)),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def go(folder: RunFolder, plan: list[Stage], **how: list[str]) -> list[str]:
    start = Recorder()
    with folder.lock():
        refuse_stale(plan, folder, **how)
        execute(plan, folder, start, **how)
    return start.ran


def test_the_second_run_does_nothing(folder: RunFolder) -> None:
    plan = stages(Count(), Count())
    assert go(folder, plan) == ["first", "deep/second"]
    assert go(folder, plan) == []


def test_without_its_manifest_a_stage_is_unfinished(folder: RunFolder) -> None:
    plan = stages(Count(), Count())
    go(folder, plan)
    (folder.of("deep/second") / "manifest.json").unlink()
    assert go(folder, plan) == ["deep/second"]


def test_a_raised_limit_grows_the_stage_and_remakes_what_depends_on_it(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    assert go(folder, stages(Count(samples=3), Count())) == ["first", "deep/second"]
    assert (folder.of("deep/second") / "text").read_text() == "aaaaa"
    assert (folder.path / "superseded/1/deep/second/text").read_text() == "aaaa"
    assert go(folder, stages(Count(samples=None), Count())) == ["first", "deep/second"]


def test_a_lowered_limit_is_stale(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    with pytest.raises(RunError, match=r"first: samples: 2 -> 1"):
        go(folder, stages(Count(samples=1), Count()))


def test_a_changed_setting_names_the_key_and_touches_nothing(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    with pytest.raises(RunError, match=r"deep/second: letter: 'a' -> 'b'(.|\n)*--redo deep/second"):
        go(folder, stages(Count(), Count(letter="b")))
    assert (folder.of("deep/second") / "text").read_text() == "aaaa"


def test_redo_takes_dependents_along_and_loses_nothing(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    assert go(folder, stages(Count(letter="b"), Count()), redo=["first"]) == ["first", "deep/second"]
    assert (folder.of("deep/second") / "text").read_text() == "bbaa"
    assert (folder.path / "superseded/1/first/text").read_text() == "aa"


def test_redo_leaves_dependents_whose_input_comes_out_the_same(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    assert go(folder, stages(Count(), Count()), redo=["first"]) == ["first"]


def test_redo_excuses_changed_dependents_but_not_others(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    both = stages(Count(letter="b"), Count(letter="c"))
    assert go(folder, both, redo=["first"]) == ["first", "deep/second"]
    with pytest.raises(RunError, match="first: letter"):
        go(folder, stages(Count(letter="x"), Count(letter="y")), redo=["deep/second"])


def test_a_precious_stage_is_redone_only_by_its_own_name(folder: RunFolder) -> None:
    def plan(letter: str) -> list[Stage]:
        first, second = stages(Count(letter=letter), Count(letter=letter))
        return [first, replace(second, precious=True)]

    go(folder, plan("a"))
    with pytest.raises(RunError, match="deep/second: letter"):
        go(folder, plan("b"), redo=["first"])
    assert go(folder, plan("b"), redo=["first", "deep/second"]) == ["first", "deep/second"]


def test_an_unchanged_result_stops_the_wave(folder: RunFolder) -> None:
    """The stage is made again but gives the same bytes, so what depends on it stays."""
    plan = stages(Count(), Count())
    go(folder, plan)
    (folder.of("first") / "manifest.json").unlink()
    assert go(folder, plan) == ["first"]


def test_keep_accepts_the_change_and_says_so_in_the_manifest(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    changed = stages(Count(letter="b"), Count())
    assert go(folder, changed, keep=["first"]) == []
    assert go(folder, changed) == []
    manifest = folder.manifest("first")
    assert manifest is not None and manifest.asked.kept == ("letter",)


def test_keep_accepts_what_changed_but_still_grows(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    changed = stages(Count(samples=3, letter="b"), Count())
    assert go(folder, changed, keep=["first"]) == ["first", "deep/second"]
    manifest = folder.manifest("first")
    assert manifest is not None and manifest.asked.kept == ("letter",)


def test_another_work_is_one_change_and_cannot_be_kept(folder: RunFolder) -> None:
    first, second = stages(Count(), Count())
    go(folder, [first, second])
    changed = [first, replace(second, work="m:g", options=Count(letter="b"))]
    for keep in ([], ["deep/second"]):
        with pytest.raises(RunError) as caught:
            go(folder, changed, keep=keep)
        assert "deep/second: work: f -> g\nadd --redo deep/second" in str(caught.value)
        assert "--keep" not in str(caught.value)


def test_a_stage_with_another_input_cannot_be_kept(folder: RunFolder) -> None:
    """A warm-up that came: another method, which no settings can be accepted for."""
    first, second = stages(Count(), Count())
    warmup = Stage("warmup", "m:f", Count(), outputs=("text",))
    go(folder, [first, second])
    changed = [first, warmup, replace(second, inputs={**second.inputs, "start": "warmup"})]
    for keep in ([], ["deep/second"]):
        with pytest.raises(RunError) as caught:
            go(folder, changed, keep=keep)
        assert "deep/second: inputs.start: none -> warmup\nadd --redo deep/second" in str(caught.value)
        assert "--keep" not in str(caught.value)


def test_keep_does_not_excuse_a_stage_that_never_finished(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    (folder.of("first") / "manifest.json").unlink()
    with pytest.raises(RunError, match="letter: 'a' -> 'b'"):
        go(folder, stages(Count(letter="b"), Count()), keep=["first"])


def test_a_refused_run_touches_nothing(folder: RunFolder) -> None:
    go(folder, stages(Count(), Count()))
    with pytest.raises(RunError):
        go(folder, stages(Count(letter="b"), Count(letter="c")), redo=["deep/second"])
    assert not (folder.path / "superseded").exists()


def test_what_an_input_deleted_is_made_again_when_needed(folder: RunFolder) -> None:
    """A later stage is to be redone, and needs a file that the earlier one no longer has."""

    def plan(letter: str) -> list[Stage]:
        first, second = stages(Count(), Count(letter=letter))
        return [first, replace(second, consumes={"source": "spare"})]

    go(folder, plan("a"))
    (folder.of("first") / "spare").touch()
    assert go(folder, plan("b"), redo=["deep/second"]) == ["deep/second"]
    (folder.of("first") / "spare").unlink()
    assert go(folder, plan("c"), redo=["deep/second"]) == ["first", "deep/second"]


def test_a_stage_that_lacks_only_its_manifest_needs_nothing_made_again(folder: RunFolder) -> None:
    """It was killed between the last of its work, which deletes what it consumes, and its manifest."""
    first, second = stages(Count(), Count())
    plan = [first, replace(second, consumes={"source": "spare"})]
    go(folder, plan)
    (folder.of("deep/second") / "manifest.json").unlink()
    assert go(folder, plan) == ["deep/second"]
    (folder.of("deep/second") / "text").unlink()
    (folder.of("deep/second") / "manifest.json").unlink()
    assert go(folder, plan) == ["first", "deep/second"]


def test_a_redo_that_was_broken_off_goes_on_with_the_same_command(folder: RunFolder) -> None:
    plan = stages(Count(), Count())
    go(folder, plan)

    def die(stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        (out / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.lock():
        execute(plan, folder, die, redo=["first"])
    assert go(folder, plan, redo=["first"]) == ["first"]
    assert (folder.of("first") / "half").exists()
    assert [path.name for path in (folder.path / "superseded").iterdir()] == ["1"]
    assert go(folder, plan, redo=["first"]) == ["first"]
    assert (folder.path / "superseded" / "2" / "first" / "half").exists()


def test_states(folder: RunFolder) -> None:
    first, second = stages(Count(), Count())
    assert [state(stage, folder) for stage in (first, second)] == ["not started", "not started"]
    go(folder, [first, second])
    assert [state(stage, folder) for stage in (first, second)] == ["finished", "finished"]
    (folder.of("first") / "manifest.json").unlink()
    assert [state(stage, folder) for stage in (first, second)] == ["unfinished", "to be updated"]


def test_an_unknown_stage_name_lists_the_known_ones(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=r"found 'frist'; the stages are: first, deep/second"):
        go(folder, stages(Count(), Count()), redo=["frist"])


@pytest.mark.parametrize("name", ["manifest.json", "stage.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"format": 1, "nonsense": 1})])
def test_a_damaged_manifest_is_one_message_and_redo_mends_it(folder: RunFolder, name: str, content: str) -> None:
    plan = stages(Count(), Count())
    go(folder, plan)
    (folder.of("first") / name).write_text(content)
    with pytest.raises(RunError, match="expected a readable"):
        go(folder, plan)
    assert go(folder, plan, redo=["first"]) == ["first"]


def test_a_missing_output_is_one_message(folder: RunFolder) -> None:
    plan = stages(Count(), Count())
    go(folder, plan)
    (folder.of("first") / "text").unlink()
    with pytest.raises(RunError, match="--redo first"):
        go(folder, plan)


def test_a_second_process_gets_a_clear_error(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(RunError, match=r"in use by process \d+"), folder.lock():
        pass


def test_runs_beside_a_store_share_what_was_asked_for_the_same(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    assert go(one, stages(Count(), Count())) == ["first", "deep/second"]
    assert go(other, stages(Count(), Count(letter="b"))) == ["deep/second"]
    assert (one.of("first") / "text").samefile(other.of("first") / "text")
    assert (other.of("deep/second") / "text").read_text() == "aabb"
    assert go(one, stages(Count(), Count())) == go(other, stages(Count(), Count(letter="b"))) == []


def test_a_run_that_is_called_shared_is_no_store(tmp_path: Path) -> None:
    run, beside = RunFolder(tmp_path / SHARED), RunFolder(tmp_path / "beside")
    run.path.mkdir()
    assert not run.shares
    (run.path / "config.yaml").write_text("name: shared")
    assert not beside.shares


def test_another_setting_is_another_shared_folder_and_nothing_is_stale(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    run = RunFolder(tmp_path / "one")
    go(run, stages(Count(), Count()))
    assert go(run, stages(Count(letter="b"), Count())) == ["first", "deep/second"]
    assert (run.of("deep/second") / "text").read_text() == "bbaa"
    assert go(run, stages(Count(), Count())) == []  # the old one still stands
    assert (run.of("deep/second") / "text").read_text() == "aaaa"


def test_a_shared_stage_grows_for_all_and_a_lower_limit_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    for run in (one, other):
        go(run, stages(Count(), Count()))
    assert go(one, stages(Count(samples=3), Count())) == ["first", "deep/second"]
    assert go(other, stages(Count(samples=3), Count())) == []
    assert go(other, stages(Count(), Count())) == ["first"]  # what was made of it then is still there
    assert (other.of("deep/second") / "text").read_text() == "aaaa"
    assert (one.of("first") / "text").read_text() == "aaa"


def test_a_stage_that_grows_for_another_run_is_left_to_it(tmp_path: Path) -> None:
    """While one run makes more of a shared stage, a second one asks for less of it: it gets a folder of its own."""
    (tmp_path / SHARED).mkdir()
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    for run in (one, other):
        go(run, stages(Count(), Count()))
    with ThreadPoolExecutor(1) as pool:
        meanwhile: list[Future[list[str]]] = []

        def start(stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
            if stage.name == "first":
                meanwhile.append(pool.submit(go, other, stages(Count(), Count())))
                wait(meanwhile, timeout=1)
            return Recorder()(stage, inputs, out)

        execute(stages(Count(samples=3), Count()), one, start)
        assert meanwhile[0].result() == ["first"]
    assert (one.of("first") / "text").read_text() == "aaa"
    assert (other.of("first") / "text").read_text() == "aa"
    assert not (tmp_path / SHARED / "superseded").exists()


def test_what_was_deleted_is_made_beside_what_others_read(tmp_path: Path) -> None:
    """A second run reads the stage's output while its deleted checkpoint is made again for the first one."""
    (tmp_path / SHARED).mkdir()
    plan = stages(Count(), Count())
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    for run in (one, other):
        go(run, plan)
    again = [plan[0], replace(plan[1], options=Count(letter="b"), consumes={"source": "checkpoint"})]
    seen = []

    def start(stage: Stage, inputs: Mapping[str, Path], out: Path) -> Metrics:
        if stage.name == "first":
            seen.append((state(plan[1], other), (other.of("first") / "text").read_text()))
            (out / "checkpoint").write_text("c")
        return Recorder()(stage, inputs, out)

    execute(again, one, start)
    assert seen == [("finished", "aa")]
    assert (other.of("first") / "checkpoint").read_text() == "c"
    assert {path.name for path in (tmp_path / SHARED).iterdir() if path.is_dir()} == {
        Path(run.of(stage.name)).resolve().name for run, each in ((one, again), (other, plan)) for stage in each
    }


def test_what_was_asked_for_the_same_is_preferred_to_growing(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    go(one, stages(Count(), Count()))
    go(other, stages(Count(samples=3), Count()))
    assert go(one, stages(Count(samples=3), Count())) == []
    assert go(other, stages(Count(), Count())) == []


def test_a_redone_shared_stage_is_redone_for_all(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    for run in (one, other):
        go(run, stages(Count(), Count()))
    assert go(one, stages(Count(), Count()), redo=["first"]) == ["first"]  # with the same bytes
    assert go(other, stages(Count(), Count())) == []
    assert (other.of("first") / "text").read_text() == "aa"


def test_what_speaks_of_its_run_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    plan = [Stage("report", "m:f", Count(), outputs=("text",), own=True)]
    for name in ("one", "other"):
        assert go(RunFolder(tmp_path / name), plan) == ["report"]
