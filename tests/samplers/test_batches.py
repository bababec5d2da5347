"""The openai sampler through a batch endpoint, against a real one."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_distill.errors import ModelError, RunError
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request
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
from orpo_distill.samplers.openai import OpenAI
options = OpenAI(base_url=sys.argv[1], ledger=Path(sys.argv[2]), batch=True, batch_poll=0.2, account="a")
with options.open("faulty") as generate:
    print(len(list(generate(requests(30), DECODING))))
"""


@pytest.mark.parametrize(
    "moment", [0.0, 0.1, *(pytest.param(late, marks=pytest.mark.slow) for late in (0.05, 0.2, 0.4, 0.8, 1.6))]
)
def test_a_killed_process_finds_its_batch_again(moment: float, tmp_path: Path) -> None:
    """Killed while it submits or waits, at several moments after its first request."""
    with faulty_server(batch_delay=2.0) as server:
        command = [sys.executable, "-c", DRIVER, server.base_url, str(tmp_path / "ledger.sqlite")]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        while not server.stats()["paths"]:
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = buy(sampler(server, tmp_path, patience=3), requests(30))
        assert server.stats()["batch_served"] == 60
    assert all(one.finish_reason is FinishReason.STOP for one in found.values())
    # Unknown where it was killed right before the batch was created: nobody can tell that from right after.
    assert set(column(tmp_path, "SELECT state FROM attempts")) <= {"settled", "void", "unknown"}


@pytest.mark.slow
def test_unanswered_calls_create_no_second_batch(tmp_path: Path) -> None:
    """Calls to files and batches that are cut, refused for a while or time out, also after they were served."""
    with faulty_server(batch_delay=0.3, batch_fault_rate=0.4, hang=1, retry_after=0.1) as server:
        found = buy(sampler(server, tmp_path, timeout=0.5), requests(20))
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
        with (
            pytest.raises(RunError, match=r"expected sampler\.batch: true while batches of .* are under way"),
            sampler(server, tmp_path, batch=False, api_key_env="BATCH_TEST_KEY").open("faulty"),
        ):
            pass
        assert len(buy(sampler(server, tmp_path, api_key_env="BATCH_TEST_KEY"), requests(2))) == 4
