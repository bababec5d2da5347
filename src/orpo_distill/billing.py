"""What paid calls have cost, and what they will: the ledger's summary and export, and the forecast of `check`."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Literal

from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, RunError, missing_extra
from orpo_distill.ledger import Ledger, default_path
from orpo_distill.plan import plan
from orpo_distill.records import Problem, Trace, atomic_file, read_jsonl
from orpo_distill.runs import Stage
from orpo_distill.samplers import Request
from orpo_distill.samplers.asking import Asking
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.sampling import whole_lines, with_prefix
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.problems import ProblemsOptions
from orpo_distill.stages.problems import problems as make_problems
from orpo_distill.stages.sample import SampleOptions
from orpo_distill.tasks import take

Table = list[tuple[str, ...]]
What = Literal["samples", "attempts"]

SUMMARY = """
SELECT date(started, 'unixepoch') AS day, endpoint, model, count(*) AS calls, sum(coalesce(bought, 0)) AS samples,
    sum(prompt) AS prompt, sum(cached_prompt) AS cached, sum(completion) AS completion, sum(reasoning) AS reasoning,
    sum(money) AS money, sum(state IN ('open', 'unknown')) AS unknown,
    sum(CASE WHEN state IN ('open', 'unknown') THEN most_money ELSE 0 END) AS unknown_money,
    sum(CASE WHEN state = 'void' THEN 0 ELSE again END) AS again
FROM attempts JOIN asked USING (key)
LEFT JOIN (SELECT attempt, count(*) AS bought FROM samples GROUP BY attempt) ON attempt = attempts.id
GROUP BY day, endpoint, model ORDER BY day, endpoint, model
"""
ROWS: dict[What, str] = {
    "samples": "SELECT endpoint, model, request, samples.key, sample_index, choice, completion_tokens, attempt,"
    " received FROM samples JOIN asked USING (key) ORDER BY attempt, sample_index",
    "attempts": "SELECT attempts.*, endpoint, model FROM attempts JOIN asked USING (key) ORDER BY id",
}
LETTERS_A_TOKEN = 3  # bytes; ordinary text has more, so that counts made with it are bounds


def ledger_table(path: Path | None) -> Table:
    """Calls, samples, tokens and money by day and model. Raises RunError if there is no ledger.

    `unknown` calls may have been paid for and came to nothing or to an unreadable bill: their money is the most they
    can have cost. `again` counts samples asked for once more after such a call: the only ones that may be paid twice.
    """
    with _opened(path) as ledger:
        rows = ledger.connection.execute(SUMMARY).fetchall()
        names = [column[0] for column in ledger.connection.execute(SUMMARY).description]
    shown = [tuple(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row) for row in rows]
    return [tuple(name.replace("_", " ") for name in names), *shown]


def export_ledger(path: Path | None, out: Path, what: What) -> int:
    """Write all samples or attempts to a .jsonl or .parquet file; how many. Raises RunError or ConfigError."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"expected a file that ends in .jsonl or .parquet, found {out}")
    with _opened(path) as ledger:
        ledger.connection.row_factory = sqlite3.Row
        rows = map(dict, ledger.connection.execute(ROWS[what]))
        return _write_lines(rows, out) if out.suffix == ".jsonl" else _write_parquet(rows, out)


@contextmanager
def _opened(path: Path | None) -> Iterator[Ledger]:
    path = (path or default_path()).expanduser()
    if not path.is_file():
        raise RunError(f"expected a ledger at {path}, found none; name it with --ledger PATH")
    with Ledger(path) as ledger:
        yield ledger


def _write_lines(rows: Iterator[dict[str, Any]], out: Path) -> int:
    count = 0
    with atomic_file(out) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], out: Path) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "hub") from error
    table = pyarrow.Table.from_pylist(list(rows))
    with atomic_file(out) as file:
        parquet.write_table(table, file)
    return int(table.num_rows)


def forecast(config: Config) -> Table:
    """What stages that pay for their samples will come to, a line for each kind of cost; empty if none does."""
    lines: Table = []
    for stage in plan(config):
        if isinstance(stage.options, SampleOptions | EvaluateOptions) and isinstance(stage.options.sampler, OpenAI):
            lines += _of_stage(config, stage, stage.options, stage.options.sampler)
    return [("bill", "expected", "at most"), *lines] if lines else []


