"""The `openai` sampler's engine: asks servers, retries, and keeps every attempt and sample in the ledger.

An event loop in a thread of its own carries the requests; a second thread writes the ledger, all that has gathered in
one transaction. Texts are always read back from the ledger, so that what a run holds and what was bought agree.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ModelError, OrpoDistillError, RunError
from orpo_distill.ledger import Bought, BudgetReached, Busy, Ledger, Operation, Plan
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.commits import Commits
from orpo_distill.samplers.faults import Fault, NotOffered, Refused, fault_of, shown
from orpo_distill.samplers.rates import Limiter, asked_pause
from orpo_distill.samplers.replies import Malformed, Reply, read_bought, read_reply, shares
from orpo_distill.samplers.servers import Server, Servers
from orpo_distill.samplers.tally import Tally

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from orpo_distill.samplers.openai import OpenAI

GRACE = 15.0  # seconds that requests in flight get to come back when the sampler is stopped
SELDOM = 100_000, 50, 50  # new objects before garbage is looked for, see `gc.set_threshold`
LOOK = 0.2  # seconds between looks at whether to stop
WAIT_FOR_OTHERS = 0.5  # seconds between looks at what another process is buying
LONGEST_BACKOFF = 60.0  # seconds
REFUSED_AT_FIRST = 8  # requests refused before one has succeeded: then it is not the requests' fault


class Purchase:
    """A `Generate` that buys from a server. `note` says what it has come to."""

    def __init__(self, options: OpenAI, model: str, ledger: Ledger) -> None:
        self._options, self._model, self._ledger = options, model, ledger
        self._buyer: Buyer | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Completions as they are there: first what the ledger holds. Raises OrpoDistillError when it has to stop."""
        found: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        self._buyer = Buyer(self._options, self._model, self._ledger, decoding, found)
        self._thread = threading.Thread(target=_run, args=(self._buyer, requests, found), name="openai")
        self._thread.start()
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def note(self) -> str:
        """Tokens, money and rate so far, in a few words."""
        return self._buyer.note() if self._buyer else ""

    def stop(self) -> None:
        """Ask for nothing more and wait a little for what is under way: it may have been paid for."""
        if self._buyer is not None and self._thread is not None:
            self._buyer.stop()
            self._thread.join()


