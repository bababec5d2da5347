"""Which replica of a model a request goes to, and when one that fails is left in peace."""

import asyncio
from time import monotonic

import pytest
from openai import AsyncOpenAI

from orpo_distill.samplers.servers import IN_A_ROW, LONGEST_REST, Server, Servers


def server(url: str = "http://127.0.0.1:9/v1") -> Server:
    return Server(url, AsyncOpenAI(api_key="none", base_url=url))


def rest(one: Server) -> float:
    """Seconds until it is tried again."""
    return one.rests_until - monotonic()


def test_a_rest_begins_after_some_failures_in_a_row_and_doubles() -> None:
    one, sent = server(), monotonic()
    for _ in range(IN_A_ROW - 1):
        one.failed(sent)
    assert one.rests_until == 0
    for seconds in (1, 2, 4, 8, 16, 32, LONGEST_REST, LONGEST_REST):
        one.failed(max(sent, one.rests_until))
        assert seconds - 0.5 < rest(one) <= seconds


def test_one_hiccup_that_ends_many_requests_is_one_rest_of_a_second() -> None:
    one, sent = server(), monotonic()
    for _ in range(1000):
        one.failed(sent)
    assert 0.5 < rest(one) <= 1


def test_a_reply_ends_the_rest_and_the_row() -> None:
    one, sent = server(), monotonic()
    for _ in range(IN_A_ROW):
        one.failed(sent)
    one.works()
    assert one.rests_until == 0
    one.failed(sent)
    assert one.rests_until == 0


async def spread(servers: Servers, requests: int) -> dict[str, int]:
    """How many of so many requests at once each server gets."""
    found: dict[str, int] = {}

    async def ask() -> None:
        async with servers.one() as one:
            found[one.url] = found.get(one.url, 0) + 1
            await asyncio.sleep(0.05)

    await asyncio.gather(*(ask() for _ in range(requests)))
    return found


@pytest.mark.parametrize("resting, expected", [(0, [4, 4, 4]), (1, [6, 6]), (2, [12])])
def test_load_is_spread_over_those_that_work(resting: int, expected: list[int]) -> None:
    all_of_them = [server(f"http://127.0.0.1:{port}/v1") for port in (1, 2, 3)]
    for one in all_of_them[:resting]:
        one.rests_until = monotonic() + 60
    assert sorted(asyncio.run(spread(Servers(all_of_them), 12)).values()) == expected


def test_where_all_rest_a_request_waits_for_the_first() -> None:
    late, early = server("http://127.0.0.1:1/v1"), server("http://127.0.0.1:2/v1")
    late.rests_until, early.rests_until = monotonic() + 60, (due := monotonic() + 0.3)
    assert asyncio.run(spread(Servers([late, early]), 2)) == {early.url: 2}
    assert 0 <= monotonic() - due < 0.3
