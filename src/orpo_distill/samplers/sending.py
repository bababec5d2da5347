"""One request of the `openai` sampler from its attempt in the ledger to its settlement there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Self

from orpo_distill.ledger import Ledger, Operation, Plan, Settlement
from orpo_distill.progress import say
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.commits import Commits
from orpo_distill.samplers.faults import Fault, NotOffered, Refused, declined, fault_of, shown
from orpo_distill.samplers.rates import Limiter, asked_pause
from orpo_distill.samplers.replies import Declined, Malformed, Reply, shares
from orpo_distill.samplers.servers import Server, Servers
from orpo_distill.samplers.tally import Tally

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from orpo_distill.samplers.openai import OpenAI

LONGEST_CONNECTING = 30.0  # seconds


class Sender:
    """Carries requests through, each in whatever way it ends: the ledger knows. `async with` opens the connections.

    `stopping` says that nothing more is to be sent. All methods run in the event loop's thread.
    """

    def __init__(self, options: OpenAI, ledger: Ledger, asking: Asking, stopping: threading.Event) -> None:
        self._options, self._asking, self._stopping = options, asking, stopping
        self._key, self._headers = options.secrets()
        self._secrets = options.secret_values
        self._singles = 0  # replies with one choice where several were asked for, in a row
        self.commit = Commits(ledger)
        self.tally = Tally()
        self.several = options.n  # whether a request may ask for several samples; None: not known yet
        self.open = 0  # attempts under way
        self.last_sent = monotonic()  # when the number of them was last 0

    async def __aenter__(self) -> Self:
        from openai import HttpxBinaryResponseContent  # a reply as it is: the client's models cost more than the rest

        options, self._raw = self._options, HttpxBinaryResponseContent
        self.limiter = Limiter(options.requests_per_minute, options.tokens_per_minute)
        self.servers = Servers([Server(url, _client(options, url, self._key, self._headers)) for url in options.urls])
        self._slots = asyncio.Semaphore(options.concurrency)  # requests in flight
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.servers.close()
        await self.commit.close()

    async def attempt(self, ask: Ask, indices: Sequence[int]) -> None:
        """One request. Raises Fault, Refused, NotOffered, Busy or BudgetReached; else something was bought.

        Where the purchase is stopped before the request leaves, nothing is sent.
        """
        most_completion = self._asking.most_completion
        expected = ask.likely_prompt + len(indices) * self.tally.mean_completion(most_completion)
        most = self._options.most(ask.most_prompt, most_completion * len(indices))
        async with self._slots, self.servers.one() as server:
            await self.limiter.leave(expected)
            attempt = await self._begin(Plan(ask.asked, tuple(indices), most, self._options.terms))
            if attempt is None:
                return
            self.last_sent = self.last_sent if self.open else monotonic()
            self.open += 1
            try:
                reply = await self._exchange(server, ask, indices, attempt)
            except Refused as error:
                if not error.everywhere and len(indices) > 1 and self.several is None:
                    raise NotOffered(str(error), paid=False) from None
                raise
            finally:
                self.open -= 1
        usage = reply.usage
        self.limiter.correct((usage.tokens if usage else expected) - expected)
        self._learn(len(indices), len(reply.choices))
        if not reply.choices:
            raise Fault("the server answered without a choice", paid=False)

    async def _begin(self, plan: Plan) -> int | None:
        """Commit an attempt; None where the purchase is stopped by then: what was not sent costs nothing."""
        options, stopping = self._options, self._stopping

        def begin(ledger: Ledger) -> int | None:
            return None if stopping.is_set() else ledger.begin(plan, options.account, options.budget.limits)

        beginning = asyncio.ensure_future(self.commit(begin))
        try:
            attempt: int | None = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await asyncio.shield(self._undo(beginning))
            raise
        if attempt is not None and stopping.is_set():
            await self._undo(beginning)
            return None
        return attempt

    async def _undo(self, beginning: asyncio.Future[int | None]) -> None:
        await asyncio.wait([beginning])
        if beginning.exception() is None and (attempt := beginning.result()) is not None:
            await self._failed(attempt, Fault("stopped before it was sent", paid=False))

    async def _exchange(self, server: Server, ask: Ask, indices: Sequence[int], attempt: int) -> Reply:
        """Send a request and record what comes back. Raises Fault or Refused."""
        content = await self._send(server, ask, indices, attempt)
        try:
            reply = self._asking.reply(content, ask, len(indices))
        except Malformed as error:
            found = shown(content.decode(errors="replace"), self._secrets)
            await self._failed(attempt, fault := Fault(f"{error}, found {found}", paid=True))
            raise fault from error
        except Declined as error:
            fault = declined(error, self._secrets)
            if error.usage is None:
                await self._failed(attempt, fault)
            else:
                await self._settle(ask, attempt, Reply((), error.usage))
            if fault.pause is None and not isinstance(fault, Refused):
                server.failed(monotonic())
            raise fault from None
        await self._settle(ask, attempt, reply)
        if reply.choices and reply.usage is None:
            self._say_doubtful(len(indices))
        return reply

    async def _settle(self, ask: Ask, attempt: int, reply: Reply) -> None:
        usage = reply.usage
        money = self._options.cost(usage) if usage else 0.0
        parts = tuple(shares(reply.choices, usage.completion if usage else None))
        ask.stands = await self.commit.settle(Settlement(attempt, reply.choices, parts, usage, money), ask.asked.key)
        self.tally.add(len(reply.choices), usage, money)
        if reply.choices:
            self.limiter.ease()

    async def _send(self, server: Server, ask: Ask, indices: Sequence[int], attempt: int) -> bytes:
        """What the server answers. Whatever becomes of the request, the ledger knows."""
        body = ask.filled(indices, self._options.seeds)
        path = self._options.path.removeprefix("/v1")  # the client's address ends with it
        sent = monotonic()
        try:
            reply = await server.client.post(path, body=body, cast_to=self._raw)
        except asyncio.CancelledError:
            await asyncio.shield(self._failed(attempt, Fault("stopped before the reply came", paid=True)))
            raise
        except Exception as error:
            fault = fault_of(error, self._secrets)
            if fault is None:
                raise
            await self._failed(attempt, fault)
            if not isinstance(fault, Refused) and fault.pause is None:
                server.failed(sent, fault.nowhere)
            raise fault from None
        server.works()
        if (pause := asked_pause(reply.response.headers)) is not None:
            self.limiter.pause(pause)
        return reply.content

    async def _failed(self, attempt: int, fault: Fault) -> None:
        fail: Operation[None] = lambda ledger: ledger.fail(attempt, str(fault), fault.paid)  # noqa: E731
        await self.commit(fail)

    def _learn(self, asked: int, came: int) -> None:
        """Find out whether the server gives several choices: it does once, or two replies in a row bring just one."""
        if self.several is None and asked > 1:
            self._singles = self._singles + 1 if came == 1 else 0
            self.several = True if came == asked else False if self._singles > 1 else None

    def _say_doubtful(self, asked: int) -> None:
        """Say once that a bill is not believed: the budget is used up faster than it need be."""
        if self.tally.doubtful > 1:
            return
        why = "is missing or cannot be right"
        if asked > 1:
            why += f" (some servers, llama.cpp among them, count one of {asked} texts alone: sampler.n: false helps)"
        say(f"  the token count of a reply {why}; such calls count as unknown, at the most that they may cost")


def _client(options: OpenAI, url: str, key: str, headers: dict[str, str]) -> AsyncOpenAI:
    """A client without retries of its own, over aiohttp: httpx's pool takes time with every connection it holds."""
    from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAioHttpClient, Timeout

    limits = type(DEFAULT_CONNECTION_LIMITS)(
        max_connections=options.concurrency, max_keepalive_connections=options.concurrency
    )
    return AsyncOpenAI(
        api_key=key or "none",
        base_url=url,
        timeout=Timeout(options.timeout, connect=min(options.timeout, LONGEST_CONNECTING)),
        max_retries=0,
        default_headers=headers,
        http_client=DefaultAioHttpClient(limits=limits, follow_redirects=False),  # headers hold keys
    )
