"""The openai sampler through a batch endpoint, against a real one."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_distill.errors import ModelError, RunError
from orpo_distill.ledger import Asked, Ledger, Plan, Spent
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.batch_server import BatchServer
from orpo_distill.samplers.openai import Budget, OpenAI, Price
from tests.servers import FaultyServer, faulty_server

DECODING = Decoding(max_new_tokens=64)


def requests(problems: int, samples: int = 2) -> list[Request]:
    """`samples` of each of so many sums."""
    asked = [(f"p{number}", (Message("user", f"What is {number} + 4?"),)) for number in range(problems)]
    return [Request(name, index, messages, index) for name, messages in asked for index in range(samples)]


def sampler(server: FaultyServer, folder: Path, **changes: object) -> OpenAI:
    options = {"batch": True, "batch_poll": 0.2, "account": "a", "price": Price(prompt=1, completion=2)}
    return OpenAI(base_url=server.base_url, ledger=folder / "ledger.sqlite", **{**options, **changes})


def buy(options: OpenAI, asked: list[Request]) -> dict[tuple[str, int], Completion]:
    with options.open("faulty") as generate:
        found = list(generate(asked, DECODING))
    assert len(found) == len(asked)
    return {(one.request.problem_id, one.request.sample_index): one for one in found}


def column(folder: Path, query: str) -> list[object]:
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        return [row[0] for row in connection.execute(query)]


def test_a_batch_costs_half_and_is_paid_once(tmp_path: Path) -> None:
    with faulty_server(batch_delay=0.5) as server:
        first = buy(sampler(server, tmp_path), requests(20))
        stats = server.stats()
        again = buy(sampler(server, tmp_path), requests(20))
        assert server.stats()["batch_served"] == stats["batch_served"] == 40
        assert buy(sampler(server, tmp_path), requests(20, 3)).keys() > first.keys()
        assert server.stats()["batch_served"] == 60
    assert {key: one.text for key, one in first.items()} == {key: one.text for key, one in again.items()}
    assert all(one.finish_reason is FinishReason.STOP for one in first.values())
    assert len({one.text for one in first.values()}) > 20
    tokens = stats["true"]
    half = (tokens["prompt_tokens"] + 2 * tokens["completion_tokens"]) / 2e6
    assert sum(column(tmp_path, "SELECT money FROM attempts WHERE id <= 40")) == pytest.approx(half)


def test_rows_that_fail_are_sent_again(tmp_path: Path) -> None:
    with faulty_server(batch_delay=0.3, batch_fail=0.3) as server:
        found = buy(sampler(server, tmp_path), requests(20))
    assert all(one.finish_reason is FinishReason.STOP for one in found.values())
    assert "void" in column(tmp_path, "SELECT state FROM attempts")


DRIVER = """
import sys
from pathlib import Path
from tests.samplers.test_batches import DECODING, requests
from orpo_distill.samplers.openai import OpenAI, Price
price = Price(prompt=1, completion=2)
options = OpenAI(base_url=sys.argv[1], ledger=Path(sys.argv[2]), batch=True, batch_poll=0.2, account="a", price=price)
with options.open("faulty") as generate:
    print(len({(one.request.problem_id, one.request.sample_index) for one in generate(requests(30), DECODING)}))
