"""Scores from servers: what is asked, what answers are believed, and what each request leaves in the ledger."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest

from orpo_distill.errors import ModelError, RunError
from orpo_distill.ledger import Usage
from orpo_distill.samplers import Request
from orpo_distill.samplers.openai import OpenAI, Price
from orpo_distill.samplers.replies import Declined, Malformed
from orpo_distill.samplers.server_scores import ONE_TOKEN, ScoreAsking, Scored, Way, server_scores
from tests.servers import FaultyServer, faulty_server
from tests.servers.faults import FAULTS
from tests.servers.llama import MODEL, llama_server
from tests.servers.scores import logp

LETTERS = [chr(number) for number in range(32, 127)]
ROWS = [tuple(range(start, start + 2 + start % 5)) for start in range(40)]
WAYS = get_args(Way)
PRICE = Price(prompt=1.0, completion=10.0)
ways = pytest.mark.parametrize("way", WAYS)


def vocabulary(folder: Path) -> Path:
    path = folder / "vocabulary.json"
    path.write_text(json.dumps(LETTERS))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    with faulty_server(vocabulary=vocabulary(tmp_path_factory.mktemp("server"))) as running:
        yield running


def sampler(address: str, folder: Path, **options: Any) -> OpenAI:
    defaults = {"base_url": address, "ledger": folder / "ledger.sqlite", "account": "run", "patience": 20}
    return OpenAI(**(defaults | options))


def scored(
    address: str, folder: Path, way: Way, rows: Sequence[tuple[int, ...]] = ROWS, **options: Any
) -> dict[int, Scored]:
    return dict(server_scores(sampler(address, folder, **options), "faulty", way, rows))


def expected(row: tuple[int, ...]) -> list[float]:
    return [logp(row[: place + 1]) for place in range(1, len(row))]


def query(folder: Path, text: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as ledger:
        return ledger.execute(text).fetchall()


@ways
def test_every_token_but_the_first_has_its_log_probability(server: FaultyServer, tmp_path: Path, way: Way) -> None:
    found = scored(server.base_url, tmp_path, way)
    assert {number: one.logps for number, one in found.items()} == dict(enumerate(map(expected, ROWS)))
    begun = 1 if way == "prompt_logprobs" else 0  # vLLM's field says nothing of the first token, its text neither
    assert found[7].text == "".join(LETTERS[token] for token in ROWS[7][begun:])


@ways
def test_what_is_sent_are_single_plain_requests(tmp_path: Path, way: Way) -> None:
    """Whatever the sampler's own requests are like: chats, batches, seeds, another name of the length."""
    options = {"batch": True, "length_field": "max_completion_tokens", "extra_body": {"top": 1}, "api": "chat"}
    one = sampler("http://localhost/v1", tmp_path, **options)
    (ask,) = ScoreAsking(one, "m", ONE_TOKEN, way, [(5, 6, 7)]).asks([Request("0", 0, (), 3)])
    fields = {"prompt_logprobs": 0} if way == "prompt_logprobs" else {"echo": True, "logprobs": 1}
    sent = {"model": "m", "prompt": [5, 6, 7], "temperature": 1.0, "max_tokens": 1, "top": 1, **fields}
    assert ask.body == sent
    assert (ask.most_prompt, ask.likely_prompt) == (3, 3)
    with faulty_server(vocabulary=vocabulary(tmp_path)) as server:
        scored(server.base_url, tmp_path, way, ROWS[:2], **options)
        assert server.stats()["paths"] == {"/v1/completions": 2}
        assert {(line["n"], line["seed"]) for line in server.log()} == {(1, None)}


def test_each_is_an_attempt_that_is_settled_and_never_bought_again(tmp_path: Path) -> None:
    with faulty_server(vocabulary=vocabulary(tmp_path)) as server:
        first = scored(server.base_url, tmp_path, "echo", price=PRICE)
        asked = server.stats()["requests"]
        assert asked == len(ROWS)
        address = server.base_url
    assert scored(address, tmp_path, "echo") == first  # no server is needed
    assert query(tmp_path, "SELECT state, count(*) FROM attempts GROUP BY state") == [("settled", len(ROWS))]
    tokens = sum(map(len, ROWS))
    sums = "sum(prompt), sum(completion), sum(most_tokens)"
    ((prompt, completion, most),) = query(tmp_path, f"SELECT {sums} FROM attempts")
    assert (prompt, completion, most) == (tokens, len(ROWS), tokens + len(ROWS))
    ((account, money, spent, calls),) = query(tmp_path, "SELECT * FROM accounts")
    assert (account, spent, calls) == ("run", most, len(ROWS))
    assert money == pytest.approx((tokens * 1.0 + len(ROWS) * 10.0) / 1e6)


