"""The ledger: arithmetic of its accounts, samples kept once, other processes, and files that are no ledger."""

import json
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.errors import RunError
from orpo_distill.ledger import Asked, BudgetReached, Busy, Ledger, Left, Plan, Spent, Usage, reading
from orpo_distill.ledger_file import default_path
from tests.servers import ROOT

ASKED = Asked("https://api.example", "big", '{"messages": []}')
MOST = Spent(0.5, 100, 1)
TEXTS = ("zero", "one", "two", "three")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


def do(ledger: Ledger, operation: Callable[[Ledger], Any]) -> Any:
    """What one operation gives in a transaction of its own. Raises what it raises."""
    (found,) = ledger.transaction([operation])
    if isinstance(found, Exception):
        raise found
    return found


def begin(
    ledger: Ledger, *indices: int, asked: Asked = ASKED, most: Spent = MOST, account: str = "run", **budget: float
) -> int:
    return int(do(ledger, lambda one: one.begin(Plan(asked, indices, most), account, budget)))


def settle(ledger: Ledger, attempt: int, *texts: str, usage: Usage | None, money: float = 0.0) -> None:
    shares = [10] * len(texts)
    do(ledger, lambda one: one.settle(attempt, [json.dumps(text) for text in texts], shares, usage, money))


def fail(ledger: Ledger, attempt: int, paid: bool) -> None:
    do(ledger, lambda one: one.fail(attempt, "broken", paid))


