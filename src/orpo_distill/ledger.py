"""The ledger: every sample ever bought from an API, and every attempt to buy one, in one SQLite file.

It stands outside the run folders and is shared by runs, also at the same time. Before a request leaves, its *attempt*
is committed with the most that it may cost and the price; the reply's usage settles it. An attempt that is never
settled (connection cut, process killed, usage unreadable) may have been paid for: it counts at its maximum against the
budget. What a reply brings is committed choice by choice, as it came, before anything reads its text.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from orpo_distill.errors import OrpoDistillError
from orpo_distill.ledger_file import PATIENCE, connect, connect_to_read, explained, life_of, lives, sign_of_life
from orpo_distill.records import stable_hash

T = TypeVar("T")
Operation = Callable[["Ledger"], T]
"""A piece of work inside a transaction. It must check before it writes: what it raises undoes nothing."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as a server counts them: `cached_prompt` is a part of `prompt`, `reasoning` one of `completion`."""

    prompt: int = 0
    completion: int = 0
    cached_prompt: int = 0
    reasoning: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class Spent:
    """What an account's attempts add up to, or may."""

    money: float = 0.0
    tokens: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: the same for all samples of a prompt. `request` is what is sent, as JSON."""

    endpoint: str
    model: str
    request: str

    @property
    def key(self) -> str:
        """Under which its samples stand."""
        return stable_hash(self.endpoint, self.model, self.request)[:32]


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that is about to leave: for which samples, and the most that it may cost."""

    asked: Asked
    indices: tuple[int, ...]
    most: Spent  # calls is 1
    price: str = ""  # at which it leaves: what its sampler makes of it when it is settled, by whichever process


@dataclass(frozen=True, slots=True)
class Bought:
    """A sample: a choice of a reply as it came (JSON), and its share of the tokens that the reply was billed."""

    choice: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Settlement:
    """The operation that records a reply, as plain data: it can be written down where the ledger cannot."""

    attempt: int
    choices: tuple[str, ...]
    shares: tuple[int | None, ...]
    usage: Usage | None
    money: float

    def __call__(self, ledger: Ledger) -> None:
        """See `Ledger.settle`."""
        ledger.settle(self.attempt, self.choices, self.shares, self.usage, self.money)


class Waiting(NamedTuple):
    """An attempt that is part of a batch: for how many samples, its most tokens, and its price."""

    samples: int
    most_tokens: int
    price: str


class BudgetReached(OrpoDistillError, RuntimeError):
    """The next request could exceed the budget. `spent` and `most` are what there is and what it may cost."""

    def __init__(self, limit: str, spent: Spent, most: Spent) -> None:
        self.limit, self.spent, self.most = limit, spent, most
        super().__init__(f"the budget of {limit} is reached")


class Busy(Exception):
    """One of the samples has just been bought, or a request for it is under way, here or in another live process."""


class Left(Busy):
    """One of the samples is in a batch that left, and that no live process waits for."""


class Books:
    """What a ledger says, read from its open file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def samples(self, key: str) -> dict[int, Bought]:
        """What was bought of a prompt, by sample index."""
        rows = self.connection.execute(
            "SELECT sample_index, choice, prompt, completion_tokens FROM samples JOIN attempts ON id = attempt"
            " WHERE samples.key = ?",
            (key,),
        )
        return {index: Bought(choice, prompt or None, tokens) for index, choice, prompt, tokens in rows}

    def spent(self, account: str) -> Spent:
        """What an account's attempts add up to, unsettled ones at their maximum."""
        row = self.connection.execute("SELECT money, tokens, calls FROM accounts WHERE account = ?", (account,))
        return Spent(*(row.fetchone() or ()))


@contextmanager
def reading(path: Path) -> Iterator[Books]:
    """A ledger to read. Needs no lock and no right to write, and holds up nobody. Raises RunError."""
    with explained(path):
        connection = connect_to_read(path.resolve())
        try:
            yield Books(connection)
        finally:
            connection.close()


