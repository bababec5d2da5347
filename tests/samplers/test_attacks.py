"""What somebody who tried to break paid sampling found: paid twice, overspent, or told to a stranger."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orpo_distill.cli import _with_ledger
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.ledger import Asked, Busy, Ledger, Plan, Spent, Usage
from orpo_distill.loading import load_config
from orpo_distill.records import Message
from orpo_distill.samplers import Decoding, Request
from orpo_distill.samplers.openai import Budget, OpenAI, Price
from tests.servers import faulty_server

PLAN = Plan(Asked("http://e/v1", "m", "{}"), (0,), Spent(0.5, 50, 1))
ASKED = [Request("p", index, (Message("user", "What is 1 + 4?"),), index) for index in range(3)]


def buy(**options: object) -> list[str]:
    with OpenAI(account="a", **options).open("faulty") as generate:
        return [one.text for one in generate(ASKED, Decoding(max_new_tokens=64))]


def test_spellings_of_an_address_are_one_endpoint(tmp_path: Path) -> None:
    with faulty_server() as server:
        first = buy(base_url=server.base_url, ledger=tmp_path / "ledger")
        assert (
            buy(base_url=server.base_url.replace("http", "HTTP", 1).lower() + "/", ledger=tmp_path / "ledger") == first
        )
        assert server.stats()["true"]["choices"] == 3
    assert OpenAI(base_url="https://API.example.com/V1/").known_as == "https://api.example.com/V1"


def test_a_ledger_behind_a_link_knows_who_lives(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "ledger")
    with Ledger(tmp_path / "ledger") as one, Ledger(tmp_path / "link") as other:
        one.transaction([lambda ledger: ledger.begin(PLAN, "a", {})])
        (found,) = other.transaction([lambda ledger: ledger.begin(PLAN, "a", {})])
        assert isinstance(found, Busy)


def test_a_reply_to_an_attempt_that_seemed_void_is_kept_and_booked(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        (attempt,) = ledger.transaction([lambda one: one.begin(PLAN, "a", {})])
        ledger.transaction([lambda one: one.fail(attempt, "never sent", paid=False)])
        assert ledger.spent("a") == Spent(0.0, 0, 0)
        ledger.transaction([lambda one: one.settle(attempt, ['{"text": "x"}'], [3], Usage(5, 3), 0.25)])
        assert ledger.spent("a") == Spent(0.25, 8, 1)
        assert ledger.samples(PLAN.asked.key)[0].choice == '{"text": "x"}'


def test_batches_of_a_live_process_are_left_to_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as one, Ledger(tmp_path / "ledger") as other:
        one.transaction(
            [lambda ledger: ledger.name_batch("b", "e", None), lambda ledger: ledger.begin(PLAN, "a", {}, "b")]
        )
        wanted = {PLAN.asked.key: (0, 7)}
        assert one.open_batches("e", wanted) == ({"b": None}, {})
        assert one.open_batches("e", {PLAN.asked.key: (7,)}) == ({}, {"b": None})
        assert other.open_batches("e", wanted) == ({}, {})


@contextmanager
def redirecting(to: str) -> Iterator[str]:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("Location", to + "/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with faulty_server() as stranger, redirecting(stranger.base_url) as url:
        with pytest.raises(ModelError, match="HTTP 307"):
            buy(base_url=url, ledger=tmp_path / "ledger")
        assert stranger.stats()["requests"] == 0


def test_options_that_would_undo_a_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for price in (Price(), Price(prompt=1), Price(completion=1)):
        with pytest.raises(ValueError, match=r"expected price\.prompt and price\.completion beside budget\.money"):
            OpenAI(base_url="http://e/v1", budget=Budget(money=1), price=price)
    assert OpenAI(base_url="http://e/v1", budget=Budget(money=1), price=Price(prompt=0, completion=2))
    for field in ("max_tokens", "best_of", "temperature"):
        with pytest.raises(ValueError, match=f"expected fields that the sampler does not set itself, found {field}"):
            OpenAI(base_url="http://e/v1", extra_body={field: 7}, price=Price(prompt=1))
    monkeypatch.setenv("ATTACKED", "sk-“pasted”")
    with pytest.raises(ConfigError, match="expected plain letters in the environment variable ATTACKED"):
        OpenAI(base_url="http://e/v1", api_key_env="ATTACKED").secrets()


def test_a_server_that_adds_to_the_prompt_is_booked_as_it_says(tmp_path: Path) -> None:
    from orpo_distill.samplers.replies import read_reply

    content = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 5_100, "completion_tokens": 1}}
    assert read_reply(json.dumps(content).encode(), 1, 100, 10).usage == Usage(5_100, 1)


@pytest.mark.parametrize("name", ["my #1.sqlite", "~", "null", "123", "[x]", "a: b"])
def test_any_path_names_a_ledger(name: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{name: x, task: gsm8k, teacher: {model: a}, student: {model: b}}")
    assert load_config(config, _with_ledger([], Path(name))).ledger == Path(name)
