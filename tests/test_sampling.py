"""Sampling only what is missing."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_distill.errors import DataError, RunError
from orpo_distill.records import FinishReason, Message, Trace, read_jsonl
from orpo_distill.samplers import Completion, Decoding, Generate, Request, Sampler
from orpo_distill.samplers.scripted import Scripted
from orpo_distill.sampling import Author, sample_traces, with_prefix

PROBLEMS = ("a", "b", "c", "d", "e")
SAMPLER = Scripted(default=("zero", "one", "two"))


def requests(samples: int, problems: Iterable[str] = PROBLEMS) -> list[Request]:
    return [Request(name, index, (Message("user", name),), seed=index) for name in problems for index in range(samples)]


def run(out: Path, asked: list[Request], sampler: Sampler = SAMPLER, shard: tuple[int, int] | None = None) -> int:
    return sample_traces(Author(sampler, "model", Decoding(), "teacher"), asked, out, shard)


def traces(out: Path, name: str = "traces.jsonl") -> list[Trace]:
    return list(read_jsonl(out / name, Trace))


class Closed(Sampler):
    """Must not be opened."""

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        raise AssertionError("opened")
        yield


class Backwards(Sampler):
    """Answers in reverse order, with the model's name and the seed, and breaks down after `limit` completions."""

    limit: int = 10**9

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        def generate(asked: Iterable[Request], _: Decoding) -> Iterator[Completion]:
            for number, request in enumerate(reversed(list(asked))):
                if number >= self.limit:
                    raise KeyboardInterrupt
                yield Completion(request, f"{model} {request.seed}", FinishReason.STOP)

        yield generate


class Lazy(Sampler):
    """Leaves the last request unanswered."""

    @contextmanager
    def open(self, model: str) -> Iterator[Generate]:
        yield lambda asked, _: (Completion(one, "x", FinishReason.STOP) for one in list(asked)[:-1])


def test_the_result_is_in_the_order_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path, requests(3), Backwards()) == 15
    found = traces(tmp_path)
    assert [(trace.problem_id, trace.sample_index) for trace in found] == [(p, i) for p in PROBLEMS for i in range(3)]
    assert [trace.text for trace in found[:3]] == ["model 0", "model 1", "model 2"]
    assert {trace.policy for trace in found} == {"teacher"}
    assert found[1].id == Trace.make_id("teacher", "a", 1, "model 1", FinishReason.STOP)
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


def test_nothing_missing_opens_no_engine(tmp_path: Path) -> None:
    run(tmp_path, requests(2))
    before = (tmp_path / "traces.jsonl").read_bytes()
    assert run(tmp_path, requests(2), Closed()) == 0
    assert (tmp_path / "traces.jsonl").read_bytes() == before


def test_more_samples_and_problems_only_add(tmp_path: Path) -> None:
    run(tmp_path, requests(2, "ab"), Scripted(default=("old",)))
    assert run(tmp_path, requests(3, "abc"), Scripted(default=("new",))) == 5
    texts = {(trace.problem_id, trace.sample_index): trace.text for trace in traces(tmp_path)}
    assert [key for key, text in texts.items() if text == "old"] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len(texts) == 9


