"""The `openai` sampler through a server's batch endpoint: half the price, and hours to wait.

A batch is known to the ledger before it is sent, under a name that the server keeps with it. Whatever happens then,
the next run finds it: by the server's name for it or, where the process died before it learned that, among the
server's batches.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from orpo_distill.errors import ModelError, RunError
from orpo_distill.ledger import BudgetReached, Ledger, Operation, Plan
from orpo_distill.progress import say
from orpo_distill.records import FinishReason
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.asking import Ask, Asking
from orpo_distill.samplers.faults import PASSES, Fault, Refused, fault_of, shown
from orpo_distill.samplers.replies import Malformed, read_bought, read_reply, shares

if TYPE_CHECKING:
    from openai import OpenAI as Client

    from orpo_distill.samplers.openai import OpenAI

Part = tuple[Ask, Sequence[int]]  # a prompt, and the samples that one request is to bring
LARGEST = 50_000  # requests of a batch (OpenAI's limit)
LISTED = 2_000  # of the server's batches that are looked through, newest first
NAME = "orpo-distill"  # the batch's metadata field that holds its name in the ledger
ENDED = ("completed", "failed", "expired", "cancelled")
NEVER_RAN = ("batch_expired", "batch_cancelled")  # error codes of requests that were not served


class BatchPurchase:
    """A `Generate` that buys in batches, first taking in those that an earlier run left behind."""

    def __init__(self, options: OpenAI, model: str, ledger: Ledger) -> None:
        self._options, self._model, self._ledger = options, model, ledger
        self._client = _client(options, *options.secrets())
        self._secrets = options.secret_values
        self._calls = 0
        self._sent: dict[int, Part] = {}  # what this process's attempts are for
        self._refused: dict[tuple[str, int], str] = {}  # samples that cannot heal, by key and index, and why

    def __call__(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Completion]:
        """Completions as batches come back. Raises OrpoDistillError when it has to stop."""
        self._most_completion = decoding.max_new_tokens
        asks = list(Asking(self._options, self._model, decoding).asks(requests))
        sent = 0
        while sent <= self._options.retries:
            self._take_in()
            asks = yield from self._deliver(asks)
            if not asks:
                return
            if self._submit(asks):
                sent += 1
            else:
                time.sleep(self._options.batch_poll)  # another process buys them
        self._take_in()
        asks = yield from self._deliver(asks)
        for ask in asks:
            for request in ask.requests.values():
                yield Completion(request, "", FinishReason.ERROR, error="no batch brought an answer")

    def stop(self) -> None:
        """Close the connections. Batches go on at the server, and the next run takes them in."""
        self._client.close()

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
                    yield read_bought(request, stands[index], self._options.thinking)
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
        for start in range(0, len(parts), LARGEST):
            name = uuid.uuid4().hex
            attempts, stop = self._begin(parts[start : start + LARGEST], name)
            sent = sent or bool(attempts)
            self._send(name, attempts)
            if stop is not None:
                raise stop
        return sent

    def _parts(self, indices: Sequence[int]) -> list[Sequence[int]]:
        return [indices] if self._options.n else [[index] for index in indices]

    def _begin(self, parts: Sequence[Part], name: str) -> tuple[dict[int, Part], RunError | None]:
        """Commit an attempt for each request of a batch; those that fit, and why not all."""
        options = self._options

        def begin(ask: Ask, indices: Sequence[int]) -> Any:
            plan = Plan(ask.asked, tuple(indices), options.most(ask.most_prompt, self._most_completion * len(indices)))
            return lambda ledger: ledger.begin(plan, options.account, options.budget.limits, name)

        found = self._ledger.transaction(
            [
                lambda ledger: ledger.name_batch(name, options.known_as, None),
                *(begin(ask, indices) for ask, indices in parts),
            ]
        )[1:]
        attempts = {attempt: part for attempt, part in zip(found, parts, strict=True) if isinstance(attempt, int)}
        over = next((error for error in found if isinstance(error, BudgetReached)), None)
        self._sent |= attempts
        return attempts, None if over is None else options.over_budget(over)

    def _send(self, name: str, attempts: Mapping[int, Part]) -> None:
        if not attempts:
            return
        lines = [
            {"custom_id": str(attempt), "method": "POST", "url": self._options.path, "body": self._body(ask, indices)}
            for attempt, (ask, indices) in attempts.items()
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            remote = self._create(name, content)
        except ModelError as error:  # nothing was created
            self._fail(name, str(error), paid=False)
            raise
        if remote:
            self._name(name, remote)
            say(f"  batch {remote}: {len(attempts)} requests sent")

    def _create(self, name: str, content: bytes) -> str | None:
        """The server's name for a new batch; None where it may have been made unseen."""
        file = self._ask(lambda: _id(self._client.files.create(file=(f"{name}.jsonl", content), purpose="batch")))
        self._name(name, "")
        found: str | None = self._ask(
            lambda: _id(
                self._client.batches.create(
                    input_file_id=file,
                    endpoint=self._options.path,  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={NAME: name},
                )
            ),
            again=False,  # the server's list of batches will tell
        )
        return found

    def _name(self, name: str, remote: str) -> None:
        self._ledger.transaction([lambda ledger: ledger.name_batch(name, self._options.known_as, remote)])

    def _body(self, ask: Ask, indices: Sequence[int]) -> dict[str, Any]:
        if len(indices) > 1:
            return {**ask.body, "n": len(indices)}
        seed = {"seed": ask.requests[indices[0]].seed % (1 << 31)} if self._options.seeds else {}
        return {**ask.body, **seed}

    def _take_in(self) -> None:
        """Wait for every batch that is under way, and settle what it brings."""
        for name, known in self._ledger.open_batches(self._options.known_as).items():
            remote = self._found_again(name) if known == "" else known
            if remote is None:
                lost = known is not None
                self._fail(name, "the batch is not among the server's" if lost else "it was never sent", paid=lost)
            elif (batch := self._ended(remote)) is None:
                self._fail(name, "the server does not know the batch any more", paid=True)
            else:
                self._read(name, batch)

    def _ended(self, remote: str) -> Any:
        """A batch once it has ended; None if the server does not know it."""
        while True:
            try:
                batch = self._ask(lambda: _known(self._client.batches.retrieve(remote)))
            except Gone:
                return None
            say(f"  batch {remote}: {batch.status}, {_progress(batch)}")
            if batch.status in ENDED:
                return batch
            time.sleep(self._options.batch_poll)

    def _read(self, name: str, batch: Any) -> None:
        """Settle the attempts of a batch that has ended."""
        completed = batch.request_counts.completed if batch.request_counts else 0
        for file, rows in ((batch.output_file_id, completed), (batch.error_file_id, 0)):
            if file:
                self._settle(name, self._ask(partial(self._rows, file, rows)))
        words = "; ".join(str(error.message) for error in (batch.errors and batch.errors.data) or ())
        self._fail(name, f"the batch {batch.status} without this answer" + (f": {words}" if words else ""), paid=False)
        if batch.status == "failed":
            raise self._unusable(f"that the batch {batch.id} failed: {words or 'without a word'}")

    def _rows(self, file: str, least: int) -> list[dict[str, Any]]:
        """The rows of a file. Raises ValueError unless it is whole."""
        rows = [json.loads(line) for line in self._client.files.content(file).content.splitlines() if line.strip()]
        if len(rows) < least or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{len(rows)} rows of {least}")
        return rows

    def _found_again(self, name: str) -> str | None:
        """A batch whose creation was not answered, among the server's: looked for until patience ends."""
        end = time.monotonic() + self._options.patience
        while True:
            found: str | None = self._ask(partial(self._named, name))
            if found or time.monotonic() > end:
                return found or None
            time.sleep(self._options.batch_poll)

    def _named(self, name: str) -> str:
        """The server's name for a batch, "" if it lists none of ours."""
        for place, batch in enumerate(self._client.batches.list(limit=100)):
            if _mapping(batch.metadata).get(NAME) == name:
                return _id(batch)
            if place >= LISTED:
                break
        return ""

    def _settle(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Settle the attempts that a batch's file of answers names."""
        attempts = {str(attempt): (attempt, *size) for attempt, size in self._ledger.attempts_of(name).items()}
        work = [
            self._settled(*attempts[row["custom_id"]], row, _mapping(row.get("response")))
            for row in rows
            if isinstance(row.get("custom_id"), str) and row["custom_id"] in attempts
        ]
        self._ledger.transaction(work)
        self._calls += len(work)

    def _settled(
        self, attempt: int, samples: int, most: int, row: Mapping[str, Any], response: Mapping[str, Any]
    ) -> Operation[None]:
        """The ledger operation for one answer."""
        options, status = self._options, response.get("status_code")
        if status != 200:
            error = row.get("error") or _mapping(response.get("body")).get("error") or response
            words = f"HTTP {status}: {shown(str(error), self._secrets)}"
            if isinstance(status, int) and status not in PASSES:
                ask, indices = self._sent.get(attempt, (None, ()))
                self._refused |= {(ask.asked.key, index): words for index in indices if ask}
            paid = not response and _mapping(row.get("error")).get("code") not in NEVER_RAN
            return lambda ledger: ledger.fail(attempt, words, paid)
        try:
            reply = read_reply(json.dumps(response.get("body")).encode(), samples, most, most // samples)
        except Malformed as malformed:
            words = f"{malformed}, found {shown(str(response.get('body')), self._secrets)}"
            return lambda ledger: ledger.fail(attempt, words, True)
        usage = reply.usage
        parts = shares(reply.choices, usage.completion if usage else None)
        money = options.cost(usage) if usage else 0.0
        return lambda ledger: ledger.settle(attempt, reply.choices, parts, usage, money)

    def _fail(self, name: str, error: str, paid: bool) -> None:
        attempts = self._ledger.attempts_of(name, "open")

        def failing(attempt: int) -> Any:
            return lambda ledger: ledger.fail(attempt, error, paid)

        self._ledger.transaction([failing(attempt) for attempt in attempts])

    def _ask(self, call: Any, again: bool = True) -> Any:
        """What a call to the server gives, tried until patience ends; None where it may not be made `again`."""
        started, failures = time.monotonic(), 0
        while True:
            try:
                return call()
            except Exception as error:
                fault = fault_of(error, self._secrets)
                if fault is None and isinstance(error, ValueError | AttributeError | TypeError):
                    fault = Fault(f"a malformed answer ({error})", paid=True)  # the client takes anything for one
                if fault is None:
                    raise
                if not again and fault.paid:
                    return None
                self._stop_at(fault, time.monotonic() - started)
                failures += 1
                time.sleep(fault.pause if fault.pause is not None else min(60.0, 2.0**failures))

    def _stop_at(self, fault: Fault, waited: float) -> None:
        if isinstance(fault, Refused) and str(fault).startswith("HTTP 404"):
            raise Gone from None
        if isinstance(fault, Refused) or waited > self._options.patience:
            raise self._unusable(str(fault)) from None

    def _unusable(self, found: str) -> ModelError:
        return ModelError(
            f"expected {self._options.urls[0]} to take a batch, found: {found}; mend the sampler's options, or see to "
            "the server, then run the same command: what was bought is kept"
        )


class Gone(ModelError):
    """The server does not know what it is asked about."""

    def __init__(self) -> None:
        super().__init__(
            "expected a server with a batch endpoint, found HTTP 404; set sampler.batch: false, or check base_url"
        )


def _id(made: Any) -> str:
    """What the server calls what it made. Raises ValueError if it does not tell."""
    if not isinstance(made.id, str):
        raise ValueError(f"id {made.id!r}")
    return made.id


def _known(batch: Any) -> Any:
    """A batch whose status the server tells. Raises ValueError if it does not."""
    if not isinstance(batch.status, str):
        raise ValueError(f"status {batch.status!r}")
    return batch


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _progress(batch: Any) -> str:
    counts = batch.request_counts
    return f"{counts.completed} of {counts.total} done, {counts.failed} failed" if counts else "no counts"


def _client(options: OpenAI, key: str, headers: dict[str, str]) -> Client:
    from openai import DefaultHttpxClient
    from openai import OpenAI as Client

    return Client(
        api_key=key or "none",
        base_url=options.urls[0],
        timeout=options.timeout,
        max_retries=0,
        default_headers=headers,
        http_client=DefaultHttpxClient(follow_redirects=False),  # headers hold keys
    )
