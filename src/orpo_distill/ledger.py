"""The ledger: every sample ever bought from an API, and every attempt to buy one, in one SQLite file.

It stands outside the run folders and is shared by runs, also at the same time. Before a request leaves, its *attempt*
is committed with the most that it may cost; the reply's usage settles it. An attempt that is never settled (connection
cut, process killed, usage unreadable) may have been paid for: it counts at its maximum against the budget.
What a reply brings is committed choice by choice, as it came, before anything reads its text.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from orpo_distill.errors import OrpoDistillError, RunError
from orpo_distill.records import stable_hash

T = TypeVar("T")
Operation = Callable[["Ledger"], T]
"""A piece of work inside a transaction. It must check before it writes: what it raises undoes nothing."""

APPLICATION = 0x0D157111  # SQLite's `application_id`: says whose file it is
VERSION = 1  # SQLite's `user_version`
PATIENCE = 60.0  # seconds to wait for another process's transaction

SCHEMA = """
CREATE TABLE asked (                -- what a key stands for
    key TEXT PRIMARY KEY, endpoint TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE attempts (             -- one a request that left, or was about to
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, account TEXT NOT NULL, session TEXT NOT NULL, started REAL NOT NULL,
    ended REAL, indices TEXT NOT NULL, state TEXT NOT NULL, again INTEGER NOT NULL, batch TEXT,
    most_tokens INTEGER NOT NULL, most_money REAL NOT NULL, prompt INTEGER NOT NULL DEFAULT 0,
    cached_prompt INTEGER NOT NULL DEFAULT 0, completion INTEGER NOT NULL DEFAULT 0,
    reasoning INTEGER NOT NULL DEFAULT 0, money REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT ''
);
CREATE INDEX attempts_of_key ON attempts (key) WHERE state IN ('open', 'unknown');
CREATE INDEX attempts_of_batch ON attempts (batch) WHERE batch IS NOT NULL AND state = 'open';
CREATE TABLE batches (              -- attempts that left together; `remote` is the server's name for them
    batch TEXT PRIMARY KEY, endpoint TEXT NOT NULL, remote TEXT
) WITHOUT ROWID;
CREATE TABLE samples (
    key TEXT NOT NULL, sample_index INTEGER NOT NULL, attempt INTEGER NOT NULL REFERENCES attempts (id),
    received REAL NOT NULL, completion_tokens INTEGER, choice TEXT NOT NULL, PRIMARY KEY (key, sample_index)
) WITHOUT ROWID;
CREATE TABLE accounts (             -- what the attempts of an account add up to, unsettled ones at their maximum
    account TEXT PRIMARY KEY, money REAL NOT NULL, tokens INTEGER NOT NULL, calls INTEGER NOT NULL
) WITHOUT ROWID;
"""


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


@dataclass(frozen=True, slots=True)
class Bought:
    """A sample: a choice of a reply as it came (JSON), and its share of the tokens that the reply was billed."""

    choice: str
    prompt_tokens: int | None
    completion_tokens: int | None


class BudgetReached(OrpoDistillError, RuntimeError):
    """The next request could exceed the budget. `spent` and `most` are what there is and what it may cost."""

    def __init__(self, limit: str, spent: Spent, most: Spent) -> None:
        self.limit, self.spent, self.most = limit, spent, most
        super().__init__(f"the budget of {limit} is reached")


class Busy(Exception):
    """One of the samples has just been bought, or a request for it is under way, here or in another live process."""


class Ledger:
    """An open ledger. One thread at a time may use it; `transaction` is the only way to write."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.resolve()
        self.session = uuid.uuid4().hex
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                _prepare(self.connection, path)
                self._sign = _sign_of_life(path, self.session)
            except BaseException:
                self.connection.close()
                raise

    def transaction(self, operations: Sequence[Operation[Any]]) -> list[Any]:
        """Do all of them in one transaction; what an operation gives, or the exception that it raises, in their order.

        They are durable when this returns. Raises RunError if the file cannot be written.
        """
        found: list[Any] = []
        with _explained(self.path):
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
            _life_of(self.path, self.session).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def begin(self, plan: Plan, account: str, budget: Mapping[str, float], batch: str | None = None) -> int:
        """Record an attempt before its request leaves; its id.

        `budget` maps money, tokens or calls to the most that the account may come to. Raises BudgetReached if this
        attempt could exceed it; Busy where one of the samples stands by now, or another attempt for it is under way.
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
            " most_money) VALUES (?, ?, ?, ?, ?, 'open', ?, ?, ?, ?)",
            (key, account, self.session, time.time(), json.dumps(plan.indices), earlier, batch, plan.most.tokens,
             plan.most.money),
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

    def open_batches(self, endpoint: str) -> dict[str, str | None]:
        """Batches that are not settled and no other live process waits for, and what the server calls them.

        None: not sent yet; "": sent, but the server has not said how it calls them.
        """
        rows = self.connection.execute(
            "SELECT DISTINCT batch, remote, session FROM batches JOIN attempts USING (batch) WHERE endpoint = ?"
            " AND state = 'open'",
            (endpoint,),
        ).fetchall()
        others = {batch for batch, _, session in rows if session != self.session and _lives(self.path, session)}
        return {batch: remote for batch, remote, _ in rows if batch not in others}

    def attempts_of(self, batch: str, state: str = "%") -> dict[int, tuple[int, int]]:
        """The attempts of a batch (in one state, or in any): for how many samples each is, and its most tokens."""
        rows = self.connection.execute(
            "SELECT id, indices, most_tokens FROM attempts WHERE batch = ? AND state LIKE ?", (batch, state)
        )
        return {attempt: (len(json.loads(indices)), most) for attempt, indices, most in rows}

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
            if shared and state == "open" and (batch or session == self.session or _lives(self.path, session)):
                raise Busy
            again |= shared
        return len(again)

    def _add(self, account: str, money: float, tokens: int, calls: int) -> None:
        self.connection.execute(
            "INSERT INTO accounts VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET"
            " money = money + excluded.money, tokens = tokens + excluded.tokens, calls = calls + excluded.calls",
            (account, money, tokens, calls),
        )


def default_path() -> Path:
    """`orpo-distill/ledger.sqlite` in the user's data folder."""
    if sys.platform == "darwin":
        home = Path.home() / "Library" / "Application Support"
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "orpo-distill" / "ledger.sqlite"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What goes wrong with the file becomes one message."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RunError(
            f"expected to keep the ledger of paid calls in {path}, found: {error}; make room or give it another place "
            "(--ledger PATH), then run the same command: what was bought is kept"
        ) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file; check the version of an old one. Raises RunError for what is no ledger of ours."""
    _check(connection, path)  # before anything is written
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Set the journal's mode. Where others do the same at the same time SQLite refuses at once instead of waiting."""
    patient_until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > patient_until:
                raise
        time.sleep(0.02)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and (application != APPLICATION or version != VERSION):
        found = f"one of version {version}" if application == APPLICATION else "another program's database"
        raise RunError(
            f"expected a ledger of version {VERSION} at {path}, found {found}; use the orpo-distill that wrote it, or "
            "another file (--ledger PATH)"
        )


def _life_of(path: Path, session: str) -> Path:
    return path.with_name(f"{path.name}-sessions") / session


def _sign_of_life(path: Path, session: str) -> IO[bytes]:
    """A file that is locked for as long as this process lives: the system unlocks it when the process is killed."""
    own = _life_of(path, session)
    own.parent.mkdir(exist_ok=True)
    for other in own.parent.glob("[!.]*"):  # removes what the dead left
        _lives(path, other.name)
    made = own.with_name(f".{session}")
    file = made.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(own)  # locked before anybody can look
    return file


def _lives(path: Path, session: str) -> bool:
    """Whether the process of another session still runs."""
    sign = _life_of(path, session)
    try:
        with sign.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    sign.unlink(missing_ok=True)
    return False
