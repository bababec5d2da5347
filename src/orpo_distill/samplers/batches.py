"""The `openai` sampler through a server's batch endpoint: half the price, and hours to wait.

A batch is known to the ledger before it is sent, under a name that the server keeps with it. Whatever happens then,
the next run finds it: by the server's name for it or, where the process died before it learned that, among the
server's batches.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ModelError, OrpoDistillError
from orpo_distill.ledger import BudgetReached, Ledger, Operation, Plan, Settlement, Waiting
from orpo_distill.progress import say
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.batch_server import BatchServer
from orpo_distill.samplers.faults import PASSES, Refused, declined, shown
from orpo_distill.samplers.replies import Declined, Malformed, Reply, read_reply, shares

if TYPE_CHECKING:
    from orpo_distill.samplers.openai import OpenAI

Part = tuple[Ask, Sequence[int]]  # a prompt, and the samples that one request is to bring
LARGEST = 50_000  # requests of a batch (OpenAI's limit)
NEVER_RAN = ("batch_expired", "batch_cancelled")  # error codes of requests that were not served


class BatchPurchase:
    """A `Generate` that buys in batches, first taking in those with its samples that an earlier run left behind."""

    def __init__(self, options: OpenAI, asking: Callable[[Decoding], Asking], ledger: Ledger) -> None:
        self._options, self._make_asking, self._ledger = options, asking, ledger
        self._server = BatchServer(options)
        self._secrets = options.secret_values
        self._calls = 0
        self._sent: dict[int, Part] = {}  # what this process's attempts are for
        self._refused: dict[tuple[str, int], str] = {}  # samples that cannot heal, by key and index, and why

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Completions as batches come back. Raises OrpoDistillError when it has to stop."""
        self._asking = self._make_asking(decoding)
        asks = list(self._asking.asks(requests))
        self._look_at_others(asks)
        sent = 0
        while sent <= self._options.retries:
            self._take_in(asks)
            asks = yield from self._deliver(asks)
            if not asks:
                return
            if self._submit(asks):
                sent += 1
            else:
                time.sleep(self._options.batch_poll)  # another process buys them
        self._take_in(asks)
        asks = yield from self._deliver(asks)
        for ask in asks:
            for request in ask.requests.values():
                yield Completion(request, "", FinishReason.ERROR, error="no batch brought an answer")

    def stop(self) -> None:
        """Close the connections. Batches go on at the server, and the next run takes them in."""
        self._server.close()

    def note(self) -> str:
        """What came back, in a few words."""
        return f"{self._calls} answers of batches"

    def _deliver(self, asks: Sequence[Ask]) -> Generator[Completion, None, list[Ask]]:
        """Yield what the ledger holds and what cannot heal; return what is missing."""
        for ask in asks:
            stands = self._ledger.samples(ask.asked.key)
            for index, request in list(ask.requests.items()):
                refused = self._refused.get((ask.asked.key, index))
                if index in stands:
                    yield self._asking.completion(request, stands[index])
                elif refused is not None:
                    yield Completion(request, "", FinishReason.ERROR, error=refused)
                else:
                    continue
                del ask.requests[index]
        return [ask for ask in asks if ask.requests]

    def _submit(self, asks: Sequence[Ask]) -> bool:
        """Send what is missing, as many batches as it takes; whether there was anything that nobody else is buying.

        Raises RunError where the budget ends first.
        """
        sent = False
        parts = [(ask, part) for ask in asks for part in self._parts(sorted(ask.requests))]
        missing = sum(len(part) for _, part in parts)
        for start in range(0, len(parts), LARGEST):
            name = uuid.uuid4().hex
            attempts, over = self._begin(parts[start : start + LARGEST], name)
            sent = sent or bool(attempts)
            self._send(name, attempts)
            missing -= sum(len(part) for _, part in attempts.values())
            if over is not None:
                raise self._options.over_budget(over, missing)
        return sent

    def _parts(self, indices: Sequence[int]) -> list[Sequence[int]]:
        return [indices] if self._options.n else [[index] for index in indices]

    def _begin(self, parts: Sequence[Part], name: str) -> tuple[dict[int, Part], BudgetReached | None]:
        """Commit an attempt for each request of a batch; those that fit, and why not all."""
        options, terms = self._options, self._options.terms

        def begin(ask: Ask, indices: Sequence[int]) -> Any:
            most = options.most(ask.most_prompt, self._asking.most_completion * len(indices))
            plan = Plan(ask.asked, tuple(indices), most, terms)
            return lambda ledger: ledger.begin(plan, options.account, options.budget.limits, name)

        found = self._ledger.transaction(
            [
                lambda ledger: ledger.name_batch(name, options.known_as, None),
                *(begin(ask, indices) for ask, indices in parts),
            ]
        )[1:]
        attempts = {attempt: part for attempt, part in zip(found, parts, strict=True) if isinstance(attempt, int)}
        self._sent |= attempts
        return attempts, next((error for error in found if isinstance(error, BudgetReached)), None)

    def _send(self, name: str, attempts: Mapping[int, Part]) -> None:
        if not attempts:
            return
        lines = [
            {
                "custom_id": str(attempt),
                "method": "POST",
                "url": self._options.path,
                "body": ask.filled(indices, self._options.seeds),
            }
            for attempt, (ask, indices) in attempts.items()
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            remote = self._server.create(name, content, lambda: self._name(name, ""))
        except ModelError as error:  # nothing was created
            self._fail(name, str(error), paid=False)
            raise
        if remote:
            self._name(name, remote)
            say(f"  batch {remote}: {len(attempts)} requests sent")

    def _name(self, name: str, remote: str) -> None:
        self._ledger.transaction([lambda ledger: ledger.name_batch(name, self._options.known_as, remote)])

    def _take_in(self, asks: Sequence[Ask]) -> None:
        """Wait for every batch under way with one of these samples that nobody waits for, and settle what it brings."""
        for name, known in self._open_batches(asks)[0].items():
            remote = self._server.found_again(name) if known == "" else known
            if remote is None:
                lost = known is not None
                self._fail(name, "the batch is not among the server's" if lost else "it was never sent", paid=lost)
            elif (batch := self._server.ended(remote)) is None:
                self._fail(name, "the server does not know the batch any more", paid=True)
            else:
                self._read(name, batch)

    def _look_at_others(self, asks: Sequence[Ask]) -> None:
        """Settle batches of others that nobody waits for, if they have ended; whatever goes wrong is left to them."""
        for name, remote in self._open_batches(asks)[1].items():
            if remote and (batch := self._server.ended_already(remote)) is not None:
                try:
                    self._read(name, batch)
                except OrpoDistillError as error:
                    say(f"  batch {remote} of another run is left alone: {error}")

    def _open_batches(self, asks: Sequence[Ask]) -> tuple[dict[str, str | None], dict[str, str | None]]:
        wanted = {ask.asked.key: ask.requests.keys() for ask in asks}
        return self._ledger.open_batches(self._options.known_as, wanted)

    def _read(self, name: str, batch: Any) -> None:
        """Settle the attempts of a batch that has ended."""
        completed = batch.request_counts.completed if batch.request_counts else 0
        for file, rows in ((batch.output_file_id, completed), (batch.error_file_id, 0)):
            if file:
                self._settle(name, self._server.rows(file, rows))
        words = "; ".join(str(error.message) for error in (batch.errors and batch.errors.data) or ())
        self._fail(name, f"the batch {batch.status} without this answer" + (f": {words}" if words else ""), paid=False)
        if batch.status == "failed":
            raise self._server.unusable(f"that the batch {batch.id} failed: {words or 'without a word'}")

    def _settle(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Settle the attempts that a batch's file of answers names. Rows that name none of them are passed over."""
        attempts = {str(attempt): (attempt, waiting) for attempt, waiting in self._ledger.attempts_of(name).items()}
        named = [row for row in rows if isinstance(row.get("custom_id"), str) and row["custom_id"] in attempts]
        self._ledger.transaction([self._settled(*attempts[row["custom_id"]], row) for row in named])
        self._calls += len(named)
        if odd := len(rows) - len(named):
            say(f"  {odd} rows of the answers belong to no request of this batch and are passed over")

    def _settled(self, attempt: int, waiting: Waiting, row: Mapping[str, Any]) -> Operation[None]:
        """The ledger operation for one answer: at the price at which its request left, whoever takes it in."""
        response = _mapping(row.get("response"))
        status = _number(response.get("status_code"))
        if status is None and _mapping(response.get("body")).get("choices"):
            status = 200
        if status != 200:
            return self._failed(attempt, row, response, status)
        samples, most, terms = waiting
        try:
            reply = read_reply(json.dumps(response.get("body")).encode(), samples, most, most // samples)
        except Malformed as malformed:
            words = f"{malformed}, found {shown(str(response.get('body')), self._secrets)}"
            return lambda ledger: ledger.fail(attempt, words, True)
        except Declined as error:
            fault = declined(error, self._secrets)
            if isinstance(fault, Refused):
                self._refuse(attempt, str(fault))
            if error.usage is None:
                return lambda ledger: ledger.fail(attempt, str(fault), fault.paid)
            reply = Reply((), error.usage)
        usage = reply.usage
        parts = tuple(shares(reply.choices, usage.completion if usage else None))
        return Settlement(attempt, reply.choices, parts, usage, self._options.cost(usage, terms) if usage else 0.0)

    def _failed(
        self, attempt: int, row: Mapping[str, Any], response: Mapping[str, Any], status: int | None
    ) -> Operation[None]:
        """The ledger operation for a row without an answer. What names no status may have been served."""
        error = row.get("error") or _mapping(response.get("body")).get("error") or response
        words = f"HTTP {status}: {shown(str(error), self._secrets)}"
        if status is not None and status not in PASSES:
            self._refuse(attempt, words)
        paid = status is None and _mapping(row.get("error")).get("code") not in NEVER_RAN
        return lambda ledger: ledger.fail(attempt, words, paid)

    def _refuse(self, attempt: int, words: str) -> None:
        """Take note of samples that need not be asked for again."""
        ask, indices = self._sent.get(attempt, (None, ()))
        self._refused |= {(ask.asked.key, index): words for index in indices if ask}

    def _fail(self, name: str, error: str, paid: bool) -> None:
        attempts = self._ledger.attempts_of(name, "open")

        def failing(attempt: int) -> Any:
            return lambda ledger: ledger.fail(attempt, error, paid)

        self._ledger.transaction([failing(attempt) for attempt in attempts])


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _number(status: Any) -> int | None:
    """An HTTP status, as a number or its digits; None for anything else."""
    if isinstance(status, str) and status.isdecimal():
        status = int(status)
    return status if isinstance(status, int) and not isinstance(status, bool) else None
