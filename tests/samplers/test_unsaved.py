"""Replies that were paid for while the ledger could not be written: none is lost, and nothing more is asked for."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from orpo_distill.errors import RunError
from orpo_distill.ledger import Asked, Busy, Ledger, Plan, Settlement, Spent, Usage
from orpo_distill.samplers.commits import Commits
from orpo_distill.samplers.unsaved import take_in, waiting, write_down
from tests.samplers.paid import COMMAND, audit, check_traces, experiment, finish, start, traces
from tests.servers import ROOT, faulty_server

PLAN = Plan(Asked("e", "m", "{}"), (0, 1), Spent(0.5, 50, 1))
USAGE = Usage(5, 7)


def begun(ledger: Ledger, index: int = 0) -> int:
    (attempt,) = ledger.transaction([lambda one: one.begin(Plan(PLAN.asked, (index,), PLAN.most), "a", {})])
    assert isinstance(attempt, int)
    return attempt


def reply(attempt: int) -> Settlement:
    return Settlement(attempt, ('{"text": "é\\n"}',), (7,), USAGE, 0.25)


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger while another process writes, for as long as it likes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        yield writer


def test_a_lock_that_lasts_longer_than_patience_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def settle(ledger: Ledger, writer: sqlite3.Connection) -> None:
        commit = Commits(ledger)
        settling = asyncio.create_task(commit.settle(reply(attempt), PLAN.asked.key))
        beginning = asyncio.create_task(commit(lambda one: one.begin(PLAN, "b", {})))
        await asyncio.sleep(0.8)
        assert not settling.done() and not beginning.done()
        writer.execute("ROLLBACK")
        assert (await settling)[0].choice == '{"text": "é\\n"}'
        with pytest.raises(Busy):
            await beginning
        await commit.close()

    with Ledger(tmp_path / "ledger", patience=0.1) as ledger:
        attempt = begun(ledger)
        with locked(tmp_path / "ledger") as writer:
            asyncio.run(settle(ledger, writer))
        assert ledger.spent("a") == Spent(0.25, 12, 1)
        assert ledger.spent("b") == Spent()  # sample 0 stands by now
    said = capsys.readouterr().err
    assert said.count("database is locked") == 1
    assert "1 replies that were paid for are held, and nothing more is asked for" in said
    assert "the run goes on" in said
    assert not waiting(tmp_path / "ledger")


def test_who_is_in_a_hurry_writes_it_down_and_the_next_one_takes_it_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def settle(ledger: Ledger) -> None:
        commit = Commits(ledger)
        settling = asyncio.create_task(commit.settle(reply(attempt), PLAN.asked.key))
        await asyncio.sleep(0.3)
        commit.hurry.set()
        with pytest.raises(RunError, match="locked"):
            await settling
        await commit.close()

    with Ledger(tmp_path / "ledger", patience=0.1) as ledger:
        attempt = begun(ledger)
        with locked(tmp_path / "ledger"):
            asyncio.run(settle(ledger))
    (path,) = waiting(tmp_path / "ledger")
    assert f"they stand in {path}, and the next run takes them in\n" in capsys.readouterr().err
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger.samples(PLAN.asked.key) == {}
        assert take_in(ledger) == 1
        assert ledger.samples(PLAN.asked.key)[0].choice == '{"text": "é\\n"}'
        assert ledger.spent("a") == Spent(0.25, 12, 1)
        assert take_in(ledger) == 0 and not waiting(tmp_path / "ledger")


def test_what_was_given_up_stays_written_down_whatever_can_be_saved_later(tmp_path: Path) -> None:
    """Two replies are given up one after the other; then the lock goes, and a third is saved."""

    async def settle(ledger: Ledger, writer: sqlite3.Connection) -> None:
        commit = Commits(ledger)
        commit.hurry.set()
        for attempt in attempts[:2]:
            with pytest.raises(RunError, match="locked"):
                await commit.settle(reply(attempt), PLAN.asked.key)
        writer.execute("ROLLBACK")
        await commit.settle(reply(attempts[2]), PLAN.asked.key)
        await commit.close()

    with Ledger(tmp_path / "ledger", patience=0.1) as ledger:
        attempts = [begun(ledger, index) for index in range(3)]
        with locked(tmp_path / "ledger") as writer:
            asyncio.run(settle(ledger, writer))
        assert ledger.samples(PLAN.asked.key).keys() == {2}
        assert take_in(ledger) == 2
        assert ledger.samples(PLAN.asked.key).keys() == {0, 1, 2}


def test_what_was_written_down_for_another_file_is_nobodys_reply(tmp_path: Path) -> None:
    """The ledger was deleted, and attempt 1 of the new one is another."""
    with Ledger(tmp_path / "ledger") as ledger:
        assert write_down([reply(begun(ledger))], ledger.path, ledger.session)
    (tmp_path / "ledger").unlink()
    with Ledger(tmp_path / "ledger") as ledger:
        begun(ledger)
        take_in(ledger)
        assert ledger.samples(PLAN.asked.key) == {}
        assert ledger.spent("a") == Spent(0.5, 50, 1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        path = write_down([reply(begun(ledger))], ledger.path, ledger.session)
        assert path
        path.write_text('{"attempt": 1')
        with pytest.raises(RunError, match=rf"expected replies that a ledger could not take in {path}, found"):
            take_in(ledger)


def test_what_another_process_took_in_meanwhile_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        path = write_down([reply(begun(ledger))], ledger.path, ledger.session)
        assert path
        seen = waiting(ledger.path)
        path.unlink()
        monkeypatch.setattr("orpo_distill.samplers.unsaved.waiting", lambda ledger: seen)
        assert take_in(ledger) == 0


FULL = """
    import asyncio, resource, sys
    from pathlib import Path
    from orpo_distill.ledger import Ledger
    from orpo_distill.samplers.commits import Commits
    from tests.samplers.test_unsaved import PLAN, begun, reply
    async def main():
        with Ledger(Path(sys.argv[1])) as ledger:
            attempt, commit = begun(ledger), Commits(ledger)
            size = Path(sys.argv[1] + "-wal").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            settling = asyncio.create_task(commit.settle(reply(attempt), PLAN.asked.key))
            await asyncio.sleep(1.5)
            assert not settling.done()
            print(len(list(Path(sys.argv[1]).parent.glob("*-unsaved-*"))), flush=True)
            if sys.argv[2] == "relieved":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                await settling
            await commit.close()
    asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["relieved", "closed"])
