"""The `openai` sampler against real servers that refuse, fail and die. One fault at a time; `test_chaos.py` has all."""

import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.errors import ConfigError, ModelError, RunError
from orpo_distill.ledger import Ledger, Usage
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.buyer import Purchase
from orpo_distill.samplers.openai import OpenAI, Price, amount
from orpo_distill.samplers.prompts import render
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint, tiny_tokenizer
from tests.servers import FaultyServer, faulty_server
from tests.servers.answers import NASTY, messages_hash

KEY = "sk-secret-0123456789"
STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR
SHORT = Decoding(temperature=0.8, max_new_tokens=60)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def questions(count: int) -> list[str]:
    return [f"What is {number} + 4?" for number in range(count)]


def prompts(texts: Sequence[str], samples: int = 1) -> list[Request]:
    """Requests for problems p0, p1, ...; seeds all differ and are beyond 32 bits."""
    return [
        Request(f"p{place}", index, (Message("system", "Sum."), Message("user", text)), seed=(place << 40) + index + 7)
        for place, text in enumerate(texts)
        for index in range(samples)
    ]


def buy(
    server: FaultyServer | str, ledger: Path, asked: Sequence[Request], decoding: Decoding = SHORT, **options: Any
) -> list[Completion]:
    """Every completion, in the order asked for."""
    defaults: dict[str, Any] = {"base_url": server if isinstance(server, str) else server.base_url, "ledger": ledger}
    sampler = OpenAI(**(defaults | {"account": "run", "patience": 20} | options))
    with sampler.open("faulty") as generate:
        found = {(one.request.problem_id, one.request.sample_index): one for one in generate(asked, decoding)}
    assert set(found) == {(one.problem_id, one.sample_index) for one in asked}
    return [found[one.problem_id, one.sample_index] for one in asked]


def texts(completions: Sequence[Completion]) -> list[str]:
    assert {one.error for one in completions} == {""}
    return [one.text for one in completions]


def rows(ledger: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(ledger)) as connection:
        return connection.execute(query).fetchall()


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def healthy() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


# Several samples of a prompt