class Ledger(Books):
    """An open ledger. One thread at a time may use it; `transaction` is the only way to write.

    `patience`: seconds that a transaction waits for those of other processes.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.path = path = path.resolve()
        self.session = uuid.uuid4().hex
        with explained(path):
            super().__init__(connect(path, patience))
            try:
                self._sign = sign_of_life(path, self.session)
            except BaseException:
                self.connection.close()
                raise

    def transaction(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        """Do all of them in one transaction; what an operation gives, or the exception that it raises, in their order.

        They are durable when this returns. Raises RunError if the file cannot be written.
        """
        found: list[Any] = []
        with explained(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                for operation in operations:
                    try:
                        found.append(operation(self))
                    except (BudgetReached, Busy) as error:
                        found.append(error)
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
                raise
        return found

    def close(self) -> None:
        """Close the file. Attempts of this process that are still open are unknown from now on."""
        self.connection.close()
        self._sign.close()
        with suppress(OSError):
            life_of(self.path, self.session).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, plan: Plan, account: str, budget: Mapping[str, float], batch: str | None = None) -> int:
        """Record an attempt before its request leaves; its id.

        `budget` maps money, tokens or calls to the most that the account may come to. Raises BudgetReached if this
        attempt could exceed it; Busy where one of the samples stands by now, or another attempt for it is under way;
        Left where that is a batch which nobody waits for.
        """
        key = plan.asked.key
        if not self.samples(key).keys().isdisjoint(plan.indices):
            raise Busy
        earlier = self._unsettled(key, set(plan.indices))
        spent = self.spent(account)
        for limit, most in budget.items():
            if getattr(spent, limit) + getattr(plan.most, limit) > most:
                raise BudgetReached(limit, spent, plan.most)
        run = self.connection.execute
        run(
            "INSERT OR IGNORE INTO asked VALUES (?, ?, ?, ?)",
            (key, plan.asked.endpoint, plan.asked.model, plan.asked.request),
        )
        self._add(account, plan.most.money, plan.most.tokens, 1)
        found = run(
            "INSERT INTO attempts (key, account, session, started, indices, state, again, batch, most_tokens,"
            " most_money, price) VALUES (?, ?, ?, ?, ?, 'open', ?, ?, ?, ?, ?)",
            (key, account, self.session, time.time(), json.dumps(plan.indices), earlier, batch, plan.most.tokens,
             plan.most.money, plan.price),
        )  # fmt: skip
        return int(found.lastrowid or 0)

    def settle(
        self, attempt: int, choices: Sequence[str], shares: Sequence[int | None], usage: Usage | None, money: float
    ) -> None:
        """Record a reply: its choices for the first of the attempt's samples, and what it cost.

        Without `usage` the cost stays unknown. A sample that stands already is kept as it is, and so is the cost of an
        attempt that is settled; one that was given up for unknown is settled late.
        """
        key, account, indices, most_tokens, most_money, state = self._attempt(attempt)
        run, now = self.connection.execute, time.time()
        for index, choice, share in zip(indices, choices, shares, strict=False):
            run("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?)", (key, index, attempt, now, share, choice))
        if state == "settled":
            return
        if state == "void":  # it was thought not to have been served
            self._add(account, most_money, most_tokens, 1)
        if usage is None:
            run("UPDATE attempts SET state = 'unknown', ended = ? WHERE id = ?", (now, attempt))
            return
        run(
            "UPDATE attempts SET state = 'settled', ended = ?, prompt = ?, cached_prompt = ?, completion = ?,"
            " reasoning = ?, money = ? WHERE id = ?",
            (now, usage.prompt, usage.cached_prompt, usage.completion, usage.reasoning, money, attempt),
        )
        self._add(account, money - most_money, usage.tokens - most_tokens, 0)

    def fail(self, attempt: int, error: str, paid: bool) -> None:
        """Record that no reply came: `paid` if it may be billed all the same (then its cost stays unknown)."""
        _, account, _, most_tokens, most_money, state = self._attempt(attempt)
        if state != "open":
            return
        self.connection.execute(
            "UPDATE attempts SET state = ?, ended = ?, error = ? WHERE id = ?",
            ("unknown" if paid else "void", time.time(), error, attempt),
        )
        if not paid:
            self._add(account, -most_money, -most_tokens, -1)

    def name_batch(self, batch: str, endpoint: str, remote: str | None) -> None:
        """Record a batch before it is sent (`remote` None), and what the server calls it afterwards."""
        self.connection.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", (batch, endpoint, remote))

    def open_batches(
        self, endpoint: str, wanted: Mapping[str, Collection[int]]
    ) -> tuple[dict[str, str | None], dict[str, str | None]]:
        """Batches that are not settled and no other live process waits for, and what the server calls them.

        First those with samples that are `wanted` (indices by key), then all others. None: not sent yet; "": sent, but
        the server has not said how it calls them.
        """
        rows = self.connection.execute(
            "SELECT batch, remote, session, key, indices FROM batches JOIN attempts USING (batch) WHERE endpoint = ?"
            " AND state = 'open'",
            (endpoint,),
        ).fetchall()
        sessions = {session: session == self.session or not lives(self.path, session) for _, _, session, _, _ in rows}
        taken = {batch for batch, _, session, _, _ in rows if not sessions[session]}
        own = {
            batch for batch, _, _, key, indices in rows if not set(wanted.get(key, ())).isdisjoint(json.loads(indices))
        }
        free = {batch: remote for batch, remote, _, _, _ in rows if batch not in taken}
        return (
            {batch: remote for batch, remote in free.items() if batch in own},
            {batch: remote for batch, remote in free.items() if batch not in own},
        )

    def attempts_of(self, batch: str, state: str = "%") -> dict[int, Waiting]:
        """The attempts of a batch, in one state or in any."""
        rows = self.connection.execute(
            "SELECT id, indices, most_tokens, price FROM attempts WHERE batch = ? AND state LIKE ?", (batch, state)
        )
        return {attempt: Waiting(len(json.loads(indices)), most, price) for attempt, indices, most, price in rows}

    def _attempt(self, attempt: int) -> tuple[str, str, list[int], int, float, str]:
        row = self.connection.execute(
            "SELECT key, account, indices, most_tokens, most_money, state FROM attempts WHERE id = ?", (attempt,)
        ).fetchone()
        key, account, indices, most_tokens, most_money, state = row
        return key, account, json.loads(indices), most_tokens, most_money, state

    def _unsettled(self, key: str, indices: set[int]) -> int:
        """How many of these samples an earlier attempt may have bought unseen. Raises Busy for one under way."""
        rows = self.connection.execute(
            "SELECT session, state, batch, indices FROM attempts WHERE key = ? AND state IN ('open', 'unknown')", (key,)
        )
        again: set[int] = set()
        for session, state, batch, text in rows.fetchall():
            shared = indices.intersection(json.loads(text))
            if shared and state == "open":
                if session == self.session or lives(self.path, session):
                    raise Busy
                if batch:
                    raise Left
            again |= shared
        return len(again)

    def _add(self, account: str, money: float, tokens: int, calls: int) -> None:
        self.connection.execute(
            "INSERT INTO accounts VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET"
            " money = money + excluded.money, tokens = tokens + excluded.tokens, calls = calls + excluded.calls",
            (account, money, tokens, calls),
        )
