"""Runs that buy from a server which fails, and are killed or stopped: nothing is lost, and nothing is paid for twice
but what an attempt whose end nobody saw may have bought.
"""

import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.ledger import Ledger
from tests.samplers.paid import Books, audit, check_traces, experiment, finish, kill_at, start, traces
from tests.servers import faulty_server

FAULTY: dict[str, Any] = {"fault_rate": 0.2, "latency": 0.02, "jitter": 0.08, "hang": 3, "retry_after": 0.05}
SLOW = {"latency": 0.2, "jitter": 0.2}
PATIENT: dict[str, Any] = {"timeout": 2, "retries": 30}
WATCH = """
CREATE TABLE watched (money REAL, tokens INTEGER, calls INTEGER);
CREATE TRIGGER added AFTER INSERT ON accounts BEGIN
    INSERT INTO watched VALUES (new.money, new.tokens, new.calls); END;
CREATE TRIGGER changed AFTER UPDATE ON accounts BEGIN
    INSERT INTO watched VALUES (new.money, new.tokens, new.calls); END;
"""


def names(problems: int) -> list[str]:
    return [f"p{number}" for number in range(problems)]


@pytest.mark.parametrize(
    "problems, samples, kills, several",
    [
        (125, 8, 3, False),
        pytest.param(250, 4, 3, None, marks=pytest.mark.slow),
        pytest.param(1250, 8, 20, False, marks=pytest.mark.slow),
        pytest.param(2500, 4, 20, None, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    tmp_path: Path, problems: int, samples: int, kills: int, several: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request in five meets a fault, and the client is killed with SIGKILL: see `audit` for what must hold."""
    draw = random.Random(kills)
    least = problems * samples if several is False else problems  # requests that it takes without any fault
    moments = sorted(draw.sample(range(1, int(0.9 * least)), kills))
    with faulty_server(**(FAULTY | ({} if several is False else SLOW))) as server:
        config = experiment(tmp_path, server, problems, samples, n=several, concurrency=48, **PATIENT)
        for moment in moments:
            kill_at(start(config), server, moment, draw)
        code, words = finish(start(config))
        stats, log = server.settled(), server.log()
    assert code == 0, words
    books = audit(tmp_path, log, names(problems))
    check_traces(books, traces(tmp_path), problems, samples)
    left_open = [attempt for attempt in books.attempts if attempt.state == "open"]
    with capsys.disabled():
        print(
            f"\n{problems * samples} samples, {kills} kills: {stats['requests']} requests, {len(left_open)} left open"
        )
    assert left_open, "no kill hit a request under way"
    assert len(books.attempts) >= least + len(left_open)


@pytest.mark.parametrize("several", [False, None])
def test_two_runs_share_what_either_buys(tmp_path: Path, several: bool | None) -> None:
    """The same prompts and the same ledger at the same time: every sample is bought once, and both get its text."""
    with faulty_server(**SLOW) as server:
        configs = [
            experiment(tmp_path, server, 60, 4, name, n=several, concurrency=8 if several is None else 32)
            for name in ("forwards", "backwards")
        ]
        processes = [start(config) for config in configs]
        ended = [finish(process) for process in processes]
        stats, log = server.settled(), server.log()
    assert [code for code, _ in ended] == [0, 0], ended
    assert stats["true"]["choices"] == 240
    books = audit(tmp_path, log, names(60))
    assert not books.unknown()
    for name in ("forwards", "backwards"):
        check_traces(books, traces(tmp_path, name), 60, 4)
        assert any(attempt.account == name for attempt in books.attempts)


def test_a_run_takes_over_from_one_that_was_killed(tmp_path: Path) -> None:
    """It waits for what a live process has asked for, and asks itself once that process is dead."""
    with faulty_server(fault_rate=1, faults=["hang"], hang=300) as silent:
        first = start(experiment(tmp_path, silent, 2, 8, "one", endpoint="teacher", n=False))
        while silent.stats()["requests"] < 16:
            assert first.poll() is None
            time.sleep(0.01)
        with faulty_server() as server:
            second = start(experiment(tmp_path, server, 3, 8, "two", endpoint="teacher", n=False))
            while server.stats()["requests"] < 8:
                assert second.poll() is None
                time.sleep(0.01)
            time.sleep(1)
            assert server.stats()["requests"] == 8  # the third problem's
            first.kill()
            finish(first)
            code, words = finish(second)
            log = silent.log() + server.log()
    assert code == 0, words
    books = audit(tmp_path, log, names(3))
    check_traces(books, traces(tmp_path, "two"), 3, 8)
    assert [attempt.state for attempt in books.attempts].count("open") == 16
    assert sum(attempt.again for attempt in books.attempts) == 16


@pytest.mark.parametrize(
    "limit, cap, several",
    [
        pytest.param("calls", 100, False, marks=pytest.mark.slow),
        pytest.param("tokens", 20_000, False, marks=pytest.mark.slow),
        ("money", 0.06, None),
    ],
)
def test_a_budget_holds(tmp_path: Path, limit: str, cap: float, several: bool | None) -> None:
    """Settled and, at their maximum, unsettled attempts never come to more, with 32 requests in flight and faults.

    The run ends with one message and keeps what it bought; with a higher budget it goes on and buys only the rest.
    """
    with Ledger(tmp_path / "ledger.sqlite"), closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as file:
        file.executescript(WATCH)
    with faulty_server(**FAULTY) as server:
        config = experiment(tmp_path, server, 50, 4, n=several, concurrency=32, **PATIENT)
        code, words = finish(start(config, f"teacher.sampler.budget.{limit}={cap}"))
        server.settled()
        kept = audit(tmp_path, server.log(), names(50))
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as file:
            (highest,) = file.execute(f"SELECT max({limit}) FROM watched").fetchone()
        least = min({"calls": 1, "tokens": one.most_tokens, "money": one.most_money}[limit] for one in kept.attempts)
        assert cap - least < highest <= cap
        check_stopped(code, words, limit)
        code, words = finish(start(config, f"teacher.sampler.budget.{limit}={1000 * cap}"))
        server.settled()
        log = server.log()
    assert code == 0, words
    books = audit(tmp_path, log, names(50))
    assert kept.texts.items() < books.texts.items()
    check_traces(books, traces(tmp_path), 50, 4)


def check_stopped(code: int, words: str, limit: str) -> None:
    """One message, and the exit code for work that could not be done."""
    assert code == 1, words
    messages = [line for line in words.splitlines() if line.startswith("error: ")]
    assert len(messages) == words.count("budget of ") == 1, words
    assert f"raise sampler.budget.{limit}" in messages[0]
    assert "Traceback" not in words


def test_a_budget_that_is_too_small_asks_for_nothing(tmp_path: Path) -> None:
    with faulty_server() as server:
        config = experiment(tmp_path, server, 20, 4)
        code, words = finish(start(config, "teacher.sampler.budget.money=0.000001"))
        assert server.stats()["requests"] == 0
    check_stopped(code, words, "money")
    assert not Books(tmp_path).attempts


@pytest.mark.parametrize("faults", ["429", "500"])
def test_ctrl_c_waits_for_replies_alone(tmp_path: Path, faults: str) -> None:
    """Not for pauses that a server asks for, nor for those between tries: nothing is under way in them."""
    with faulty_server(fault_rate=1, faults=[faults], retry_after=60) as server:
        process = start(experiment(tmp_path, server, 20, 2, n=False))
        while server.stats()["requests"] < (1 if faults == "429" else 6):
            assert process.poll() is None, finish(process)
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code, words = finish(process)
        seconds = time.monotonic() - began
        server.settled()
        books = audit(tmp_path, server.log(), names(20))
    assert code == 130, words
    assert seconds < 5
    assert not [attempt for attempt in books.attempts if attempt.state in ("open", "settled")]


def test_a_second_ctrl_c_gives_up_what_is_under_way_and_says_so(tmp_path: Path) -> None:
    with faulty_server(fault_rate=1, faults=["hang"], hang=60) as server:
        process = start(experiment(tmp_path, server, 4, 2, n=False))
        while server.stats()["requests"] < 8:
            assert process.poll() is None, finish(process)
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code, words = finish(process)
        assert time.monotonic() - began < 5
    assert code == 130, words
    assert "waiting up to 15 s for 8 replies under way (another Ctrl-C gives them up)" in words
    assert "8 replies under way are given up: they may be paid for, and count as unknown" in words
    assert [attempt.state for attempt in Books(tmp_path).attempts] == ["unknown"] * 8