def _run(buyer: Buyer, requests: Iterable[Request], found: queue.SimpleQueue[Any]) -> None:
    import uvloop

    try:
        with _rarely_collected(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(buyer.buy(requests))
    except BaseException as error:  # goes to the thread that waits
        found.put(error)
    else:
        found.put(None)


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Inside, cycles of garbage are looked for less often: with many requests in flight that is a fifth of the work."""
    usual = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class Buyer:
    """Fulfils requests. All methods but `stop` and `note` run in the event loop's thread."""

    def __init__(
        self, options: OpenAI, model: str, ledger: Ledger, decoding: Decoding, found: queue.SimpleQueue[Any]
    ) -> None:
        self._options, self._found, self._most_completion = options, found, decoding.max_new_tokens
        self._asking = Asking(options, model, decoding)
        self._commit = Commits(ledger)
        self._key, self._headers = options.secrets()
        self._secrets = options.secret_values
        self._several = options.n  # whether a request may ask for several samples; None: not known yet
        self._singles = 0  # replies with one choice where several were asked for, in a row
        self._why: OrpoDistillError | None = None  # the first reason to stop
        self._stopping = threading.Event()
        self._tally = Tally()
        self._refused, self._last_refusal = 0, ""
        self._all_asked = False  # no prompt is left that has not been taken up
        self._open = 0  # attempts under way

    def stop(self) -> None:
        """Ask for nothing more (from any thread)."""
        self._stopping.set()

    def note(self) -> str:
        """What the purchase has come to, in a few words (from any thread)."""
        return self._tally.note(bool(self._options.price.most(1, 1)))

    async def buy(self, requests: Iterable[Request]) -> None:
        """Deliver a completion for every request. Raises OrpoDistillError when it has to stop."""
        from openai import HttpxBinaryResponseContent  # a reply as it is: the client's models cost more than the rest

        options, self._raw = self._options, HttpxBinaryResponseContent
        self._limiter = Limiter(options.requests_per_minute, options.tokens_per_minute)
        self._servers = Servers([Server(url, _client(options, url, self._key, self._headers)) for url in options.urls])
        self._slots = asyncio.Semaphore(options.concurrency)  # requests in flight
        self._finding_out = asyncio.Lock()
        places = asyncio.Semaphore(options.concurrency)  # prompts under way
        tasks: set[asyncio.Task[None]] = set()
        try:
            for ask in self._asking.asks(requests):
                if not await self._place(places):
                    break
                tasks.add(task := asyncio.create_task(self._fulfil(ask)))
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: places.release())
                task.add_done_callback(self._ended)
            self._all_asked = True
        except OrpoDistillError as error:  # of a prompt that cannot be made: what is under way still comes back
            self._halt(error)
        try:
            await self._come_back(tasks)
        finally:
            await self._servers.close()
            await self._commit.close()
        if self._refused and not self._tally.calls and not self._tally.delivered:
            self._halt(self._unusable(f"every request was refused, the last with {self._last_refusal}"))
        if self._why:
            raise self._why

    async def _place(self, places: asyncio.Semaphore) -> bool:
        """Wait for a place; False once nothing more is to be asked for."""
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                return await asyncio.wait_for(places.acquire(), LOOK)
        return False

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._halt(error if isinstance(error, OrpoDistillError) else RunError(f"{type(error).__name__}: {error}"))

    def _halt(self, why: OrpoDistillError) -> None:
        self._why = self._why or why
        self._stopping.set()

    async def _come_back(self, tasks: set[asyncio.Task[None]]) -> None:
        """Wait for all tasks; once nothing more is to be asked for, only for replies, and only a little longer."""
        while tasks and not self._stopping.is_set():
            await asyncio.wait(tasks, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
        end = monotonic() + GRACE
        while tasks and self._open and monotonic() < end:
            await asyncio.wait(tasks, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
        if tasks:
            _, late = await asyncio.wait(set(tasks), timeout=LOOK)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _fulfil(self, ask: Ask) -> None:
        """Deliver every sample of a prompt, from the ledger or bought."""
        missing = dict(ask.requests)
        while True:
            if ask.stands is None:
                ask.stands = await self._commit(lambda ledger: ledger.samples(ask.asked.key))
            for index in [index for index in missing if index in ask.stands or index in ask.given_up]:
                request = missing.pop(index)
                if index in ask.stands:
                    self._found.put(self._completion(request, ask.stands[index]))
            if not missing or self._stopping.is_set():
                return
            if await self._buy(ask, sorted(missing)):
                ask.stands = None
                await asyncio.sleep(WAIT_FOR_OTHERS)

    async def _buy(self, ask: Ask, indices: Sequence[int]) -> bool:
        """Try to buy these samples, in one request or in several at once; whether another process is buying any."""
        if len(indices) > 1 and self._several is None:
            async with self._finding_out:
                return self._several is None and await self._insist(ask, indices)
        parts = [indices] if self._several or len(indices) == 1 else [[index] for index in indices]
        return any(await asyncio.gather(*(self._insist(ask, part) for part in parts)))

    async def _insist(self, ask: Ask, indices: Sequence[int]) -> bool:
        """Send a request until it brings something, is refused, or has failed too often while others did not.

        Gives up at once, and gives true, where another process is buying one of the samples.
        """
        failures, since = 0, monotonic()
        while not self._stopping.is_set():
            try:
                async with self._slots:
                    await self._attempt(ask, indices)
                break
            except Busy:
                return True
            except NotOffered as error:
                await self._ask_for_one(ask, indices, error)
                break
            except BudgetReached as error:
                if not self._open:
                    self._halt(self._options.over_budget(error))
                await asyncio.sleep(LOOK)  # what is under way counts at its maximum until it is settled
            except OrpoDistillError as error:
                self._halt(error)
            except Refused as error:
                self._refuse(ask, indices, error)
                break
            except Fault as error:
                failures += error.pause is None and self._tally.last_success > since  # "too many" is not its fault
                since = monotonic()
                if self._too_long(error) or failures > self._options.retries:
                    self._give_up(ask, indices, str(error))
                    break
                await self._wait(error, failures)
        return False

    async def _ask_for_one(self, ask: Ask, indices: Sequence[int], error: NotOffered) -> None:
        """Find out whether several samples were refused for their number or for the prompt."""
        busy = await self._insist(ask, indices[:1])
        if indices[0] in ask.given_up:
            self._give_up(ask, indices[1:], str(error))
        elif not busy:
            self._several = False

    async def _attempt(self, ask: Ask, indices: Sequence[int]) -> None:
        """One request. Raises Fault, Refused, NotOffered, Busy or BudgetReached; else something was bought."""
        options, most_completion = self._options, self._most_completion
        expected = ask.most_prompt / 3 + len(indices) * self._tally.mean_completion(most_completion)
        most = options.most(ask.most_prompt, most_completion * len(indices))
        async with self._servers.one() as server:
            await self._limiter.leave(expected)
            if self._stopping.is_set():
                return
            plan = Plan(ask.asked, tuple(indices), most)
            begin: Operation[int] = lambda ledger: ledger.begin(plan, options.account, options.budget.limits)  # noqa: E731
            attempt = await self._commit(begin)
            self._open += 1
            try:
                content = await self._send(server, ask, indices, attempt)
                reply = await self._settle(ask, indices, attempt, content)
            finally:
                self._open -= 1
        usage = reply.usage
        self._limiter.correct((usage.tokens if usage else expected) - expected)
        self._learn(len(indices), len(reply.choices))
        if not reply.choices:
            raise Fault("the server answered without a choice", paid=False)

    async def _settle(self, ask: Ask, indices: Sequence[int], attempt: int, content: bytes) -> Reply:
        """Record what a server answered. Raises Fault if that is no reply."""
        try:
            reply = read_reply(content, len(indices), ask.most_prompt, self._most_completion)
        except Malformed as error:
            found = shown(content.decode(errors="replace"), self._secrets)
            await self._failed(attempt, fault := Fault(f"{error}, found {found}", paid=True))
            raise fault from error
        usage = reply.usage
        parts = shares(reply.choices, usage.completion if usage else None)
        money = self._options.cost(usage) if usage else 0.0

        def settle(ledger: Ledger) -> dict[int, Bought]:
            ledger.settle(attempt, reply.choices, parts, usage, money)
            return ledger.samples(ask.asked.key)

        ask.stands = await self._commit(settle)
        self._tally.add(len(reply.choices), usage, money)
        self._limiter.ease()
        return reply

    async def _send(self, server: Server, ask: Ask, indices: Sequence[int], attempt: int) -> bytes:
        """What the server answers. Whatever becomes of the request, the ledger knows."""
        body = dict(ask.body)
        if len(indices) > 1:
            body["n"] = len(indices)
        elif self._options.seeds:
            body["seed"] = ask.requests[indices[0]].seed % (1 << 31)  # what every server takes
        path = "/chat/completions" if self._options.api == "chat" else "/completions"
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
            if isinstance(fault, Refused) and not fault.everywhere and len(indices) > 1 and self._several is None:
                raise NotOffered(str(fault), paid=False) from None
            if not isinstance(fault, Refused) and fault.pause is None:
                server.failed(sent)
            raise fault from None
        server.works()
        if (pause := asked_pause(reply.response.headers)) is not None:
            self._limiter.pause(pause)
        return reply.content

    async def _failed(self, attempt: int, fault: Fault) -> None:
        await self._commit(lambda ledger: ledger.fail(attempt, str(fault), fault.paid))

    def _learn(self, asked: int, came: int) -> None:
        """Find out whether the server gives several choices: it does once, or two replies in a row bring just one."""
        if self._several is None and asked > 1:
            self._singles = self._singles + 1 if came == 1 else 0
            self._several = True if came == asked else False if self._singles > 1 else None

    def _refuse(self, ask: Ask, indices: Sequence[int], error: Refused) -> None:
        """A request that cannot heal: the prompt's own fault, unless nothing else has succeeded either."""
        self._refused, self._last_refusal = self._refused + 1, str(error)
        if error.everywhere or (not self._tally.calls and self._refused >= REFUSED_AT_FIRST):
            return self._halt(self._unusable(str(error)))
        return self._give_up(ask, indices, str(error))

    def _unusable(self, found: str) -> ModelError:
        return ModelError(
            f"expected {self._options.known_as} to answer, found: {found}; mend the sampler's options or the key, then "
            "run the same command: what was bought is kept"
        )

    def _give_up(self, ask: Ask, indices: Sequence[int], error: str) -> None:
        """Deliver samples as failed."""
        for index in indices:
            ask.given_up.add(index)
            self._found.put(Completion(ask.requests[index], "", FinishReason.ERROR, error=error))

    def _too_long(self, error: Fault) -> bool:
        """Whether only prompts are left that a live server fails on; stops everything where the server is at fault."""
        silent = self._tally.silent(self._limiter.paused)
        if silent <= self._options.patience:
            return False
        if error.answered and self._all_asked and self._tally.delivered:
            return True
        self._halt(
            ModelError(
                f"expected {', '.join(self._options.urls)} to answer, found no success for {silent:.0f} s, the last: "
                f"{error}; see to the server, then run the same command: what was bought is kept"
            )
        )
        return False

    async def _wait(self, fault: Fault, failures: int) -> None:
        """Back off: as long as the server asks for (then all wait), else exponentially with full jitter."""
        if fault.pause is not None:
            self._limiter.pause(fault.pause)
        else:
            await asyncio.sleep(random.uniform(0, min(LONGEST_BACKOFF, 0.5 * 2.0**failures)))

    def _completion(self, request: Request, bought: Bought) -> Completion:
        self._tally.delivered += 1
        return read_bought(request, bought, self._options.thinking)


def _client(options: OpenAI, url: str, key: str, headers: dict[str, str]) -> AsyncOpenAI:
    """A client without retries of its own, over aiohttp: httpx's pool takes time with every connection it holds."""
    from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAioHttpClient

    limits = type(DEFAULT_CONNECTION_LIMITS)(
        max_connections=options.concurrency, max_keepalive_connections=options.concurrency
    )
    return AsyncOpenAI(
        api_key=key or "none",
        base_url=url,
        timeout=options.timeout,
        max_retries=0,
        default_headers=headers,
        http_client=DefaultAioHttpClient(limits=limits, follow_redirects=False),  # headers hold keys
    )