def test_equal_rows_are_bought_once_and_new_ones_are_added(tmp_path: Path) -> None:
    with faulty_server(vocabulary=vocabulary(tmp_path), latency=0.05) as server:
        twice = scored(server.base_url, tmp_path, "echo", [*ROWS[:5], *ROWS[:5]])
        assert [twice[number] for number in range(5)] == [twice[number] for number in range(5, 10)]
        assert server.stats()["requests"] == 5
        scored(server.base_url, tmp_path, "echo", ROWS[:8])
        assert server.stats()["requests"] == 8


def test_a_budget_ends_it_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    with faulty_server(vocabulary=vocabulary(tmp_path)) as server:
        with pytest.raises(RunError, match="within the budget of 15 calls"):
            scored(server.base_url, tmp_path, "echo", budget={"calls": 15})
        assert server.stats()["requests"] == 15
        assert len(scored(server.base_url, tmp_path, "echo", budget={"calls": len(ROWS)})) == len(ROWS)
        assert server.stats()["requests"] == len(ROWS)


def test_through_failures_every_score_is_right_and_stands_once(tmp_path: Path) -> None:
    """Cut connections, errors, late and spoilt replies, wrong bills: the ledger has one score a row, all paid for."""
    faults = [fault for fault in FAULTS if fault != "429"]  # its pauses take seconds
    with faulty_server(vocabulary=vocabulary(tmp_path), fault_rate=0.3, faults=faults, hang=0.1) as server:
        found = scored(server.base_url, tmp_path, "prompt_logprobs", retries=30)
        stats = server.settled()
    assert {number: one.logps for number, one in found.items()} == dict(enumerate(map(expected, ROWS)))
    assert len(stats["faults"]) > 4
    assert query(tmp_path, "SELECT count(*), count(DISTINCT key) FROM samples") == [(len(ROWS), len(ROWS))]
    attempts = query(tmp_path, "SELECT key, state, prompt, most_tokens FROM attempts")
    assert {state for _, state, _, _ in attempts} >= {"settled", "unknown"}
    assert all(prompt + 1 == most for _, state, prompt, most in attempts if state == "settled")
    paid = Counter(state != "void" for _, state, _, _ in attempts)[True]
    assert paid >= stats["served"] >= len(ROWS)  # whatever was served is on the bill


@pytest.mark.parametrize(
    ("options", "found", "state"),
    [
        ({}, r"HTTP 200 with an error: log-probabilities of 0 of the 3 tokens behind the first", "settled"),
        ({"refuse": ("echo",)}, r"every request was refused, the last with HTTP 400: Unsupported .* 'echo'", "void"),
    ],
)
def test_a_server_that_cannot_is_told_apart_by_one_request(
    tmp_path: Path, options: dict[str, Any], found: str, state: str
) -> None:
    """One that passes over what it does not know, and one that says so."""
    with faulty_server(**options) as server:
        words = rf"expected {server.base_url} to score given texts \(teacher\.scoring: echo\), found: {found}.*; take"
        with pytest.raises(ModelError, match=words):
            scored(server.base_url, tmp_path, "echo", ROWS[2:3])
        assert server.stats()["requests"] == 1
    assert query(tmp_path, "SELECT state FROM attempts") == [(state,)]


def test_a_server_that_stops_to_score_is_not_asked_for_all(tmp_path: Path) -> None:
    with faulty_server() as server:
        with pytest.raises(ModelError, match="log-probabilities of 0 of the"):
            scored(server.base_url, tmp_path, "echo", concurrency=2)
        assert server.stats()["requests"] <= 4


def test_one_row_that_is_refused_leaves_the_others(tmp_path: Path) -> None:
    with faulty_server(vocabulary=vocabulary(tmp_path), refuse_text="43, 44") as server:
        found: dict[int, Scored] = {}
        with pytest.raises(ModelError, match=r"1 of 40 requests failed, the first with HTTP 400: Inappropriate"):
            found.update(scored(server.base_url, tmp_path, "echo"))
    assert len(query(tmp_path, "SELECT key FROM samples")) == len(ROWS) - 1