"""


def start(server: FaultyServer, folder: Path) -> subprocess.Popen[str]:
    """A process that buys `requests(30)` in batches."""
    command = [sys.executable, "-c", DRIVER, server.base_url, str(folder / "ledger.sqlite")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=pipe, stderr=pipe, text=True)


def leave_a_batch(server: FaultyServer, folder: Path) -> None:
    """A process has sent a batch, learned its name, and was killed."""
    process = start(server, folder)
    assert process.stderr
    while "requests sent" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "moment", [0.0, 0.1, *(pytest.param(late, marks=pytest.mark.slow) for late in (0.05, 0.2, 0.4, 0.8, 1.6))]
)
def test_a_killed_process_finds_its_batch_again(moment: float, tmp_path: Path) -> None:
    """Killed while it submits or waits, at several moments after its first request."""
    with faulty_server(batch_delay=2.0) as server:
        process = start(server, tmp_path)
        while not server.stats()["paths"]:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.communicate()
        found = buy(sampler(server, tmp_path, patience=3), requests(30))
        assert server.stats()["batch_served"] == 60
    assert all(one.finish_reason is FinishReason.STOP for one in found.values())
    # Unknown where it was killed right before the batch was created: nobody can tell that from right after.
    assert set(column(tmp_path, "SELECT state FROM attempts")) <= {"settled", "void", "unknown"}


@pytest.mark.slow
def test_unanswered_calls_create_no_second_batch(tmp_path: Path) -> None:
    """Calls to files and batches that are cut, refused for a while or time out, also after they were served."""
    with faulty_server(batch_delay=0.3, batch_fault_rate=0.4, hang=1, retry_after=0.1) as server:
        found = buy(sampler(server, tmp_path, timeout=0.5, patience=60), requests(20))
        assert server.stats()["batch_served"] == 40
    assert all(one.finish_reason is FinishReason.STOP for one in found.values())


def test_a_budget_sends_what_fits(tmp_path: Path) -> None:
    with faulty_server(batch_delay=0.2) as server:
        with pytest.raises(RunError, match="within the budget of 10 calls, found 10 spent or under way"):
            buy(sampler(server, tmp_path, budget=Budget(calls=10)), requests(20))
        buy(sampler(server, tmp_path), requests(20))
        assert server.stats()["batch_served"] == 40


def test_a_server_without_batches_and_a_batch_under_way_are_named(tmp_path: Path) -> None:
    with faulty_server(batch_delay=0.2, api_key="right") as server:
        with pytest.raises(ModelError, match="HTTP 401: Incorrect API key"):
            buy(sampler(server, tmp_path), requests(2))
        os.environ["BATCH_TEST_KEY"] = "right"
        with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
            connection.execute("UPDATE attempts SET state = 'open'")
        single = sampler(server, tmp_path, batch=False, api_key_env="BATCH_TEST_KEY")
        with pytest.raises(RunError, match=r"expected sampler\.batch: true while a batch of .* holds samples of"):
            buy(single, requests(2))
        assert len(buy(single, requests(2, 4)[2:4] + requests(2, 4)[6:])) == 4  # what no batch holds is nobody's matter
        assert len(buy(sampler(server, tmp_path, api_key_env="BATCH_TEST_KEY"), requests(2))) == 4


def test_a_batch_is_settled_at_the_price_at_which_it_left(tmp_path: Path) -> None:
    """Whoever takes it in, and whatever stands in that run's config by then."""
    with faulty_server(batch_delay=1.0) as server:
        leave_a_batch(server, tmp_path)
        found = buy(
            sampler(server, tmp_path, price=Price(prompt=100, completion=200, batch=1), account="b"), requests(30)
        )
        tokens = server.stats()["true"]
    assert len(found) == 60
    half = (tokens["prompt_tokens"] + 2 * tokens["completion_tokens"]) / 2e6
    assert sum(column(tmp_path, "SELECT money FROM attempts")) == pytest.approx(half)
    assert column(tmp_path, "SELECT money FROM accounts WHERE account = 'a'") == [pytest.approx(half)]