def test_a_full_disk_is_waited_for_or_the_reply_is_written_down(tmp_path: Path, end: str) -> None:
    """Files must not grow beyond what the ledger's journal has: as on a full disk, until there is room again."""
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "ledger"), end]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert "make room" in done.stderr and "1 replies that were paid for are held" in done.stderr
    assert len(waiting(tmp_path / "ledger")) == (end == "closed")
    with Ledger(tmp_path / "ledger") as ledger:
        assert take_in(ledger) == (end == "closed")
        assert ledger.samples(PLAN.asked.key)[0].completion_tokens == 7
        assert ledger.spent("a") == Spent(0.25, 12, 1)


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_disk_fills_up_loses_no_reply_and_pays_for_none_again(tmp_path: Path, seed: int) -> None:
    names = [f"p{number}" for number in range(100)]
    with faulty_server(latency=0.1, jitter=0.2, seed=seed) as server:
        config = experiment(tmp_path, server, 100, 4, n=False, concurrency=16)
        command = [COMMAND[0], "-c", LIMITED + COMMAND[2], "run", str(config), "--until", "teacher"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        told = next((line for line in process.stderr if "make room" in line), "")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        code, words = finish(process)
        assert told and code in (1, 130), words
        assert "Traceback" not in words
        assert 16 <= server.settled()["true"]["choices"] < 400
        code, words = finish(start(config))
        assert code == 0, words
        assert server.settled()["true"]["choices"] == 400
        log = server.log()
    books = audit(tmp_path, log, names)
    check_traces(books, traces(tmp_path), 100, 4)
    assert not books.unknown()