def test_llama_cpps_server_cannot(tmp_path: Path) -> None:
    with llama_server(slots=1, context=64, threads=1) as address:
        for way in WAYS:
            words = rf"expected {address} to score given texts \(teacher\.scoring: {way}\)"
            with pytest.raises(ModelError, match=words):
                dict(server_scores(sampler(address, tmp_path), MODEL, way, ROWS[:1]))


# Replies


def read(way: Way, choice: dict[str, Any], **data: Any) -> Scored:
    """What is kept of a reply to a request for the tokens 5, 6, 7."""
    asking = ScoreAsking(OpenAI(base_url="http://localhost/v1"), "m", ONE_TOKEN, way, [(5, 6, 7)])
    (ask,) = asking.asks([Request("0", 0, (), 0)])
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    reply = asking.reply(json.dumps({"choices": [choice], "usage": usage} | data).encode(), ask, 1)
    assert reply.usage == Usage(3, 1)
    return Scored(**json.loads(reply.choices[0]))


def echoed(logps: Any, tokens: str = "abcd") -> dict[str, Any]:
    return {"text": tokens, "logprobs": {"tokens": list(tokens), "token_logprobs": logps}}


def prompted(*places: Any) -> dict[str, Any]:
    return {"text": "d", "prompt_logprobs": list(places)}


B, C = {"6": {"logprob": -1.5, "decoded_token": "b"}}, {"7": {"logprob": -2.5, "decoded_token": "c"}}


@pytest.mark.parametrize(
    ("way", "choice", "text"),
    [
        ("echo", echoed([None, -1.5, -2.5, -3.5]), "abc"),
        ("echo", echoed([0.0, -1.5, -2.5], "abc"), "abc"),  # the first counted as certain, nothing drawn
        ("prompt_logprobs", prompted(None, B, C), "bc"),
        ("prompt_logprobs", prompted(None, {"9": {"logprob": 0.0}} | B, C), "bc"),  # the likeliest token beside it
    ],
)
def test_forms_of_answers(way: Way, choice: dict[str, Any], text: str) -> None:
    assert read(way, choice) == Scored(text, [-1.5, -2.5])


@pytest.mark.parametrize(
    ("way", "choice"),
    [
        ("echo", {"text": "abc"}),
        ("echo", {"text": "abc", "logprobs": None}),
        ("echo", {"text": "abc", "logprobs": {"content": [{"token": "d", "logprob": -1.0}]}}),  # of a chat
        ("echo", echoed([-3.5], "d")),  # of the token that was drawn alone
        ("echo", echoed([None, None, -1.5, -2.5, -3.5], "<abcd")),  # a token that was not sent
        ("echo", echoed([None, -1.5, None, -3.5])),
        ("echo", echoed([None, "-1.5", -2.5, -3.5])),
        ("echo", echoed([None, -1.5, float("nan"), -3.5])),
        ("echo", echoed([None, -1.5, 0.7, -3.5])),  # no probability
        ("echo", echoed(None)),
        ("prompt_logprobs", {"text": "d"}),
        ("prompt_logprobs", prompted(None, B)),
        ("prompt_logprobs", prompted(None, None, C)),
        ("prompt_logprobs", prompted(None, C, B)),
        ("prompt_logprobs", prompted(None, {"6": -1.5}, C)),
    ],
)
def test_answers_without_every_log_probability_are_none(way: Way, choice: dict[str, Any]) -> None:
    with pytest.raises(Declined, match=r"log-probabilities of \d of the 2 tokens behind the first") as caught:
        read(way, choice)
    assert (caught.value.usage, caught.value.billed, caught.value.status) == (Usage(3, 1), False, 501)


def test_what_is_no_answer_at_all() -> None:
    with pytest.raises(Malformed):
        read("echo", {}, choices=None)
    with pytest.raises(Declined, match="busy"):
        read("echo", {}, choices=[], error={"message": "busy"})
    with pytest.raises(Declined) as caught:
        read("echo", {"text": "abc"}, usage=None)
    assert (caught.value.usage, caught.value.billed) == (None, True)
    for odd, said in ((math.nan, "nan"), (0.7, "0.7"), (math.inf, "inf")):
        with pytest.raises(Declined, match=f"of 1 of the 2 tokens behind the first; of one it says {said}"):
            read("echo", echoed([None, odd, -1.0, -1.0]))
    assert read("echo", echoed([None, -math.inf, -1.0, -1.0])).logps[0] == -math.inf  # the stage says what it found