def _of_stage(config: Config, stage: Stage, options: SampleOptions | EvaluateOptions, sampler: OpenAI) -> Table:
    samples = _most_samples(options) if isinstance(options, SampleOptions) else 1
    problems = _problems(config, options)
    if not problems:
        return [(f"{stage.name}: not known yet", "", "run --until problems, or --pilot N, then check again")]
    requests = [
        Request(problem.id, index, with_prefix(options.task.messages(problem), options.prefix), 0)
        for problem in problems
        for index in range(samples)
    ]
    asking = Asking(sampler, options.model or "", options.decoding)
    tokens = _counter(sampler.tokenizer)
    bought = calls = prompt = 0
    with _maybe(sampler.ledger_path) as ledger:
        for ask in asking.asks(requests):
            stands = ledger.samples(ask.asked.key).keys() & ask.requests.keys() if ledger else set()
            missing = len(ask.requests) - len(stands)
            bought += len(stands)
            times = min(missing, 1) if sampler.n else missing
            calls += times
            prompt += times * tokens(json.dumps(ask.body.get("messages", ask.body.get("prompt")), ensure_ascii=False))
    missing = len(requests) - bought
    most = missing * options.decoding.max_new_tokens
    mean = _measured(config.run_dir / stage.name)
    expected = [f"{missing * end:.0f}" for end in mean] if mean else []
    bound = "" if sampler.tokenizer else f" (bytes / {LETTERS_A_TOKEN}: a bound)"
    lines: Table = [
        (f"{stage.name}: samples", f"{missing} of {len(requests)} ({bought} bought already)", f"{calls} calls"),
        (f"{stage.name}: prompt tokens", "", f"{prompt}{bound}"),
        (f"{stage.name}: completion tokens", " to ".join(expected) or "not measured: run --pilot N", str(most)),
    ]
    if sampler.price.most(1, 1):
        spans = [f"{sampler.most(prompt, ceil(missing * end)).money:.4f}" for end in mean] if mean else []
        lines.append((f"{stage.name}: money", " to ".join(spans), f"{sampler.most(prompt, most).money:.4f}"))
    for limit, value in sampler.budget.limits.items():
        lines.append((f"{stage.name}: budget", "", f"{value:g} {limit}"))
    return lines


def _most_samples(options: SampleOptions) -> int:
    return options.stopping.most if options.stopping else options.samples


def _problems(config: Config, options: SampleOptions | EvaluateOptions) -> Sequence[Problem]:
    """What a stage will ask: of a local data set, or of the run's `problems` stage; empty where neither is there."""
    name = "test.jsonl" if isinstance(options, EvaluateOptions) else "problems.jsonl"
    limit = config.evaluate.limit if isinstance(options, EvaluateOptions) else None
    with tempfile.TemporaryDirectory() as folder:
        made = config.run_dir / "problems"
        if getattr(config.task, "path", None) is not None:
            made = Path(folder)
            make_problems(ProblemsOptions(task=config.task, problems=config.problems), {}, made)
        found = list(read_jsonl(made / name, Problem)) if (made / name).exists() else []
    return take(found, limit, config.problems.seed)


def _measured(folder: Path) -> tuple[float, float] | None:
    """The mean completion tokens of a stage's traces so far: an interval of 95% (normal approximation)."""
    counts = [trace.completion_tokens for trace in _traces(folder) if trace.completion_tokens is not None]
    if len(counts) < 2:
        return None
    mean = sum(counts) / len(counts)
    half = 1.96 * sqrt(sum((count - mean) ** 2 for count in counts) / (len(counts) - 1) / len(counts))
    return max(0.0, mean - half), mean + half


def _traces(folder: Path) -> Iterator[Trace]:
    for path in sorted(folder.glob("traces*.jsonl")):
        yield from (trace for trace, _ in whole_lines(path))


def _counter(tokenizer: str) -> Any:
    """How many tokens a text has, by the tokenizer or by its bytes."""
    if not tokenizer:
        return lambda text: ceil(len(text.encode(errors="replace")) / LETTERS_A_TOKEN)
    from orpo_distill.models import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


@contextmanager
def _maybe(path: Path) -> Iterator[Ledger | None]:
    if not path.is_file():
        yield None
        return
    with Ledger(path) as ledger:
        yield ledger
