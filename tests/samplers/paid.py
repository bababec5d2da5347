"""Real runs that buy teacher texts from the faulty server, and what they leave: ledger, traces, server log."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import orpo_distill
from orpo_distill.records import Message, Trace, derive_seed, read_jsonl
from orpo_distill.sampling import prompt_id_of
from tests.servers import FaultyServer
from tests.servers.answers import messages_hash

COMMAND = [sys.executable, "-c", "from orpo_distill.cli import main; main()"]
STUDENT = Path(orpo_distill.__file__).parent / "quickstart" / "student"  # never loaded: the runs end before
PRICE = {"prompt": 1.0, "completion": 10.0}
COLUMNS = "id, key, account, started, ended, indices, state, again, most_tokens, most_money, prompt, completion, money"


def experiment(
    folder: Path, server: FaultyServer, problems: int, samples: int, name: str = "demo", **sampler: Any
) -> Path:
    """The config of a run with so many train problems and teacher samples of each; `sampler` are the teacher's.

    The run "backwards" has the same problems in reverse order.
    """
    data = folder / "data" / name
    data.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(problems)), ("test", range(problems, problems + 2))):
        rows = [{"id": f"p{i}", "question": f"What is {i} + {i % 7}?", "answer": str(i + i % 7)} for i in numbers]
        ordered = reversed(rows) if name == "backwards" else rows
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
    options = {"type": "openai", "base_url": server.base_url, "price": PRICE, "ledger": str(folder / "ledger.sqlite")}
    config = {
        "name": name,
        "task": {"type": "jsonl", "path": str(data), "verifier": "number", "prompt": "{question}"},
        "teacher": {
            "model": "faulty",
            "samples": samples,
            "decoding": {"max_new_tokens": 100},
            "sampler": options | sampler,
        },
        "student": {"model": str(STUDENT)},
        "runs": str(folder / "runs"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """Run up to the teacher's texts, in a process of its own."""
    command = [*COMMAND, "run", str(config), "--until", "teacher", *overrides]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str]:
    """Exit code and words of a process."""
    try:
        _, words = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, words


def kill_at(process: subprocess.Popen[str], server: FaultyServer, requests: int, draw: random.Random) -> None:
    """`kill -9` up to 0.1 s after the server has got so many requests in all."""
    while server.stats()["requests"] < requests:
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


@dataclass(frozen=True)
class Attempt:
    """A row of the ledger's table, with its indices as numbers."""

    id: int
    key: str
    account: str
    started: float
    ended: float | None
    indices: tuple[int, ...]
    state: str
    again: int
    most_tokens: int
    most_money: float
    prompt: int
    completion: int
    money: float

    @property
    def perhaps_paid(self) -> bool:
        """Whether it may have bought something unseen; what a killed process left open may have, too."""
        return self.state in ("open", "unknown")


class Books:
    """A ledger's tables, read with nothing but SQLite."""

    def __init__(self, folder: Path) -> None:
        with closing(sqlite3.connect(folder / "ledger.sqlite")) as file:
            rows = file.execute(f"SELECT {COLUMNS} FROM attempts ORDER BY id").fetchall()
            samples = file.execute("SELECT key, sample_index, attempt, choice FROM samples").fetchall()
            asked = file.execute("SELECT key, request FROM asked").fetchall()
            accounts = file.execute("SELECT account, money, tokens, calls FROM accounts").fetchall()
        self.attempts = [Attempt(*row[:5], tuple(json.loads(row[5])), *row[6:]) for row in rows]
        self.texts = {(key, index): text_of(choice) for key, index, _, choice in samples}
        self.of_attempt: dict[int, dict[int, str]] = defaultdict(dict)
        for key, index, attempt, _ in samples:
            self.of_attempt[attempt][index] = self.texts[key, index]
        self.messages = {key: json.loads(request)["messages"] for key, request in asked}
        self.spent = {account: (money, tokens, calls) for account, money, tokens, calls in accounts}

    def settled(self) -> list[Attempt]:
        """What was paid for and is known."""
        return [attempt for attempt in self.attempts if attempt.state == "settled"]

    def unknown(self) -> list[Attempt]:
        """What may have been paid for."""
        return [attempt for attempt in self.attempts if attempt.perhaps_paid]

    def key_of_prompt(self) -> dict[str, str]:
        """The ledger's key of a trace's `prompt_id`."""
        return {
            prompt_id_of(tuple(Message(one["role"], one["content"]) for one in messages)): key
            for key, messages in self.messages.items()
        }


def text_of(choice: str) -> str:
    """The text of a choice as the server gives it."""
    content: str = json.loads(choice)["message"]["content"]
    return content


def traces(folder: Path, name: str = "demo") -> list[Trace]:
    """The finished traces of a run."""
    return list(read_jsonl(folder / "runs" / name / "teacher" / "traces.jsonl", Trace))


