"""The ledger's file: its tables and versions, how it is opened, and which of the processes that opened it live."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote

from orpo_distill.errors import RunError

APPLICATION = 0x0D157111  # SQLite's `application_id`: says whose file it is
VERSION = 2  # SQLite's `user_version`
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
    reasoning INTEGER NOT NULL DEFAULT 0, money REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    price TEXT NOT NULL DEFAULT ''  -- at which it left, as JSON; '' in rows of version 1
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
MIGRATIONS = {1: "ALTER TABLE attempts ADD COLUMN price TEXT NOT NULL DEFAULT ''"}  # from a version to the next

BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
NO_ROOM_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
KEPT = "then run the same command: what was bought is kept"


class LedgerTrouble(RunError):
    """The ledger's file cannot be read or written. `busy`: because another process is writing."""

    def __init__(self, path: Path, error: sqlite3.Error | OSError) -> None:
        code = _code(error)
        self.busy = code in BUSY
        super().__init__(f"expected to keep the ledger of paid calls in {path}, found: {error}; {_advice(code, error)}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What goes wrong with the file becomes one message, a LedgerTrouble."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LedgerTrouble(path, error) from error


def _code(error: sqlite3.Error | OSError) -> int:
    """SQLite's primary code of an error, 0 for one of the system's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _advice(code: int, error: Exception) -> str:
    """What to do about it."""
    if code in BUSY:
        return f"another process keeps it locked: wait for it or stop it, {KEPT}"
    if code == sqlite3.SQLITE_NOTADB:
        return "this is no ledger and stays as it is: name another file (--ledger PATH)"
    if code == sqlite3.SQLITE_CORRUPT:
        return "the file is damaged: put a copy of it in its place, or begin another one (--ledger PATH)"
    if code in NO_ROOM or getattr(error, "errno", None) in NO_ROOM_ERRNO:
        return f"make room or give it another place (--ledger PATH), {KEPT}"
    return f"see to the path and who may write there, or give it another place (--ledger PATH), {KEPT}"


def default_path() -> Path:
    """`orpo-distill/ledger.sqlite` in the user's data folder."""
    if sys.platform == "darwin":
        home = Path.home() / "Library" / "Application Support"
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "orpo-distill" / "ledger.sqlite"


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """Open the file for writing: makes a new one, brings an old one up to date. Raises RunError for no ledger of ours.

    `patience`: seconds that a transaction waits for another process's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        _check(connection, path)  # before anything is written
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        _bring_up_to_date(connection)
        connection.execute("COMMIT")
        connection.execute(f"PRAGMA busy_timeout = {patience * 1000:.0f}")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open the file for reading alone: waits for nobody, and nobody waits. Raises RunError for no ledger of ours."""
    uri = f"file:{quote(str(path))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE)
    try:
        try:
            _check(connection, path)
        except sqlite3.OperationalError:
            if path.with_name(path.name + "-wal").exists():
                raise
            connection.close()  # in a folder that cannot be written, where nobody else writes
            connection = sqlite3.connect(f"{uri}&immutable=1", uri=True)
            _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file, or what an older version lacks. Inside a transaction."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not tables:
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
    else:
        for number in range(version, VERSION):
            connection.execute(MIGRATIONS[number])
    if version != VERSION:
        connection.execute(f"PRAGMA user_version = {VERSION}")


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
    if tables and (application != APPLICATION or not 1 <= version <= VERSION):
        found = f"one of version {version}" if application == APPLICATION else "another program's database"
        raise RunError(
            f"expected a ledger of version {VERSION} at {path}, found {found}; use the orpo-distill that wrote it, or "
            "another file (--ledger PATH)"
        )


def life_of(path: Path, session: str) -> Path:
    """The file that says whether the process of a session lives."""
    return path.with_name(f"{path.name}-sessions") / session


def sign_of_life(path: Path, session: str) -> IO[bytes]:
    """A file that is locked for as long as this process lives: the system unlocks it when the process is killed."""
    own = life_of(path, session)
    own.parent.mkdir(exist_ok=True)
    for other in own.parent.glob("[!.]*"):  # removes what the dead left
        lives(path, other.name)
    made = own.with_name(f".{session}")
    file = made.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(own)  # locked before anybody can look
    return file


def lives(path: Path, session: str) -> bool:
    """Whether the process of another session still runs."""
    sign = life_of(path, session)
    try:
        with sign.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    sign.unlink(missing_ok=True)
    return False
