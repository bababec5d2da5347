"""What paid calls have cost, and what they will: the ledger's summary and export, and the forecast of `check`."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Literal

from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, missing_extra
from orpo_distill.execution import state
from orpo_distill.ledger import Books, Spent, reading
from orpo_distill.ledger_file import default_path
from orpo_distill.plan import plan
from orpo_distill.progress import say
from orpo_distill.records import Problem, Trace, atomic_file, read_jsonl
from orpo_distill.runs import RunFolder, Stage
from orpo_distill.samplers import Request
from orpo_distill.samplers.asking import ROOM, Asking
from orpo_distill.samplers.openai import OpenAI, amount
from orpo_distill.samplers.unsaved import waiting
from orpo_distill.sampling import Standing, prompt_id_of, whole_lines, with_prefix
from orpo_distill.stages.evaluate import EvaluateOptions
from orpo_distill.stages.judge import JudgeAnswersOptions, JudgePairsOptions
from orpo_distill.stages.problems import ProblemsOptions
from orpo_distill.stages.problems import problems as make_problems
from orpo_distill.stages.sample import SampleOptions, waves
from orpo_distill.stages.score import ScoreOptions
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
LETTERS_A_TOKEN = 3  # bytes: a guess. English has more, digits, code and other scripts may have fewer


@dataclass
class _Need:
    """What a stage asks for: its samples, those that need not be bought, and the requests for the others."""

    samples: int = 0
    standing: int = 0  # in the stage's folder, sampled or imported
    bought: int = 0  # in the ledger
    calls: int = 0
    prompt: int = 0  # tokens of all requests' prompts, by the tokenizer or by a guess
    most_prompt: int = 0  # at a token a byte, as the budget counts

    @property
    def missing(self) -> int:
        return self.samples - self.standing - self.bought


def nothing_bought(path: Path | None) -> str | None:
    """The words for a ledger that does not exist yet; None for one that does."""
    path = _path(path)
    if not path.exists():
        return f"nothing bought yet: there is no ledger at {path} (--ledger PATH names another)"
    with reading(path) as books:
        (attempts,) = books.connection.execute("SELECT count(*) FROM attempts").fetchone()
    return None if attempts else f"nothing bought yet with the ledger {path}"


def ledger_table(path: Path | None) -> Table:
    """Calls, samples, tokens and money by day and model. Raises RunError if there is no ledger.

    `unknown` calls may have been paid for and came to nothing or to an unreadable bill: their money is the most they
    can have cost. `again` counts samples asked for once more after such a call: the only ones that may be paid twice.
    """
    with reading(_path(path)) as books:
        found = books.connection.execute(SUMMARY)
        names, rows = [column[0] for column in found.description], found.fetchall()
    if held := waiting(_path(path)):
        say(f"  replies that could not be saved stand in {', '.join(map(str, held))}: the next run takes them in")
    shown = [tuple(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row) for row in rows]
    return [tuple(name.replace("_", " ") for name in names), *shown]


def export_ledger(path: Path | None, out: Path, what: What) -> int:
    """Write all samples or attempts to a .jsonl or .parquet file; how many. Raises RunError or ConfigError."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"expected a file that ends in .jsonl or .parquet, found {out}")
    with reading(_path(path)) as books:
        books.connection.row_factory = sqlite3.Row
        rows = map(dict, books.connection.execute(ROWS[what]))
        return _write_lines(rows, out) if out.suffix == ".jsonl" else _write_parquet(rows, out)


def _path(path: Path | None) -> Path:
    return (path or default_path()).expanduser()


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
    """What stages that pay for their samples will come to, a line for each kind of cost; empty if none does.

    `at most` counts as the budget does: prompts at a token a byte, completions at their limit. What is bought again
    after calls of unknown cost is in neither column.
    """
    lines: Table = []
    ahead: dict[tuple[str, str], list[float]] = {}  # account and limit -> expected and most, of the stages so far
    for stage in plan(config):
        options = stage.options
        if isinstance(options, SampleOptions | EvaluateOptions) and isinstance(options.sampler, OpenAI):
            lines += _of_stage(config, stage, options, options.sampler, ahead)
        elif isinstance(options, JudgePairsOptions) and isinstance(options.judge.sampler, OpenAI):
            lines += _of_judge(config, stage, options, options.judge.sampler, ahead)
        elif isinstance(options, ScoreOptions) and options.server and isinstance(options.server.sampler, OpenAI):
            lines += _of_scores(config, stage, options, options.server.sampler, ahead)
    return [("bill", "expected", "at most"), *lines] if lines else []