def matched(books: Books, log: Iterable[dict[str, Any]], problems: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The line of the server's log that belongs to an attempt. Every line belongs to one, no two to the same.

    A request for one sample is known by its seed, one for several by its prompt: of the attempts for it, which do not
    overlap, it is the last that had begun when the server had its texts.
    """
    seeds = {derive_seed(0, "teacher", name, index) % (1 << 31): index for name in problems for index in range(100)}
    hashes = {messages_hash(messages): key for key, messages in books.messages.items()}
    candidates: dict[tuple[str, tuple[int, ...] | int], list[Attempt]] = defaultdict(list)
    for attempt in books.attempts:
        several = len(attempt.indices) > 1
        candidates[attempt.key, len(attempt.indices) if several else attempt.indices].append(attempt)
    found: dict[int, dict[str, Any]] = {}
    for line in log:
        indices = line["n"] if line["n"] > 1 else (seeds[line["seed"]],)
        begun = [one for one in candidates[hashes[line["messages"]], indices] if one.started <= line["time"]]
        assert begun, f"a request that the ledger does not know: {line}"
        assert begun[-1].id not in found, f"two requests for one attempt: {line} and {found[begun[-1].id]}"
        found[begun[-1].id] = line
    return found


def audit(folder: Path, log: Sequence[dict[str, Any]], problems: Sequence[str]) -> Books:
    """Hold the ledger against the server's log, attempt by attempt.

    - every request that the server got was an attempt before it left;
    - a settled one has the usage and the texts of its reply; what the server refused costs nothing; any other one, the
      open ones of killed processes among them, costs no more than its maximum;
    - a sample is asked for again only where no attempt before brought it, and `again` counts those samples that an
      earlier, unsettled attempt may have bought: so nothing is served twice but after such an attempt;
    - an account is the sum of its attempts, the unsettled at their maximum.
    """
    books = Books(folder)
    lines = matched(books, log, problems)
    for attempt in books.attempts:
        check_attempt(attempt, lines.get(attempt.id), books.of_attempt.get(attempt.id, {}))
    check_again(books, lines)
    for account, (money, tokens, calls) in books.spent.items():
        mine = [one for one in books.attempts if one.account == account and one.state != "void"]
        assert calls == len(mine)
        assert tokens == sum(one.most_tokens if one.perhaps_paid else one.prompt + one.completion for one in mine)
        assert abs(money - sum(one.most_money if one.perhaps_paid else one.money for one in mine)) < 1e-9
    check_sums(books, log)
    return books


def check_attempt(attempt: Attempt, line: dict[str, Any] | None, texts: dict[int, str]) -> None:
    """One attempt against the server's line about it; None: the request never came."""
    served = line["prompt_tokens"] + line["completion_tokens"] if line else 0
    money = (attempt.prompt * PRICE["prompt"] + attempt.completion * PRICE["completion"]) / 1e6
    if attempt.state == "settled":
        assert line
        usage = line["usage"]
        assert (attempt.prompt, attempt.completion) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert abs(attempt.money - money) < 1e-12
        assert [texts[index] for index in attempt.indices[: len(texts)]] == line["texts"]
    elif attempt.perhaps_paid:
        assert served <= attempt.most_tokens
        assert not texts or [texts[index] for index in attempt.indices[: len(texts)]] == (line or {})["texts"]
        assert (attempt.prompt, attempt.completion, attempt.money) == (0, 0, 0)
    else:
        assert attempt.state == "void"
        assert (served, texts) == (0, {})


def check_again(books: Books, lines: dict[int, dict[str, Any]]) -> None:
    """What stands is not asked for again; what is served twice came from an unsettled attempt before."""
    standing: dict[str, set[int]] = defaultdict(set)
    unsettled: dict[str, set[int]] = defaultdict(set)
    served: dict[str, set[int]] = defaultdict(set)
    for attempt in books.attempts:
        asked = set(attempt.indices)
        assert not asked & standing[attempt.key], f"bought already: {attempt}"
        assert attempt.again == len(asked & unsettled[attempt.key]), attempt
        texts = lines[attempt.id]["texts"] if attempt.id in lines else ()
        now = set(attempt.indices[: len(texts)])
        assert now & served[attempt.key] <= unsettled[attempt.key], f"served twice: {attempt}"
        served[attempt.key] |= now
        standing[attempt.key] |= books.of_attempt.get(attempt.id, {}).keys()
        if attempt.perhaps_paid:
            unsettled[attempt.key] |= asked


def check_sums(books: Books, log: Sequence[dict[str, Any]]) -> None:
    """settled <= served <= settled + maxima of the unsettled, in tokens.

    Two kinds of wrong usage cannot be told from right ones: what they leave out, nobody can know, and is set apart.
    """
    settled = sum(attempt.prompt + attempt.completion for attempt in books.settled())
    unknown = sum(attempt.most_tokens for attempt in books.unknown())
    served = sum(line["prompt_tokens"] + line["completion_tokens"] for line in log)
    hidden = sum(
        line["completion_tokens"] - line["usage"]["completion_tokens"]
        for line in log
        if line["fault"] in ("wrong_usage:low", "wrong_usage:first")
    )
    assert settled <= served - hidden <= settled + unknown


def check_traces(books: Books, found: Sequence[Trace], problems: int, samples: int) -> None:
    """Every sample has one trace, with the text that the ledger holds for it, and the ledger holds no other."""
    names = [(trace.problem_id, trace.sample_index) for trace in found]
    assert sorted(names) == sorted((f"p{number}", index) for number in range(problems) for index in range(samples))
    keys = books.key_of_prompt()
    assert {(keys[trace.prompt_id], trace.sample_index): trace.text for trace in found} == books.texts
    assert {trace.error for trace in found} == {""}