def texts(ledger: Ledger, asked: Asked = ASKED) -> dict[int, str]:
    return {index: json.loads(bought.choice) for index, bought in ledger.samples(asked.key).items()}


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """What stands in the file, read by a connection of its own."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


HOLDING = """
    import sys
    from pathlib import Path
    from orpo_distill.ledger import Asked, Ledger, Plan, Spent
    ledger = Ledger(Path(sys.argv[1]))
    plan = Plan(Asked(*sys.argv[2:]), (0, 1), Spent(0.5, 100, 1))
    print(*ledger.transaction([lambda one: one.begin(plan, "run", {})]), flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun an attempt for the samples 0 and 1 and waits until its stdin is closed."""
    command = python(HOLDING, path, ASKED.endpoint, ASKED.model, ASKED.request)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout and process.stdout.readline().strip() == "1"
            yield process
        finally:
            process.kill()


def test_an_attempt_counts_at_its_maximum_until_it_is_settled(ledger: Ledger) -> None:
    assert ledger.spent("run") == Spent()
    attempt = begin(ledger, 0, 1)
    assert ledger.spent("run") == MOST
    settle(ledger, attempt, "zero", "one", usage=Usage(7, 20, 3, 4), money=0.125)
    assert ledger.spent("run") == Spent(0.125, 27, 1)
    assert texts(ledger) == {0: "zero", 1: "one"}
    bought = ledger.samples(ASKED.key)[1]
    assert (bought.prompt_tokens, bought.completion_tokens) == (7, 10)
    (row,) = rows(ledger.path, "SELECT state, prompt, cached_prompt, completion, reasoning, money, again FROM attempts")
    assert row == ("settled", 7, 3, 20, 4, 0.125, 0)
    assert rows(ledger.path, "SELECT * FROM asked") == [(ASKED.key, ASKED.endpoint, ASKED.model, ASKED.request)]


def test_accounts_are_apart_and_samples_are_not(ledger: Ledger) -> None:
    settle(ledger, begin(ledger, 0, account="one"), "zero", usage=Usage(1, 2), money=0.25)
    begin(ledger, 1, account="two")
    assert (ledger.spent("one"), ledger.spent("two"), ledger.spent("three")) == (Spent(0.25, 3, 1), MOST, Spent())
    with pytest.raises(Busy):
        begin(ledger, 0, account="two")
    other = Asked(ASKED.endpoint, "small", ASKED.request)
    assert texts(ledger, other) == {}
    begin(ledger, 0, 1, asked=other)


def test_an_attempt_that_was_not_paid_gives_everything_back(ledger: Ledger) -> None:
    fail(ledger, begin(ledger, 0), paid=False)
    assert ledger.spent("run") == Spent()
    begin(ledger, 0)
    assert rows(ledger.path, "SELECT state, again, error FROM attempts") == [("void", 0, "broken"), ("open", 0, "")]


def test_an_attempt_that_may_have_been_paid_stays_at_its_maximum_and_is_counted_again(ledger: Ledger) -> None:
    fail(ledger, begin(ledger, 0, 1, 2), paid=True)
    assert ledger.spent("run") == MOST
    second = begin(ledger, 1, 2, 3)
    settle(ledger, second, "one", usage=Usage(5, 5), money=0.25)
    assert ledger.spent("run") == Spent(0.75, 110, 2)
    assert rows(ledger.path, "SELECT state, again FROM attempts ORDER BY id") == [("unknown", 0), ("settled", 2)]


def test_a_reply_with_unbelievable_usage_keeps_its_samples_and_costs_the_maximum(ledger: Ledger) -> None:
    settle(ledger, begin(ledger, 0), "zero", usage=None)
    assert ledger.spent("run") == MOST
    assert texts(ledger) == {0: "zero"}
    assert ledger.samples(ASKED.key)[0].prompt_tokens is None
    assert rows(ledger.path, "SELECT state FROM attempts") == [("unknown",)]


def test_fewer_choices_than_asked_for_leave_the_others_to_be_bought(ledger: Ledger) -> None:
    settle(ledger, begin(ledger, 4, 2, 7), "four", "two", usage=Usage(1, 1))
    assert texts(ledger) == {4: "four", 2: "two"}
    settle(ledger, begin(ledger, 7), "seven", "too many", usage=Usage(1, 1))
    assert texts(ledger) == {4: "four", 2: "two", 7: "seven"}


def test_a_sample_that_stands_is_kept_as_it_is(ledger: Ledger) -> None:
    """The reply to an attempt that had been given up comes after all."""
    first = begin(ledger, 0)
    fail(ledger, first, paid=True)
    settle(ledger, begin(ledger, 0), "second", usage=Usage(1, 1))
    settle(ledger, first, "first", usage=Usage(1, 1))
    assert texts(ledger) == {0: "second"}
    with pytest.raises(Busy):
        begin(ledger, 0)


def test_one_session_does_not_ask_twice_at_the_same_time(ledger: Ledger) -> None:
    begin(ledger, 0, 1)
    with pytest.raises(Busy):
        begin(ledger, 1, 2)
    assert ledger.spent("run") == MOST
    begin(ledger, 2, 3)
    assert ledger.spent("run").calls == 2


@pytest.mark.parametrize(("limit", "most"), [("money", 1.0), ("tokens", 200), ("calls", 2)])
def test_no_attempt_begins_that_could_exceed_a_limit(ledger: Ledger, limit: str, most: float) -> None:
    """Two at the maximum fit exactly; the third does once the first has come to less."""
    first = begin(ledger, 0, **{limit: most})
    begin(ledger, 1, **{limit: most})
    with pytest.raises(BudgetReached) as caught:
        begin(ledger, 2, **{limit: most})
    assert (caught.value.limit, caught.value.spent, caught.value.most) == (limit, Spent(1.0, 200, 2), MOST)
    assert ledger.spent("run") == Spent(1.0, 200, 2)
    assert rows(ledger.path, "SELECT count(*) FROM attempts") == [(2,)]
    begin(ledger, 2, account="another", **{limit: most})
    fail(ledger, first, paid=False)
    begin(ledger, 3, **{limit: most})


def test_a_transaction_gives_results_and_refusals_in_order(ledger: Ledger) -> None:
    plan = Plan(ASKED, (0,), MOST)
    operation: Callable[[Ledger], int] = lambda one: one.begin(plan, "run", {"calls": 1})  # noqa: E731
    other: Callable[[Ledger], int] = lambda one: one.begin(Plan(ASKED, (1,), MOST), "run", {"calls": 1})  # noqa: E731
    first, again, over = ledger.transaction([operation, operation, other])
    assert first == 1
    assert isinstance(again, Busy) and isinstance(over, BudgetReached)
    assert ledger.spent("run") == MOST


def test_a_transaction_that_breaks_leaves_nothing_behind(ledger: Ledger) -> None:
    plan = Plan(ASKED, (0,), MOST)
    with pytest.raises(ZeroDivisionError):
        ledger.transaction([lambda one: one.begin(plan, "run", {}), lambda _: 1 / 0])
    assert ledger.spent("run") == Spent()
    begin(ledger, 0)


def test_what_another_live_process_is_buying_is_left_to_it(path: Path) -> None:
    with held(path), Ledger(path) as ledger:
        with pytest.raises(Busy):
            begin(ledger, 1, 2)
        begin(ledger, 2, 3)
        assert ledger.spent("run") == Spent(1.0, 200, 2)


def test_what_a_killed_process_was_buying_may_have_been_paid_and_is_bought_again(path: Path) -> None:
    with Ledger(path) as ledger:
        with held(path) as process:
            with pytest.raises(Busy):
                begin(ledger, 0)
            process.kill()
            process.wait()
        assert ledger.spent("run") == MOST
        settle(ledger, begin(ledger, 0, 1, 2), *TEXTS[:3], usage=Usage(1, 1), money=0.25)
        assert ledger.spent("run") == Spent(0.75, 102, 2)
        assert rows(path, "SELECT state, again FROM attempts ORDER BY id") == [("open", 0), ("settled", 2)]


def test_what_a_closed_ledger_left_open_is_bought_again_and_signs_of_life_go(path: Path) -> None:
    with Ledger(path) as first:
        begin(first, 0)
    with Ledger(path) as second:
        begin(second, 0)
        assert second.spent("run").calls == 2
        assert [file.name for file in (path.parent / "ledger.sqlite-sessions").iterdir()] == [second.session]
    assert list((path.parent / "ledger.sqlite-sessions").iterdir()) == []


BUYING = """
    import sys
    from pathlib import Path
    from orpo_distill.ledger import Asked, BudgetReached, Busy, Ledger, Plan, Spent, Usage
    budget, bought = {"calls": int(sys.argv[3])}, 0
    def buy(ledger, number):
        plan = Plan(Asked("e", "m", str(number)), (0,), Spent(1.0, 10, 1))
        (found,) = ledger.transaction([lambda one: one.begin(plan, "run", budget)])
        if isinstance(found, Exception):
            return 0
        ledger.transaction([lambda one: one.settle(found, [sys.argv[2]], [4], Usage(1, 4), 0.5)])
        return 1
    print("ready", flush=True)
    sys.stdin.read()
    for number in range(120):
        if number % 40 == 0:
            ledger = Ledger(Path(sys.argv[1]))
        bought += buy(ledger, number)
        if number % 40 == 39:
            ledger.close()
    print(bought)
"""


def test_processes_that_write_at_the_same_time_never_buy_twice_nor_over_budget(path: Path) -> None:
    """Four processes open one new file at once and ask for the same 120 samples; 100 calls are allowed."""
    commands = [python(BUYING, path, name, 100) for name in "abcd"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for command in commands
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ended
    bought = [int(out) for out, _ in ended]
    assert sum(bought) == 100
    with Ledger(path) as ledger:
        assert ledger.spent("run") == Spent(50.0, 500, 100)
    assert rows(path, "SELECT count(*), count(DISTINCT key) FROM samples") == [(100, 100)]
    assert rows(path, "SELECT sum(choice = 'a') FROM samples") == [(bought[0],)]


def test_a_newer_ledger_is_left_alone(path: Path) -> None:
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(RunError, match=r"expected a ledger of version 2 at .*, found one of version 7; use the orpo-"):
        Ledger(path)
    assert rows(path, "PRAGMA user_version") == [(7,)]


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"found another program's database; use .*--ledger PATH"):
        Ledger(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_text_file_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("Dear diary, " * 400)
    with pytest.raises(RunError, match=r"expected to keep the ledger of paid calls in .*, found: file is not a data"):
        Ledger(path)
    assert path.read_text() == "Dear diary, " * 400
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["file/ledger.sqlite", "folder", "/proc/ledger.sqlite"])
def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"expected to keep the ledger of paid calls in .*, found: .*--ledger PATH"):
        Ledger(tmp_path / place)


FILLING = """
    import resource, sys
    from pathlib import Path
    from orpo_distill.errors import RunError
    from orpo_distill.ledger import Asked, Ledger, Plan, Spent, Usage
    ledger = Ledger(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    number = 0
    try:
        for number in range(1000):
            plan = Plan(Asked("e", "m", str(number)), (0,), Spent(1.0, 10, 1))
            (attempt,) = ledger.transaction([lambda one: one.begin(plan, "run", {})])
            ledger.transaction([lambda one: one.settle(attempt, ["x" * 5000], [4], Usage(1, 4), 0.5)])
    except RunError as error:
        print(number, error)
"""


def test_a_disk_that_fills_up_is_one_message_and_what_was_bought_stands(path: Path) -> None:
    """The system refuses files of more than 2 MB to the process: what happens when a quota is used up."""
    done = subprocess.run(python(FILLING, path), capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    number, _, message = done.stdout.partition(" ")
    assert message.startswith(f"expected to keep the ledger of paid calls in {path}, found: ")
    assert message.endswith("then run the same command: what was bought is kept\n")
    with Ledger(path) as ledger:
        settled = rows(path, "SELECT count(*) FROM attempts WHERE state = 'settled'")[0][0]
        assert rows(path, "SELECT count(*) FROM samples") == [(settled,)]
        assert int(number) == settled > 10
        begin(ledger, 0)


def test_the_ledger_stands_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "orpo-distill" / "ledger.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local" / "share" / "orpo-distill" / "ledger.sqlite"


def test_a_batch_that_nobody_waits_for_is_told_from_one_that_somebody_does(path: Path) -> None:
    with Ledger(path) as first:
        do(first, lambda one: one.begin(Plan(ASKED, (0, 1), MOST), "run", {}, "batch"))
        with Ledger(path) as second, pytest.raises(Busy) as caught:
            begin(second, 1)
        assert not isinstance(caught.value, Left)
    with Ledger(path) as third, pytest.raises(Left):
        begin(third, 1)


def make_version_1(path: Path) -> None:
    """A ledger as version 1 wrote it, with one settled and one open attempt."""
    with Ledger(path) as ledger:
        settle(ledger, begin(ledger, 0), "zero", usage=Usage(7, 20), money=0.125)
        begin(ledger, 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE attempts DROP COLUMN price")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()


def test_a_ledger_of_version_1_is_read_as_it_is_and_brought_up_to_date_to_be_written(path: Path) -> None:
    make_version_1(path)
    with reading(path) as books:
        assert books.spent("run") == Spent(0.625, 127, 2)
        assert books.samples(ASKED.key)[0].completion_tokens == 10
    assert rows(path, "PRAGMA user_version") == [(1,)]
    with Ledger(path) as ledger:
        assert do(ledger, lambda one: one.begin(Plan(ASKED, (2,), MOST, "dear"), "run", {})) == 3
        settle(ledger, 2, "one", usage=Usage(1, 1), money=0.0)
        assert texts(ledger) == {0: "zero", 1: "one"}
    assert rows(path, "PRAGMA user_version") == [(2,)]
    assert rows(path, "SELECT price FROM attempts ORDER BY id") == [("",), ("",), ("dear",)]
    Ledger(path).close()


def test_who_reads_waits_for_no_writer_and_holds_up_none(path: Path) -> None:
    with Ledger(path, patience=0.1) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as writer:
        settle(ledger, begin(ledger, 0), "zero", usage=Usage(1, 2), money=0.25)
        writer.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with reading(path) as books:
            assert books.spent("run") == Spent(0.25, 3, 1)
            writer.execute("ROLLBACK")
            begin(ledger, 1)
            assert books.spent("run").calls == 2
        assert time.monotonic() - began < 2
    assert list((path.parent / "ledger.sqlite-sessions").iterdir()) == []


def test_a_lock_that_stays_is_no_reason_to_make_room(path: Path) -> None:
    with Ledger(path, patience=0.1) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="found: database is locked; another process keeps it locked") as caught:
            begin(ledger, 0)
        assert "make room" not in str(caught.value)
        writer.execute("ROLLBACK")
        begin(ledger, 0)