def _of_stage(
    config: Config,
    stage: Stage,
    options: SampleOptions | EvaluateOptions,
    sampler: OpenAI,
    ahead: dict[tuple[str, str], list[float]],
) -> Table:
    problems = _problems(config, options)
    if not problems:
        return [(f"{stage.name}: not known yet", "", "run --until problems, or --pilot N, then check again")]
    need, name = _need(config, stage, options, sampler, problems), stage.name
    how = "tokenizer" if sampler.tokenizer else f"bytes / {LETTERS_A_TOKEN}, a guess"
    folder, length = config.run_dir / name, options.decoding.max_new_tokens
    return _lines(name, sampler, need, _Lengths(length, _measured(folder), how), ahead)


def _of_judge(
    config: Config,
    stage: Stage,
    options: JudgePairsOptions,
    sampler: OpenAI,
    ahead: dict[tuple[str, str], list[float]],
) -> Table:
    """At most: which texts are compared, and how long they are, is only known once they are written."""
    judge, run, finished = options.judge, RunFolder(config.run_dir), _finished(config, stage)
    questions = _compared(config, options, finished)
    if not questions and not finished:
        return [(f"{stage.name}: not known yet", "", "run --until problems, then check again")]
    answers = sum(1 for _ in _traces(run.of(stage.name)))
    new = 2 * len(questions) if finished else max(0, 2 * len(questions) - answers)
    texts = config.teacher.decoding.max_new_tokens + config.student.decoding.max_new_tokens
    if isinstance(options, JudgeAnswersOptions):
        texts = 2 * config.evaluate.decoding.max_new_tokens
    longest = max((len(judge.asks(question, "", "").encode()) for question in questions), default=0)
    need = _Need(answers + new, answers, calls=new)
    need.prompt = new * (ceil(longest / LETTERS_A_TOKEN) + texts)
    need.most_prompt = new * (longest + sum(ROOM) + texts)
    how = ("texts at their limits, a guess", "texts at their limits")
    lengths = _Lengths(judge.decoding.max_new_tokens, _measured(run.of(stage.name)), *how)
    return _lines(stage.name, sampler, need, lengths, ahead)


def _of_scores(
    config: Config, stage: Stage, options: ScoreOptions, sampler: OpenAI, ahead: dict[tuple[str, str], list[float]]
) -> Table:
    """At most, for which texts are paired and how many are new in a round is only known once they are."""
    problems, finished, name = _problems(config, options), _finished(config, stage), stage.name
    if not problems:
        return [(f"{name}: not known yet", "", "run --until problems, then check again")]
    texts = 0 if finished else 2 * config.pairs.per_problem * len(problems)
    prompts = (with_prefix(config.task.messages(problem), options.prefix) for problem in problems)
    longest = max(ROOM[0] + sum(len(one.content.encode()) + ROOM[1] for one in prompt) for prompt in prompts)
    text = max(config.teacher.decoding.max_new_tokens, config.student.decoding.max_new_tokens)
    prompt = texts * (longest + text)
    most = replace(sampler.most(prompt, texts), calls=texts)
    lines: Table = [
        (f"{name}: calls", "one for each new text of the pairs", f"{texts}"),
        (f"{name}: prompt tokens", "", f"{prompt} (texts at their limits)"),
    ]
    if sampler.price.most(1, 1):
        lines.append((f"{name}: money", "", f"{most.money:.4f}"))
    return lines + _budget(name, sampler, Spent(), most, ahead)


def _compared(config: Config, options: JudgePairsOptions, finished: bool) -> list[str]:
    """The question of every comparison that there may be, but for those that a finished stage has made."""
    if not isinstance(options, JudgeAnswersOptions):
        done = _been_through(config, "problems.jsonl") if finished else set()
        asked = _problems_in(config, "problems.jsonl", None)
        return [one.question for one in asked if one.id not in done] * config.pairs.per_problem
    if finished:
        return []
    test = _problems_in(config, "test.jsonl", config.evaluate.limit) if config.evaluate.test else []
    validation = _problems_in(config, "validation.jsonl", config.evaluate.validation_limit)
    questions = [one.question for one in test] * len(options.against)
    return questions + [one.question for one in validation if "student-0" in options.against]


@dataclass(frozen=True)
class _Lengths:
    """Tokens of an answer: at most, and as measured so far; and how the prompt's are known."""

    most: int
    measured: tuple[float, float] | None
    prompt: str
    most_prompt: str = "bytes"