def test_batches_with_samples_of_others_are_not_waited_for(tmp_path: Path) -> None:
    """Neither one that is under way nor one that was sent and cannot be found; one that has ended is settled."""
    other = [Request(f"other{n}", 0, (Message("user", f"What is {n} * 7?"),), n) for n in range(5)]
    with faulty_server(batch_delay=3.0) as server:
        leave_a_batch(server, tmp_path)
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            lost = Plan(Asked(server.base_url, "faulty", "lost"), (0,), Spent(1.0, 10, 1))
            ledger.transaction(
                [
                    lambda one: one.name_batch("lost", server.base_url, ""),
                    lambda one: one.begin(lost, "b", {}, "lost"),
                ]
            )
        began = time.monotonic()
        single = buy(sampler(server, tmp_path, batch=False), other[:2])
        assert len(single) == 2 and time.monotonic() - began < 2
        batched = buy(sampler(server, tmp_path, patience=300), other)
        assert len(batched) == 5 and time.monotonic() - began < 20
        assert server.stats()["batch_served"] == 63
        more = [Request("more", 0, (Message("user", "What is 1 * 1?"),), 1)]
        buy(sampler(server, tmp_path), more)  # by now the first batch has ended
    assert sorted(column(tmp_path, "SELECT state FROM attempts")) == ["open"] + ["settled"] * 66


@pytest.mark.parametrize("page, hidden", [(1, 0.0), (100, 1.5)])
def test_a_batch_is_found_on_a_late_page_and_in_a_list_that_is_late(tmp_path: Path, page: int, hidden: float) -> None:
    """Its process died before it had learned the server's name for it."""
    with faulty_server(batch_delay=0.4, batch_page=page, batch_hidden=hidden) as server:
        leave_a_batch(server, tmp_path)
        with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
            connection.execute("UPDATE batches SET remote = ''")
        for number in range(3):  # newer ones before it in the list
            other = [Request("other", 0, (Message("user", f"What is {number} * 7?"),), number)]
            buy(sampler(server, tmp_path / str(number)), other) if page == 1 else None
        assert len(buy(sampler(server, tmp_path, patience=10), requests(30))) == 60
        assert server.stats()["batch_served"] == 60 + (3 if page == 1 else 0)
    assert set(column(tmp_path, "SELECT state FROM attempts")) == {"settled"}


def test_odd_rows_of_an_output_are_passed_over(tmp_path: Path) -> None:
    with faulty_server(batch_delay=0.3, batch_odd=True) as server:
        found = buy(sampler(server, tmp_path), requests(10))
        assert server.stats()["batch_served"] == 20
    assert {one.error for one in found.values()} == {""}
    assert column(tmp_path, "SELECT state FROM attempts") == ["settled"] * 20


def test_two_processes_buy_every_sample_once(tmp_path: Path) -> None:
    with faulty_server(batch_delay=1.0) as server:
        processes = [start(server, tmp_path) for _ in range(2)]
        ended = [process.communicate(timeout=120) for process in processes]
        assert [out for out, _ in ended] == ["60\n"] * 2, ended
        assert server.stats()["batch_served"] == 60
    assert column(tmp_path, "SELECT state FROM attempts") == ["settled"] * 60
    assert column(tmp_path, "SELECT sum(again) FROM attempts") == [0]


@pytest.mark.slow
def test_a_host_that_nobody_knows_is_named_soon(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"no-such-host\.invalid/v1 to take a batch, found: "):
        address = OpenAI(
            base_url="http://no-such-host.invalid/v1", ledger=tmp_path / "ledger.sqlite", batch=True, patience=300
        )
        buy(address, requests(1))
    assert time.monotonic() - began < 40
    assert set(column(tmp_path, "SELECT state FROM attempts")) == {"void"}


def test_a_connection_that_was_never_made_costs_nothing(tmp_path: Path) -> None:
    """Also when the batch was to be made: nobody has to look for it then."""
    address = OpenAI(base_url="http://127.0.0.1:9/v1", ledger=tmp_path / "ledger.sqlite", batch=True, patience=1)
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1 to take a batch, found: .*Connection refused"):
        buy(address, requests(1))
    assert set(column(tmp_path, "SELECT state FROM attempts")) == {"void"}
    server = BatchServer(address)
    with pytest.raises(ModelError):
        server._ask(lambda: server._client.batches.list(limit=1), again=False)
