"""How often requests leave, in real time: the limiter alone, and against a server that notes when each one came."""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path
from time import monotonic, time
from typing import Any

import pytest

from orpo_distill.samplers.rates import BURST, Limiter, asked_pause, span
from tests.samplers.paid import Books, audit, check_traces, experiment, finish, start, traces
from tests.servers import faulty_server

SLACK = 0.2  # seconds that a loaded machine may be late


async def departures(limiter: Limiter, tokens: Sequence[float]) -> list[float]:
    """When requests of so many tokens leave, in seconds from the first call."""
    began, found = monotonic(), []
    for one in tokens:
        await limiter.leave(one)
        found.append(monotonic() - began)
    return found


def assert_near(found: Sequence[float], due: Sequence[float]) -> None:
    """Nothing leaves before it is due, nor much later."""
    assert len(found) == len(due)
    assert all(-0.002 <= at - expected <= SLACK for at, expected in zip(found, due, strict=True)), found


def test_requests_leave_evenly_after_a_burst_of_one_second() -> None:
    found = asyncio.run(departures(Limiter(600, None), [0] * 25))
    assert_near(found, [max(0.0, (number - 10) / 10) for number in range(25)])


def test_a_request_waits_until_the_tokens_before_it_are_due() -> None:
    found = asyncio.run(departures(Limiter(None, 6000), [150, 20, 30, 10]))
    assert_near(found, [0, 0.5, 0.7, 1.0])


def test_the_slower_of_both_rates_counts() -> None:
    found = asyncio.run(departures(Limiter(300, 6000), [10] * 9))
    assert_near(found, [max(0.0, (number - 5) / 5) for number in range(9)])
    assert_near(asyncio.run(departures(Limiter(600, 600), [5] * 4)), [0, 0, 0, 0.5])


def test_no_rates_no_waiting() -> None:
    assert asyncio.run(departures(Limiter(None, None), [1e6] * 1000))[-1] < 1


def test_what_a_reply_says_moves_the_next_request() -> None:
    """Fewer tokens than expected let the one that waits leave at once; more make it wait."""

    async def corrected(tokens: float) -> float:
        limiter, began = Limiter(None, 6000), monotonic()
        await limiter.leave(230)
        waiting = asyncio.create_task(limiter.leave(1))
        await asyncio.sleep(0.1)
        limiter.correct(tokens)
        await waiting
        return monotonic() - began

    assert_near([asyncio.run(corrected(-230)), asyncio.run(corrected(40))], [0.1, 1.7])


def test_time_that_was_not_used_is_lost_but_for_a_second() -> None:
    async def idle() -> list[float]:
        limiter = Limiter(1200, None)
        await departures(limiter, [0] * 21)
        await asyncio.sleep(2)
        return await departures(limiter, [0] * 30)

    assert_near(asyncio.run(idle()), [max(0.0, (number - 20) / 20) for number in range(30)])


def test_a_pause_stops_all_and_a_shorter_one_does_not_end_it() -> None:
    async def paused() -> list[float]:
        limiter, began = Limiter(None, None), monotonic()
        limiter.pause(0.3)
        limiter.pause(0.1)
        found: list[float] = []

        async def leave() -> None:
            await limiter.leave(1)
            found.append(monotonic() - began)

        await asyncio.gather(*(leave() for _ in range(5)))
        return found

    assert_near(asyncio.run(paused()), [0.3] * 5)


def test_a_pause_that_comes_while_a_request_waits_holds_it_too() -> None:
    async def paused() -> float:
        limiter, began = Limiter(60, None), monotonic()
        await departures(limiter, [0, 0])
        waiting = asyncio.create_task(limiter.leave(0))
        await asyncio.sleep(0.1)
        limiter.pause(1.3)
        await waiting
        return monotonic() - began

    assert_near([asyncio.run(paused())], [1.4])