def test_a_server_that_gives_several_samples_is_asked_once_a_prompt(ledger: Path) -> None:
    with faulty_server() as server:
        found = buy(server, ledger, prompts(questions(6), 4))
        stats, log = server.stats(), server.log()
    assert (stats["requests"], stats["true"]["choices"]) == (6, 24)
    assert {(line["n"], line["seed"]) for line in log} == {(4, None)}
    assert len(set(texts(found))) > 18
    assert {one.finish_reason for one in found} == {STOP}
    assert sum(one.completion_tokens or 0 for one in found) == stats["true"]["completion_tokens"]
    assert {one.prompt_tokens for one in found} == {stats["true"]["prompt_tokens"] // 6}


def test_a_server_that_refuses_several_samples_is_found_out_once(ledger: Path) -> None:
    with faulty_server(max_n=1, latency=0.05) as server:
        texts(buy(server, ledger, prompts(questions(6), 4)))
        stats, log = server.stats(), server.log()
    assert [line["n"] for line in log if line["n"] > 1] == [4]
    assert (stats["requests"], stats["true"]["choices"]) == (25, 24)
    assert rows(ledger, "SELECT state, count(*) FROM attempts GROUP BY state") == [("settled", 24), ("void", 1)]


def test_a_server_that_ignores_the_number_is_found_out_by_two_replies(ledger: Path) -> None:
    with faulty_server(max_n=1, max_n_mode="ignore", latency=0.05) as server:
        texts(buy(server, ledger, prompts(questions(6), 4)))
        stats, log = server.stats(), server.log()
    assert sum(line["n"] > 1 for line in log) == 2
    assert (stats["requests"], stats["true"]["choices"]) == (24, 24)


def test_a_server_that_gives_fewer_than_asked_for_is_asked_again_and_by_all_at_once(ledger: Path) -> None:
    with faulty_server(max_n=3, max_n_mode="ignore", latency=0.2) as server:
        texts(buy(server, ledger, prompts(questions(8), 6)))
        stats = server.stats()
    assert (stats["requests"], stats["true"]["choices"]) == (16, 48)
    assert stats["most_in_flight"] >= 7


def test_a_prompt_that_is_refused_says_nothing_about_several_samples(ledger: Path) -> None:
    asked = prompts(["What is wrong with me?", *questions(6)], 4)
    with faulty_server(refuse_text="wrong", latency=0.05) as server:
        found = buy(server, ledger, asked)
        log = server.log()
    assert [one.finish_reason for one in found] == [ERROR] * 4 + [STOP] * 24
    assert sum(line["status"] == 200 for line in log) == 6


@pytest.mark.parametrize("seeds", [True, False])
def test_single_samples_have_their_own_seeds(ledger: Path, tmp_path: Path, seeds: bool) -> None:
    asked = prompts(questions(5), 3)
    with faulty_server() as server:
        first = texts(buy(server, ledger, asked, n=False, seeds=seeds))
        second = texts(buy(server, tmp_path / "another.sqlite", asked, n=False, seeds=seeds))
        log = server.log()
    assert {line["n"] for line in log} == {1}
    if seeds:
        sent = [line["seed"] for line in log[:15]]
        assert sorted(sent) == sorted(one.seed % 2**31 for one in asked)
        assert (first == second) and len(set(first)) > 12
    else:
        assert {line["seed"] for line in log} == {None}
        assert first != second


def test_several_samples_may_be_demanded(ledger: Path) -> None:
    with faulty_server(max_n=1) as server:
        found = buy(server, ledger, prompts(questions(2), 4) + prompts(["x"] * 3)[2:], n=True)
    assert [one.finish_reason for one in found] == [ERROR] * 8 + [STOP]
    assert "Invalid 'n'" in found[0].error


# What is sent


def test_completions_without_a_tokenizer(ledger: Path) -> None:
    with faulty_server() as server:
        (text,) = texts(buy(server, ledger, prompts(questions(1)), api="completions"))
        (line,) = server.log()
    assert (line["path"], line["messages"]) == ("/v1/completions", messages_hash("Sum.\n\nWhat is 0 + 4?\n"))
    assert "The answer is" in text


def test_completions_with_a_tokenizers_chat_template(ledger: Path, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "tiny", chat_template=CHAT_TEMPLATE)
    asked = prompts(questions(1))
    with faulty_server() as server:
        texts(buy(server, ledger, asked, api="completions", tokenizer=str(folder)))
        (line,) = server.log()
    rendered = render(tiny_tokenizer(chat_template=CHAT_TEMPLATE), asked[0].messages)
    assert line["messages"] == messages_hash(rendered)
    assert rendered != "Sum.\n\nWhat is 0 + 4?\n"


def test_decoding_is_sent(ledger: Path) -> None:
    with faulty_server(refuse=("max_tokens",)) as server:
        cut = Decoding(temperature=0.5, max_new_tokens=3)
        (short,) = buy(server, ledger, prompts(questions(1)), cut, length_field="max_completion_tokens")
        stop = Decoding(max_new_tokens=60, stop=(" answer",))
        (stopped,) = buy(server, ledger, prompts(questions(1)), stop, length_field="max_completion_tokens")
        log = server.log()
    assert (len(short.text.split()), short.finish_reason, short.completion_tokens) == (3, LENGTH, 3)
    assert stopped.text.endswith("The") and stopped.finish_reason is STOP
    assert [line["temperature"] for line in log] == [0.5, 0.8]


@pytest.mark.parametrize(
    ("decoding", "name"), [(Decoding(top_k=5), "top_k"), (Decoding(top_p=0.5), "top_p"), (Decoding(), "repeat")]
)
def test_fields_that_only_some_servers_know_are_sent_if_asked_for(ledger: Path, decoding: Decoding, name: str) -> None:
    more = {"extra_body": {"repeat": 2}} if name == "repeat" else {}
    with faulty_server(refuse=(name,)) as server:
        with pytest.raises(ModelError, match=f"Unsupported parameter: '{name}'"):
            buy(server, ledger, prompts(questions(1)), decoding, **more)
        texts(buy(server, ledger, prompts(questions(1)), Decoding(top_p=1.0, top_k=0)))


def test_headers_and_the_key_come_from_the_environment(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("ME", "somebody")
    with faulty_server(api_key=KEY) as server:
        texts(
            buy(
                server,
                ledger,
                prompts(questions(1)),
                api_key_env="MY_KEY",
                extra_headers={"x-client-request-id": "$ME"},
            )
        )
        assert server.log()[0]["client_request_id"] == "somebody"
        asked = prompts(["another"])
        texts(buy(server, ledger, asked, api_key_env="MY_KEY", extra_headers={"x-client-request-id": "plain"}))
        assert server.log()[1]["client_request_id"] == "plain"


def test_variables_that_are_not_set_are_named(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", " ")
    for options, where in (
        ({"api_key_env": "NO_SUCH_KEY"}, r"sampler\.api_key_env: expected the environment variable NO_SUCH_KEY"),
        ({"api_key_env": "EMPTY"}, r"sampler\.api_key_env: expected the environment variable EMPTY to be set"),
        ({"extra_headers": {"x": "$NO_SUCH"}}, r"sampler\.extra_headers\.x: .* NO_SUCH to be set, found that it is no"),
    ):
        with pytest.raises(ConfigError, match=where):
            buy("http://127.0.0.1:1/v1", ledger, prompts(["x"]), **options)
    assert not ledger.exists()


def test_options_that_cannot_be_meant_are_refused() -> None:
    for options, words in (
        ({"base_url": "api.example/v1"}, "expected http"),
        ({"base_url": ()}, "at least one address"),
        ({"base_url": "http://x", "extra_body": {"n": 2, "seed": 1}}, "does not set itself, found n, seed"),
    ):
        with pytest.raises(ValueError, match=words):
            OpenAI(**options)


# Thinking


@pytest.mark.parametrize("reasoning", ["reasoning_content", "think"])
def test_thinking_is_kept_stripped_or_left_out_without_asking_again(ledger: Path, reasoning: str) -> None:
    with faulty_server(reasoning=reasoning) as server:
        asked = prompts(questions(3), 2)
        keep = texts(buy(server, ledger, asked, Decoding()))
        strip = texts(buy(server, ledger, asked, Decoding(), thinking="strip"))
        answers = texts(buy(server, ledger, asked, Decoding(), thinking="answer_only"))
        assert server.stats()["requests"] == 3
    for one, two, three in zip(keep, strip, answers, strict=True):
        thought = one.removeprefix("<think>\n").partition("\n</think>\n\n")[0]
        assert len(thought) > 10
        assert one == f"<think>\n{thought}\n</think>\n\n{three}"
        assert two == f"{thought}\n\n{three}"
        assert "The answer is" in three


def test_prices_of_cached_prompts_and_of_thinking() -> None:
    price = Price(prompt=1, completion=10, cached_prompt=0.5, reasoning=4)
    usage = Usage(prompt=100, completion=50, cached_prompt=40, reasoning=20)
    assert price.of(usage) == pytest.approx((60 * 1 + 40 * 0.5 + 30 * 10 + 20 * 4) / 1e6)
    assert Price(prompt=1, completion=10).of(usage) == pytest.approx((100 + 500) / 1e6)
    assert price.most(100, 50) == pytest.approx((100 + 500) / 1e6)
    assert Price(cached_prompt=2, reasoning=3).most(100, 50) == pytest.approx((200 + 150) / 1e6)


def test_the_ledger_has_what_the_server_counted(ledger: Path) -> None:
    price = Price(prompt=1, completion=10, cached_prompt=0.5, reasoning=4)
    with faulty_server(prompt_cache=True, reasoning="reasoning_content") as server:
        texts(buy(server, ledger, prompts(questions(3), 3), n=False, concurrency=1, price=price))
        true = server.stats()["true"]
    sums = "sum(prompt), sum(cached_prompt), sum(completion), sum(reasoning), sum(money)"
    (found,) = rows(ledger, f"SELECT {sums} FROM attempts")
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    assert found[:4] == tuple(true[name] for name in names)
    usage = Usage(found[0], found[2], found[1], found[3])
    assert found[1] > 0 and found[4] == pytest.approx(price.of(usage))
    with Ledger(ledger) as opened:
        assert opened.spent("run").money == pytest.approx(found[4])
        assert opened.spent("run").calls == 9


# What stands is not bought again


def test_the_second_run_is_free(ledger: Path) -> None:
    with faulty_server() as server:
        first = buy(server, ledger, prompts(questions(5), 3))
        requests = server.stats()["requests"]
        assert texts(buy(server, ledger, prompts(questions(5), 3))) == texts(first)
        assert server.stats()["requests"] == requests
        address = server.base_url
    assert buy(address, ledger, prompts(questions(5), 3)) == first  # no server is needed


def test_more_samples_pay_only_the_difference(ledger: Path) -> None:
    with faulty_server() as server:
        first = texts(buy(server, ledger, prompts(questions(4), 2)))
        more = texts(buy(server, ledger, prompts(questions(6), 5)))
        fewer = texts(buy(server, ledger, prompts(questions(4), 1)))
        assert server.stats()["true"]["choices"] == 30
    assert [text for place, text in enumerate(more[:20]) if place % 5 < 2] == first
    assert fewer == first[::2]


def test_the_same_prompt_for_two_problems_is_bought_once(ledger: Path) -> None:
    with faulty_server(latency=0.1) as server:
        found = texts(buy(server, ledger, prompts(["What is 1 + 1?"] * 2, 4)))
        assert server.stats()["true"]["choices"] == 4
    assert found[:4] == found[4:]


def test_another_model_prompt_or_decoding_is_another_sample(ledger: Path) -> None:
    with faulty_server() as server:
        texts(buy(server, ledger, prompts(questions(1))))
        texts(buy(server, ledger, prompts(questions(1)), Decoding(temperature=0.7, max_new_tokens=60)))
        texts(buy(server, ledger, prompts(questions(1)), extra_body={"user": "x"}))
        texts(buy(server, ledger, prompts(questions(1)), endpoint="another"))
        assert server.stats()["requests"] == 4


# Errors that cannot heal


@pytest.mark.parametrize(
    ("server_options", "words"),
    [
        ({"api_key": "another"}, "found: HTTP 401: Incorrect API key provided."),
        ({"models": ["gpt"]}, "found: HTTP 404: The model `faulty` does not exist"),
        ({"quota": 1}, "found: HTTP 429: You exceeded your current quota."),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_what_concerns_every_request_stops_at_once(
    ledger: Path, server_options: dict[str, Any], words: str, samples: int
) -> None:
    with faulty_server(latency=0.05, **server_options) as server:
        started = time.monotonic()
        with pytest.raises(ModelError, match=r"expected http://.*/v1 to answer, ") as caught:
            buy(server, ledger, prompts(questions(60), samples), concurrency=4)
        assert time.monotonic() - started < 5
        stats = server.stats()
    assert words in str(caught.value)
    assert stats["requests"] <= 12
    assert rows(ledger, "SELECT count(*) FROM attempts WHERE state NOT IN ('void', 'settled')") == [(0,)]


def test_what_was_bought_before_the_quota_ended_is_kept(ledger: Path) -> None:
    asked = prompts(questions(12), 2)
    with faulty_server(quota=100) as server:
        with pytest.raises(ModelError, match="what was bought is kept"):
            buy(server, ledger, asked, concurrency=2, endpoint="api")
        first = server.stats()["true"]["choices"]
    assert 0 < first < 24
    with faulty_server() as server:
        texts(buy(server, ledger, asked, endpoint="api"))
        assert server.stats()["true"]["choices"] == 24 - first


def test_a_refused_prompt_is_a_failed_sample(ledger: Path) -> None:
    asked = prompts([*questions(5), "What is wrong?", *questions(11)[6:]], 2)
    with faulty_server(refuse_text="wrong") as server:
        found = buy(server, ledger, asked)
        texts(found[:10] + found[12:])
    assert {(one.text, one.finish_reason, one.error) for one in found[10:12]} == {
        ("", ERROR, "HTTP 400: Inappropriate: wrong")
    }


@pytest.mark.parametrize("count", [3, 40])
def test_when_every_prompt_is_refused_the_run_stops(ledger: Path, count: int) -> None:
    with faulty_server(refuse_text="What", latency=0.05) as server:
        with pytest.raises(ModelError, match=r"found: (every request was refused.*)?HTTP 400: Inappropriate: What"):
            buy(server, ledger, prompts(questions(count), 2), concurrency=2)
        assert server.stats()["requests"] < 20


# Errors that may heal


def test_a_dead_server_is_waited_for_and_then_named(ledger: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/v1"
    started = time.monotonic()
    with pytest.raises(ModelError, match=f"expected {address} to answer, found no success for . s, the last: Cannot"):
        buy(address, ledger, prompts(questions(3), 2), patience=1.5)
    assert 1.5 < time.monotonic() - started < 15
    with Ledger(ledger) as opened:
        assert opened.spent("run").calls == 0


def test_a_server_that_dies_and_comes_back_is_waited_for(ledger: Path) -> None:
    port, asked = free_port(), prompts(questions(100))
    options: dict[str, Any] = {"port": port, "latency": 0.1, "jitter": 0.3}  # so that some are under way at any time
    with ThreadPoolExecutor(1) as pool:
        with faulty_server(**options) as server:
            buying = pool.submit(buy, server.base_url, ledger, asked, concurrency=4)
            while server.stats()["served"] < 20:
                time.sleep(0.01)
            server.process.kill()
            server.process.wait()
        time.sleep(1.0)
        assert not buying.done()
        with faulty_server(**options) as server:
            texts(buying.result(timeout=60))
            assert 0 < server.stats()["served"] <= 81
    unsettled = rows(ledger, "SELECT count(*) FROM attempts WHERE state = 'unknown'")[0][0]
    assert 0 < unsettled <= 8  # under way, or sent on a connection that was just breaking


def test_one_of_two_replicas_is_dead_and_nobody_notices(ledger: Path, healthy: FaultyServer) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    found = buy(healthy, ledger, prompts(questions(60)), base_url=(dead, healthy.base_url), concurrency=8, retries=2)
    texts(found)
    with Ledger(ledger) as opened:
        assert opened.spent("run").calls == 60


def test_a_replica_that_comes_back_gets_work_again(ledger: Path) -> None:
    port, asked = free_port(), prompts(questions(160))
    with ThreadPoolExecutor(1) as pool, faulty_server(latency=0.2) as steady:
        addresses = (f"http://127.0.0.1:{port}/v1", steady.base_url)
        buying = pool.submit(buy, steady, ledger, asked, base_url=addresses, concurrency=8)
        while steady.stats()["served"] < 16:
            time.sleep(0.01)
        with faulty_server(port=port, latency=0.2) as late:
            texts(buying.result(timeout=60))
            shares = [one.stats()["served"] for one in (late, steady)]
    assert sum(shares) == 160
    assert shares[0] > 20


def test_load_is_spread_over_replicas(ledger: Path) -> None:
    with faulty_server(latency=0.1) as one, faulty_server(latency=0.1) as two:
        texts(buy(one, ledger, prompts(questions(40)), base_url=[one.base_url, two.base_url], concurrency=8))
        assert min(one.stats()["served"], two.stats()["served"]) >= 15


def test_a_prompt_that_breaks_the_server_does_not_keep_the_others_up(ledger: Path) -> None:
    """Only that prompt meets 500, again and again: it fails after `retries`, as long as others succeed."""
    asked = prompts([*questions(3), "What is wrong?", *questions(200)[4:]])
    with faulty_server(refuse_text="wrong", refuse_status=500, latency=0.2) as server:
        found = buy(server, ledger, asked, concurrency=8, retries=1)
    texts(found[:3] + found[4:])
    assert (found[3].finish_reason, found[3].error) == (ERROR, "HTTP 500: Inappropriate: wrong")


# Budget


def test_the_budget_stops_the_run_and_what_was_bought_is_kept(ledger: Path) -> None:
    asked = prompts(questions(10))
    with faulty_server() as server:
        with pytest.raises(RunError, match=r"within the budget of 4 calls, found 4 spent .* raise sampler\.budget\."):
            buy(server, ledger, asked, budget={"calls": 4}, concurrency=2)
        assert server.stats()["requests"] == 4
        texts(buy(server, ledger, asked, budget={"calls": 10}))
        assert server.stats()["requests"] == 10


def test_requests_in_flight_do_not_use_up_a_budget_that_is_enough(ledger: Path) -> None:
    """Each may cost 2,000 tokens and more, and costs 30: only a few may be in flight at once."""
    with faulty_server(latency=0.05) as server:
        decoding = Decoding(max_new_tokens=2000)
        texts(buy(server, ledger, prompts(questions(40)), decoding, budget={"tokens": 9000}))
        assert server.stats()["requests"] == 40


# Secrets and nasty texts


@pytest.mark.parametrize(
    "server_options",
    [
        {"api_key": "another"},
        {"models": ["gpt"]},
        {"refuse": ["model"]},
        {"fault_rate": 1, "faults": ["500"]},
        {"fault_rate": 1, "faults": ["429"], "retry_after": 0.2},
        {"fault_rate": 1, "faults": ["malformed:shape"]},
    ],
    ids=str,
)
def test_secrets_that_a_server_repeats_are_blotted_out(
    tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch, server_options: dict[str, Any]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OTHER", "other-secret-98765")
    with faulty_server(echo=True, **server_options) as server, pytest.raises(ModelError) as caught:
        options = {"api_key_env": "MY_KEY", "extra_headers": {"x-other": "$OTHER", "x-plain": "plain-4711"}}
        buy(server, ledger, prompts(questions(2)), patience=1, **options)
    said = str(caught.value) + "".join(error for (error,) in rows(ledger, "SELECT error FROM attempts"))
    assert "You sent" in said and "[key]" in said
    kept = said.encode() + b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (KEY, "other-secret-98765"):
        assert secret[:12].encode() not in kept


def test_nasty_texts_come_as_they_are(ledger: Path) -> None:
    with faulty_server(nasty=True, refuse_text="wrong") as server:
        found = buy(server, ledger, prompts([*questions(3), "What is wrong?"], 2))
    assert all(one.text.startswith(NASTY) for one in found[:6])
    assert found[6].error.startswith("HTTP 400: Inappropriate: wrong\x1b[31m")
    again = buy("http://127.0.0.1:1/v1", ledger, prompts(questions(3), 2), endpoint=server.base_url)
    assert texts(again) == texts(found[:6])


def test_prompts_that_break_the_server_are_given_up_in_the_end(ledger: Path) -> None:
    """The server answers, and all others have their texts: after `patience` only these fail."""
    with faulty_server(refuse_text="What is 2", refuse_status=500) as server:
        found = buy(server, ledger, prompts(questions(4)), retries=1, patience=1)
    reasons = [one.finish_reason for one in found]
    assert reasons.count(FinishReason.ERROR) == 1 and reasons.count(FinishReason.STOP) == 3


# Errors in replies of status 200


@pytest.mark.parametrize("fault", ["declined", "declined:status"])
def test_an_error_in_a_good_reply_costs_nothing_and_is_tried_again(ledger: Path, fault: str) -> None:
    with faulty_server(fault_rate=0.4, faults=[fault]) as server:
        texts(buy(server, ledger, prompts(questions(30)), retries=30))
        stats = server.stats()
    assert stats["true"]["choices"] == 30 and stats["faults"][fault] > 5
    assert rows(ledger, "SELECT state, count(*), sum(again) FROM attempts GROUP BY state") == [
        ("settled", 30, 0),
        ("void", stats["faults"][fault], 0),
    ]
    assert rows(ledger, "SELECT DISTINCT error FROM attempts WHERE state = 'void'") == [
        ("HTTP 200 with an error: Provider returned an error",)
    ]


def test_a_server_that_answers_nothing_but_such_errors_is_named(ledger: Path) -> None:
    words = r"no success for . s, the last: HTTP 200 with an error: Provider returned"
    with faulty_server(fault_rate=1, faults=["declined"]) as server, pytest.raises(ModelError, match=words):
        buy(server, ledger, prompts(questions(3)), patience=1)
    with Ledger(ledger) as opened:
        assert opened.spent("run").calls == 0


# What is said


@pytest.mark.slow
def test_a_host_that_nobody_knows_is_named_soon(ledger: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"expected http://no-such-host\.invalid/v1 to answer, found: .*no-such-host"):
        buy("http://no-such-host.invalid/v1", ledger, prompts(questions(3)), patience=300)
    assert 10 < time.monotonic() - started < 25


def test_an_address_without_v1_is_hinted_at(ledger: Path) -> None:
    with faulty_server() as server:
        address = server.base_url.removesuffix("/v1")
        with pytest.raises(ModelError, match=rf"HTTP 404: .* \(does {address} lack /v1 at its end\?\); mend"):
            buy(address, ledger, prompts(questions(3)))
        with pytest.raises(ModelError) as caught:
            buy(server.base_url + "/chat", ledger, prompts(questions(3)))
        assert "HTTP 404" in str(caught.value) and "lack" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_spoken_of_before_patience_ends(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ModelError):
        buy(address, ledger, prompts(questions(3), 2), patience=14)
    said = [line for line in capsys.readouterr().err.splitlines() if "no success" in line]
    assert len(said) == 1 and f"  no success with {address} for 1" in said[0] and "Cannot connect" in said[0]


@pytest.mark.parametrize("several", [True, False])
def test_bills_that_are_not_believed_are_spoken_of_once(
    ledger: Path, capsys: pytest.CaptureFixture[str], several: bool
) -> None:
    with faulty_server(fault_rate=1, faults=["wrong_usage:missing"]) as server:
        texts(buy(server, ledger, prompts(questions(5), 3), n=several))
    said = capsys.readouterr().err
    assert said.count("the token count of a reply is missing or cannot be right") == 1
    assert ("sampler.n: false helps" in said) == several


@pytest.mark.parametrize(
    "number, words",
    [(1e-06, "0.000001"), (0.06, "0.06"), (20.0, "20"), (1234567, "1,234,567"), (1234567.0, "1234570"), (0.0, "0")],
)
def test_amounts_are_written_without_powers_of_ten(number: float, words: str) -> None:
    assert amount(number) == words


def test_a_budget_that_ends_says_how_many_samples_are_missing(ledger: Path) -> None:
    with faulty_server() as server:
        with pytest.raises(RunError, match=r"expected the 6 missing samples within the budget of 4 calls, found 4"):
            buy(server, ledger, prompts(questions(10)), budget={"calls": 4}, concurrency=2)
        price = Price(prompt=1, completion=1)
        with pytest.raises(RunError, match=r"within the budget of 0\.000001 money, found 0 spent or under way and up"):
            buy(server, ledger, prompts(["x"]), price=price, budget={"money": 1e-6}, account="b")


# Stopped


def test_a_stop_while_an_attempt_is_being_recorded_sends_nothing_and_leaves_nothing_open(ledger: Path) -> None:
    """The first request leaves at once, the second 2 seconds later: then another process holds the ledger's lock."""
    with faulty_server() as server, ThreadPoolExecutor(1) as pool:
        sampler = OpenAI(base_url=server.base_url, ledger=ledger, account="run", requests_per_minute=30, n=False)
        with sampler.open("faulty") as generate, closing(sqlite3.connect(ledger, isolation_level=None)) as writer:
            buying = pool.submit(lambda: list(generate(prompts(questions(8)), SHORT)))
            time.sleep(1)
            writer.execute("BEGIN IMMEDIATE")
            time.sleep(1.7)
            assert isinstance(generate, Purchase) and generate._buyer
            generate._buyer.stop()
            time.sleep(0.5)
            writer.execute("ROLLBACK")
            assert len(buying.result(timeout=30)) == 1
        assert server.stats()["requests"] == 1
    assert rows(ledger, "SELECT state FROM attempts WHERE state != 'void'") == [("settled",)]