def _lines(
    name: str, sampler: OpenAI, need: _Need, lengths: _Lengths, ahead: dict[tuple[str, str], list[float]]
) -> Table:
    """A line for each kind of cost of what a stage needs."""
    most = need.missing * lengths.most
    mean = lengths.measured if need.missing else (0.0, 0.0)
    likely = [ceil(need.missing * end) for end in mean] if mean else []
    there = f"{need.standing} in the run, {need.bought} in the ledger"
    lines: Table = [
        (f"{name}: samples", f"{need.missing} of {need.samples} ({there})", f"{need.calls} calls"),
        (f"{name}: prompt tokens", f"{need.prompt} ({lengths.prompt})", f"{need.most_prompt} ({lengths.most_prompt})"),
        (f"{name}: completion tokens", " to ".join(map(str, likely)) or "not measured: run --pilot N", str(most)),
    ]
    if sampler.price.most(1, 1):
        spans = [f"{sampler.most(need.prompt, end).money:.4f}" for end in likely]
        lines.append((f"{name}: money", " to ".join(spans), f"{sampler.most(need.most_prompt, most).money:.4f}"))
    expected = replace(sampler.most(need.prompt, likely[-1]) if likely else Spent(), calls=need.calls)
    at_most = replace(sampler.most(need.most_prompt, most), calls=need.calls)
    return lines + _budget(name, sampler, expected, at_most, ahead)


def _budget(
    name: str, sampler: OpenAI, expected: Spent, most: Spent, ahead: dict[tuple[str, str], list[float]]
) -> Table:
    """A line for each limit: what is used up of it, and whether it will do for this stage and those before."""
    with _maybe(sampler.ledger_path) as books:
        spent = books.spent(sampler.account) if books else Spent()
    lines: Table = []
    for limit, value in sampler.budget.limits.items():
        so_far = ahead.setdefault((sampler.account, limit), [0.0, 0.0])
        for place, part in enumerate((expected, most)):
            so_far[place] += getattr(part, limit)
        left = value - getattr(spent, limit)
        verdict = "enough"
        if so_far[0] > left:
            verdict = "WARNING: not enough, the stage will stop before its end"
        elif so_far[1] > left:
            verdict = "may be reached: then the stage stops before its end"
        lines.append((f"{name}: budget", verdict, f"{amount(value)} {limit}, {amount(getattr(spent, limit))} used up"))
    return lines


def _need(
    config: Config,
    stage: Stage,
    options: SampleOptions | EvaluateOptions,
    sampler: OpenAI,
    problems: Sequence[Problem],
) -> _Need:
    """What the stage has and lacks: wave by wave, for each has its own temperature and with it other samples."""
    need, tokens, standing = _Need(), _counter(sampler.tokenizer), Standing(config.run_dir / stage.name)
    name = "test.jsonl" if isinstance(options, EvaluateOptions) else "problems.jsonl"
    done = _been_through(config, name) if _finished(config, stage) else set()

    def lacks(one: Request) -> bool:
        key = one.problem_id, one.sample_index, prompt_id_of(one.messages)
        return one.problem_id not in done and standing.lacks(key, failed=True)

    prompts = [(problem.id, with_prefix(options.task.messages(problem), options.prefix)) for problem in problems]
    waved = list(waves(options)) if isinstance(options, SampleOptions) else [(range(1), options.decoding)]
    with _maybe(sampler.ledger_path) as books:
        for indices, decoding in waved:
            requests = [Request(name, index, messages, 0) for name, messages in prompts for index in indices]
            for ask in Asking(sampler, options.model or "", decoding).asks(requests):
                need.samples += len(ask.requests)
                lacking = [index for index, one in ask.requests.items() if lacks(one)]
                need.standing += len(ask.requests) - len(lacking)
                bought = books.samples(ask.asked.key).keys() if books and lacking else ()
                missing = [index for index in lacking if index not in bought]
                need.bought += len(lacking) - len(missing)
                times = min(len(missing), 1) if sampler.n else len(missing)
                need.calls += times
                text = json.dumps(ask.body.get("messages", ask.body.get("prompt")), ensure_ascii=False)
                need.prompt += times * tokens(text) if times else 0
                need.most_prompt += times * ask.most_prompt
    return need


def _finished(config: Config, stage: Stage) -> bool:
    run = RunFolder(config.run_dir)
    return run.asked(stage.name) is not None and state(stage, run) == "finished"


def _been_through(config: Config, name: str) -> set[str]:
    """The problems that a finished stage has no more to do for: of a pilot, these are not all."""
    return {one.id for one in read_jsonl(config.run_dir / "problems" / name, Problem)}


def _problems(config: Config, options: SampleOptions | EvaluateOptions | ScoreOptions) -> Sequence[Problem]:
    """What a stage will ask: of a local data set, or of the run's `problems` stage; empty where neither is there."""
    if isinstance(options, EvaluateOptions):
        return _problems_in(config, "test.jsonl", config.evaluate.limit)
    return _problems_in(config, "problems.jsonl", None)


def _problems_in(config: Config, name: str, limit: int | None) -> Sequence[Problem]:
    """The problems of a file of the stage `problems`."""
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
def _maybe(path: Path) -> Iterator[Books | None]:
    if not path.is_file():
        yield None
        return
    with reading(path) as books:
        yield books