@pytest.mark.parametrize("seconds", [0.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_a_long_gap_after_many_pauses_shortens_with_time_alone(seconds: float) -> None:
    """Six pauses make it 0.64 s; it is half as long 20 s later, though nothing has succeeded."""

    async def paused() -> list[float]:
        limiter = Limiter(None, None)
        for _ in range(6):
            limiter.pause(0.01)
            await asyncio.sleep(0.02)
        await asyncio.sleep(seconds)
        return await departures(limiter, [0, 0, 0])

    gap = 0.64 * 0.5 ** (seconds / 20)
    assert_near(asyncio.run(paused()), [0, gap * 0.98, 2 * gap * 0.96])


def test_requests_leave_in_the_order_in_which_they_came() -> None:
    async def order() -> list[int]:
        limiter, found = Limiter(6000, None), []

        async def leave(number: int) -> None:
            await limiter.leave(0)
            found.append(number)

        await asyncio.gather(*(leave(number) for number in range(150)))
        return found

    assert asyncio.run(order()) == list(range(150))


def test_one_that_gives_up_waiting_holds_nobody_up() -> None:
    async def cancelled() -> float:
        limiter, began = Limiter(120, None), monotonic()
        await departures(limiter, [0] * 3)
        gone = asyncio.create_task(limiter.leave(0))
        waiting = asyncio.create_task(limiter.leave(0))
        await asyncio.sleep(0.1)
        gone.cancel()
        await waiting
        return monotonic() - began

    assert_near([asyncio.run(cancelled())], [0.5])


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "1", "retry-after-ms": "50"}, 0.05),
        ({"retry-after": "1", "retry-after-ms": "soon"}, 1.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "later"}, None),
        ({"retry-after": ""}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"}, 1.0),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "1s"}, None),
        ({"x-ratelimit-remaining-requests": "0"}, None),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "20ms",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            360.0,
        ),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s", "retry-after": "3"}, 3.0),
    ],
)
def test_headers_that_ask_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_pause(headers) == seconds


@pytest.mark.parametrize("ahead, seconds", [(60, 60.0), (-60, 0.0)])
def test_a_date_to_wait_for(ahead: float, seconds: float) -> None:
    found = asked_pause({"retry-after": formatdate(time() + ahead, usegmt=True)})
    assert found is not None
    assert seconds - 1.5 < found <= seconds + 0.1


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1s", 1.0),
        ("250ms", 0.25),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400.0),
        ("12", 12.0),
        (" 1s ", 1.0),
        ("", None),
        ("soon", None),
        ("1s!", None),
        ("1 s", None),
        ("-1s", None),
    ],
)
def test_spans(text: str, seconds: float | None) -> None:
    assert span(text) == seconds


def densest(times: Sequence[float], amounts: Sequence[float], window: float) -> float:
    """The largest sum of amounts in any window of so many seconds."""
    sums = [0.0]
    for amount in amounts:
        sums.append(sums[-1] + amount)
    return max(sums[bisect_left(times, begin + window)] - sums[number] for number, begin in enumerate(times))


@pytest.mark.parametrize(
    "window, seconds, limit",
    [
        pytest.param(10, 12, "requests_per_minute", marks=pytest.mark.slow),
        pytest.param(60, 75, "requests_per_minute", marks=pytest.mark.slow),
        pytest.param(60, 75, "tokens_per_minute", marks=pytest.mark.slow),
    ],
)
def test_the_rate_that_a_server_sees(
    tmp_path: Path, window: int, seconds: int, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No minute holds more than 105 % of the rate; the run, without the burst at its start, reaches 95 % of it. In a
    window of ten seconds that burst of one second's worth weighs more.
    """
    unit = {"requests_per_minute": 1.0, "tokens_per_minute": 31.0}[limit]  # a request has about so many
    rate = 1200 * unit
    settings: dict[str, Any] = {"concurrency": 64, limit: rate, "n": False}
    with faulty_server(latency=0.2, jitter=0.4) as server:
        code, words = finish(start(experiment(tmp_path, server, seconds * 20 // 4, 4, **settings)))
        log, times = server.log(), server.stats(times=True)["times"]
    assert code == 0, words
    amounts = [1.0] * len(times)
    if limit == "tokens_per_minute":
        lines = sorted(log, key=lambda line: line["request"])
        amounts = [line["prompt_tokens"] + line["completion_tokens"] for line in lines]
    most = densest(times, amounts, window) / (rate / 60 * window)
    steady = (sum(amounts) - rate / 60 * BURST) / (rate / 60 * (times[-1] - times[0]))
    with capsys.disabled():
        print(f"\n{limit}: {most:.1%} in the densest {window} s, {steady:.1%} over {times[-1] - times[0]:.0f} s")
    assert most <= (1.05 if window == 60 else 1 + BURST / window + 0.05)
    assert steady >= 0.95
    assert not Books(tmp_path).unknown()


@pytest.mark.parametrize("form", ["seconds", pytest.param("none", marks=pytest.mark.slow)])
def test_a_limit_that_only_the_server_knows_costs_no_sample(tmp_path: Path, form: str) -> None:
    """However often a request is told to wait: that is no failure of its own, and counts for no retry."""
    with faulty_server(latency=0.1, rate_limit=1200, burst=5, retry_after_form=form) as server:
        code, words = finish(start(experiment(tmp_path, server, 25, 4, n=False, concurrency=64, retries=0)))
        log, stats = server.log(), server.stats()
    assert code == 0, words
    assert stats["rate_limited"] > 50
    books = audit(tmp_path, log, [f"p{number}" for number in range(25)])
    check_traces(books, traces(tmp_path), 25, 4)
    assert {attempt.state for attempt in books.attempts} == {"settled", "void"}
