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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import Interrupted, ModelError, OrpoDistillError, RunError
from orpo_distill.ledger import Bought, BudgetReached, Busy, Ledger, Left
from orpo_distill.progress import say
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.faults import NAME_PATIENCE, Fault, NotOffered, Refused
from orpo_distill.samplers.sending import Sender
from orpo_distill.samplers.silence import Silence

if TYPE_CHECKING:
    from orpo_distill.samplers.openai import OpenAI

GRACE = 15.0  # seconds that requests in flight get to come back when the sampler is stopped
SELDOM = 100_000, 50, 50  # new objects before garbage is looked for, see `gc.set_threshold`
LOOK = 0.2  # seconds between looks at whether to stop
WAIT_FOR_OTHERS = 0.5  # seconds between looks at what another process is buying
LONGEST_BACKOFF = 60.0  # seconds
REFUSED_AT_FIRST = 8  # requests refused before one has succeeded: then it is not the requests' fault


class Purchase:
    """A `Generate` that buys from a server. `note` says what it has come to."""

    def __init__(self, options: OpenAI, asking: Callable[[Decoding], Asking], ledger: Ledger) -> None:
        self._options, self._asking, self._ledger = options, asking, ledger
        self._buyer: Buyer | None = None
        self._ended = threading.Event()

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Completions as they are there: first what the ledger holds. Raises OrpoDistillError when it has to stop."""
        found: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        wanted = list(requests)
        self._buyer = Buyer(self._options, self._asking(decoding), self._ledger, found)
        self._ended.clear()
        threading.Thread(target=_run, args=(self._buyer, wanted, found, self._ended), name="openai").start()
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def note(self) -> str:
        """Tokens, money and rate so far, in a few words."""
        return self._buyer.note() if self._buyer else ""

    def stop(self) -> None:
        """Ask for nothing more and wait a little for what is under way: it may have been paid for.

        Another signal meanwhile gives that up.
        """
        if self._buyer is None:
            return
        self._buyer.stop()
        interrupted: Interrupted | None = None
        if not self._ended.is_set() and (count := self._buyer.open):
            say(f"  waiting up to {GRACE:.0f} s for {count} replies under way (another Ctrl-C gives them up)")
        while not self._ended.is_set():
            try:
                self._ended.wait()  # not the thread's own `join`, which takes it for ended once it is interrupted
            except Interrupted as error:
                if interrupted is None and (count := self._buyer.open):
                    say(f"  {count} replies under way are given up: they may be paid for, and count as unknown")
                interrupted = error
                self._buyer.give_up()
        if interrupted is not None:
            raise interrupted


def _run(buyer: Buyer, requests: Sequence[Request], found: queue.SimpleQueue[Any], ended: threading.Event) -> None:
    import uvloop

    try:
        with _rarely_collected(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(buyer.buy(requests))
    except BaseException as error:  # goes to the thread that waits
        found.put(error)
    else:
        found.put(None)
    finally:
        ended.set()


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
    """Fulfils requests. All methods but `stop`, `give_up`, `note` and `open` run in the event loop's thread."""

    def __init__(self, options: OpenAI, asking: Asking, ledger: Ledger, found: queue.SimpleQueue[Any]) -> None:
        self._options, self._asking, self._found = options, asking, found
        self._stopping, self._given_up = threading.Event(), threading.Event()
        self._sender = Sender(options, ledger, asking, self._stopping)
        self._tally = self._sender.tally
        self._silence = Silence(self._sender, ", ".join(options.urls), options.patience)
        self._why: OrpoDistillError | None = None  # the first reason to stop
        self._refused, self._last_refusal = 0, ""
        self._all_asked = False  # no prompt is left that has not been taken up
        self._missing = 0  # samples that are not delivered yet

    def stop(self) -> None:
        """Ask for nothing more (from any thread)."""
        self._stopping.set()
        self._sender.commit.hurry.set()

    def give_up(self) -> None:
        """Wait for nothing any more (from any thread)."""
        self._given_up.set()

    @property
    def open(self) -> int:
        """How many requests are under way (from any thread)."""
        return self._sender.open

    def note(self) -> str:
        """What the purchase has come to, in a few words (from any thread)."""
        return self._tally.note(bool(self._options.price.most(1, 1)))

    async def buy(self, requests: Sequence[Request]) -> None:
        """Deliver a completion for every request. Raises OrpoDistillError when it has to stop."""
        self._missing = len(requests)
        self._finding_out = asyncio.Lock()
        places = asyncio.Semaphore(self._options.concurrency)  # prompts under way
        tasks: set[asyncio.Task[None]] = set()
        async with self._sender:
            watching = asyncio.create_task(self._silence.watch())
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
            await self._come_back(tasks)
            watching.cancel()
        if self._refused and not self._tally.calls and not self._tally.delivered:
            self._halt(self._asking.unusable(f"every request was refused, the last with {self._last_refusal}"))
        if isinstance(self._why, BudgetReached):  # now it is known what is missing
            raise self._options.over_budget(self._why, self._missing)
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
        while tasks and self.open and monotonic() < end and not self._given_up.is_set():
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
                ask.stands = await self._sender.commit(lambda ledger: ledger.samples(ask.asked.key))
            for index in [index for index in missing if index in ask.stands or index in ask.given_up]:
                request = missing.pop(index)
                if index in ask.stands:
                    self._deliver(self._completion(request, ask.stands[index]))
            if not missing or self._stopping.is_set():
                return
            if await self._buy(ask, sorted(missing)):
                ask.stands = None
                await asyncio.sleep(WAIT_FOR_OTHERS)

    async def _buy(self, ask: Ask, indices: Sequence[int]) -> bool:
        """Try to buy these samples, in one request or in several at once; whether another process is buying any."""
        if len(indices) > 1 and self._sender.several is None:
            async with self._finding_out:
                return self._sender.several is None and await self._insist(ask, indices)
        parts = [indices] if self._sender.several or len(indices) == 1 else [[index] for index in indices]
        return any(await asyncio.gather(*(self._insist(ask, part) for part in parts)))

    async def _insist(self, ask: Ask, indices: Sequence[int]) -> bool:
        """Send a request until it brings something, is refused, or has failed too often while others did not.

        Gives up at once, and gives true, where another process is buying one of the samples.
        """
        failures, since = 0, monotonic()
        while not self._stopping.is_set():
            try:
                await self._sender.attempt(ask, indices)
                break
            except Left:
                self._halt(self._options.left_in_batch())
            except Busy:
                return True
            except NotOffered as error:
                await self._ask_for_one(ask, indices, error)
                break
            except BudgetReached as error:
                if not self.open:
                    self._halt(error)
                await asyncio.sleep(LOOK)  # what is under way counts at its maximum until it is settled
            except OrpoDistillError as error:
                self._halt(error)
            except Refused as error:
                self._refuse(ask, indices, error)
                break
            except Fault as error:
                self._silence.failure = str(error)
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
            self._sender.several = False

    def _refuse(self, ask: Ask, indices: Sequence[int], error: Refused) -> None:
        """A request that cannot heal: the prompt's own fault, unless nothing else has succeeded either."""
        self._refused, self._last_refusal = self._refused + 1, str(error)
        if error.everywhere or (not self._tally.calls and self._refused >= REFUSED_AT_FIRST):
            return self._halt(self._asking.unusable(str(error)))
        return self._give_up(ask, indices, str(error))

    def _give_up(self, ask: Ask, indices: Sequence[int], error: str) -> None:
        """Deliver samples as failed."""
        for index in indices:
            ask.given_up.add(index)
            self._deliver(Completion(ask.requests[index], "", FinishReason.ERROR, error=error))

    def _too_long(self, error: Fault) -> bool:
        """Whether only prompts are left that a live server fails on; stops everything where the server is at fault."""
        silent = self._tally.silent(self._sender.limiter.paused)
        if error.nowhere and silent > NAME_PATIENCE and not self._tally.calls and self._sender.servers.nowhere:
            self._halt(self._asking.unusable(f"{error}, for {silent:.0f} s"))
            return False
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
            self._sender.limiter.pause(fault.pause)
        else:
            await asyncio.sleep(random.uniform(0, min(LONGEST_BACKOFF, 0.5 * 2.0**failures)))

    def _completion(self, request: Request, bought: Bought) -> Completion:
        self._tally.delivered += 1
        return self._asking.completion(request, bought)

    def _deliver(self, completion: Completion) -> None:
        self._missing -= 1
        self._found.put(completion)