def test_fewer_samples_lose_nothing(tmp_path: Path) -> None:
    run(tmp_path, requests(3))
    assert run(tmp_path, requests(1), Closed()) == 0
    assert len(traces(tmp_path)) == 5
    assert len(traces(tmp_path, "traces.spare.jsonl")) == 10
    assert run(tmp_path, requests(3), Closed()) == 0
    assert len(traces(tmp_path)) == 15


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.integers(0, 14), max_size=4), cut=st.integers(0, 60))
def test_a_run_killed_anywhere_ends_the_same(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], cut: int
) -> None:
    """Broken off after some completions, several times, and with `cut` bytes of the partial file's end lost."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    run(whole, requests(3), Backwards())
    for stop in stops:
        before = len(partial(broken))
        if before + stop >= 15:
            break
        with pytest.raises(KeyboardInterrupt):
            run(broken, requests(3), Backwards(limit=stop))
        assert len(partial(broken)) == before + stop
        file = broken / "traces.partial.jsonl"
        file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - cut)])
    left = 15 - len(partial(broken))
    assert run(broken, requests(3), Backwards()) == left
    assert (broken / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()


def partial(out: Path) -> list[str]:
    file = out / "traces.partial.jsonl"
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []


def test_a_crash_between_the_result_and_the_removal_of_partial_files_is_harmless(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, requests(3), Backwards(limit=14))
    left_over = (tmp_path / "traces.partial.jsonl").read_bytes()
    run(tmp_path, requests(3), Backwards())
    before = (tmp_path / "traces.jsonl").read_bytes()
    (tmp_path / "traces.partial.jsonl").write_bytes(left_over)
    assert run(tmp_path, requests(3), Closed()) == 0
    assert (tmp_path / "traces.jsonl").read_bytes() == before


def test_a_crash_between_the_spare_file_and_the_result_is_harmless(tmp_path: Path) -> None:
    run(tmp_path, requests(3))
    before = (tmp_path / "traces.jsonl").read_bytes()
    run(tmp_path, requests(1), Closed())
    (tmp_path / "traces.jsonl.tmp").mkdir()  # the result cannot be written
    with pytest.raises(IsADirectoryError):
        run(tmp_path, requests(3), Closed())
    (tmp_path / "traces.jsonl.tmp").rmdir()
    assert run(tmp_path, requests(3), Closed()) == 0
    assert (tmp_path / "traces.jsonl").read_bytes() == before


def test_shards_together_are_the_whole(tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir(), three.mkdir()
    run(one, requests(2), Backwards())
    assert [run(three, requests(2), Backwards(), shard=(index, 3)) for index in (2, 0, 1)] == [2, 4, 4]
    assert sorted(path.name for path in three.iterdir()) == [f"traces.partial-{index}.jsonl" for index in range(3)]
    assert run(three, requests(2), Closed()) == 0
    assert (three / "traces.jsonl").read_bytes() == (one / "traces.jsonl").read_bytes()
    assert [path.name for path in three.iterdir()] == ["traces.jsonl"]


def test_another_number_of_processes_goes_on_where_the_others_stopped(tmp_path: Path) -> None:
    run(tmp_path, requests(2), shard=(0, 3))
    with (tmp_path / "traces.partial-0.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')  # as if a process were writing
    assert [run(tmp_path, requests(2), shard=(index, 2)) for index in range(2)] == [4, 2]
    assert run(tmp_path, requests(2), Closed()) == 0
    assert len(traces(tmp_path)) == 10


def test_failed_samples_are_records_said_once_and_not_asked_for_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, requests(1), Scripted(replies={"a": ("fine",)}))
    assert "teacher: 4 of 5 samples failed, the first: no scripted reply" in capsys.readouterr().err
    assert [trace.finish_reason for trace in traces(tmp_path)] == [FinishReason.STOP, *[FinishReason.ERROR] * 4]
    assert run(tmp_path, requests(1), Closed()) == 0


def test_a_request_without_an_answer_is_an_error_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected 5 traces of teacher, found 4"):
        run(tmp_path, requests(1), Lazy())
    assert not (tmp_path / "traces.jsonl").exists()
    assert run(tmp_path, requests(1)) == 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "traces.partial.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(DataError, match=r"traces\.partial\.jsonl:1: expected a Trace"):
        run(tmp_path, requests(1))


def test_the_prefix_stands_before_the_last_question() -> None:
    messages = (Message("system", "s"), Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
    assert with_prefix(messages, "") == messages
    assert with_prefix(messages, "Think.") == (*messages[:3], Message("user", "Think.\n\n3"))
