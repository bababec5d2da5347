"""Export: a run's pairs in the formats of other trainers, and requests for the teacher's texts that are missing.

    trl              prompt, chosen, rejected as text; the prompt as a model without a chat template reads it
    trl-messages     the same as lists of messages; TRL applies the model's own chat template
    llama-factory    preference data of LLaMA-Factory in its sharegpt format, with its entry for dataset_info.json
    ms-swift         messages that end in the chosen answer, and rejected_response
    parquet          every field of `Pair`
    batch            requests of OpenAI's batch API; `import` reads what comes back

Rows that only teach their chosen side (objective `sft`) come out in each format's form for fine-tuning.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, DataError, RunError, missing_extra
from orpo_distill.execution import state
from orpo_distill.ledger import reading
from orpo_distill.loading import load_config
from orpo_distill.plan import plan
from orpo_distill.records import Message, Pair, Problem, atomic_file, read_jsonl
from orpo_distill.runs import RunFolder, disk_errors_explained
from orpo_distill.samplers.asking import Asking
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.samplers.prompts import plain_prompt
from orpo_distill.sampling import Standing, prompt_id_of, with_prefix
from orpo_distill.stages.sample import SampleOptions, waves

Format = Literal["trl", "trl-messages", "llama-factory", "ms-swift", "parquet", "batch"]
Row = dict[str, Any]

MOST_CHOICES = 128  # texts that one request may ask for
PARQUET_ROWS = 1024  # rows written at once


def export_rows(path: Path, form: Format, out: Path, number: int | None = None, ledger: Path | None = None) -> str:
    """Write what `form` says of the run folder `path` to the file `out`. Returns in words what was written.

    `number` is the round whose pairs are meant; without it, the last one whose pairs are finished. `ledger` is that of
    paid calls, if it is not the one that the run names: texts that stand there are not asked for. Raises RunError where
    pairs are not finished, or if no text is missing; ConfigError for a file name that readers would not know; DataError
    for prompts that the format cannot hold.
    """
    suffix = ".parquet" if form == "parquet" else ".jsonl"
    if out.suffix != suffix:
        raise ConfigError(f"expected --out to end in {suffix} for --form {form}, found {out}")
    config, run = _config(path), RunFolder(path)
    with disk_errors_explained(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        if form == "batch":
            if number is not None:
                raise ConfigError("expected no --round with --form batch, which asks for the teacher's missing texts")
            return _write_batch(config if ledger is None else config.model_copy(update={"ledger": ledger}), run, out)
        number, pairs = _pairs_of(run, number)
        counts: Counter[str] = Counter()
        counted = _counted(pairs, counts)
        if form == "parquet":
            _write_parquet(counted, out)
        else:
            _write_rows(map(_ROWS[form], counted), out)
        said = [f"wrote {counts['rows']} rows of round {number} to {out}"]
        if counts["cut"] and form != "parquet":
            cut = f"{counts['cut']} rejected texts were cut at max_new_tokens"
            said.append(f"{cut}: other trainers put an end-of-sequence token behind them, this one does not")
        if form == "llama-factory":
            said.append(_describe(out, is_ranking=counts["rejected"] > 0))
        return "\n".join(said)


def _config(path: Path) -> Config:
    if not (path / "config.yaml").is_file():
        raise RunError(f"expected a run folder with a config.yaml at {path}, found none; name a folder in runs/")
    return load_config(path / "config.yaml")


def _pairs_of(run: RunFolder, number: int | None) -> tuple[int, Iterator[Pair]]:
    """The pairs of a round, or of the last one that has them. Raises RunError if they are not finished."""
    folders = [folder.name.removeprefix("round-") for folder in run.path.glob("round-*")]
    found = sorted(int(name) for name in folders if name.isdecimal() and run.manifest(f"round-{name}/pairs"))
    if not found or (number is not None and number not in found):
        asked = f"of round {number}" if number is not None else "of a round"
        rounds = f"those of the rounds {', '.join(map(str, found))}" if found else "none"
        raise RunError(f"expected finished pairs {asked} in {run.path}, found {rounds}; run the experiment up to them")
    number = number or found[-1]
    return number, read_jsonl(run.of(f"round-{number}/pairs") / "pairs.jsonl", Pair)


def _counted(pairs: Iterable[Pair], counts: Counter[str]) -> Iterator[Pair]:
    """The same pairs, counted as they pass."""
    for pair in pairs:
        counts.update(rows=1, rejected=bool(pair.rejected_id), cut=pair.rejected_cut)
        yield pair


def _trl(pair: Pair) -> Row:
    prompt = plain_prompt(pair.prompt)
    if not pair.rejected_id:
        return {"prompt": prompt, "completion": pair.chosen}
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _trl_messages(pair: Pair) -> Row:
    prompt, chosen = [asdict(message) for message in pair.prompt], [_answer(pair.chosen)]
    if not pair.rejected_id:
        return {"prompt": prompt, "completion": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": [_answer(pair.rejected)]}


def _llama_factory(pair: Pair) -> Row:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    roles = [message.role for message in pair.prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise DataError(
            f"expected a prompt in which user and assistant take turns and the user is last, found "
            f"{', '.join(roles)} for problem {pair.problem_id!r}: LLaMA-Factory "
            "would leave it out; export another form"
        )
    said = [{"from": speakers[message.role], "value": message.content} for message in pair.prompt]
    chosen = {"from": "gpt", "value": pair.chosen}
    if not pair.rejected_id:
        return {"conversations": [*said, chosen]}
    return {"conversations": said, "chosen": chosen, "rejected": {"from": "gpt", "value": pair.rejected}}


def _ms_swift(pair: Pair) -> Row:
    messages = [*(asdict(message) for message in pair.prompt), _answer(pair.chosen)]
    return {"messages": messages, **({"rejected_response": pair.rejected} if pair.rejected_id else {})}


_ROWS: Mapping[str, Callable[[Pair], Row]] = {
    "trl": _trl,
    "trl-messages": _trl_messages,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
}


def _answer(text: str) -> Row:
    return asdict(Message("assistant", text))


def _write_rows(rows: Iterable[Row], out: Path) -> None:
    with atomic_file(out) as file:
        file.writelines(map(_line, rows))


def _line(row: Row) -> bytes:
    """One line; text that UTF-8 cannot hold (lone surrogates) is escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def _describe(out: Path, is_ranking: bool) -> str:
    """LLaMA-Factory's entry for the file, put beside it where no dataset_info.json stands; returns what to do."""
    columns = {"messages": "conversations", **({"chosen": "chosen", "rejected": "rejected"} if is_ranking else {})}
    ranking = {"ranking": True} if is_ranking else {}
    entry = {out.stem: {"file_name": out.name, "formatting": "sharegpt", **ranking, "columns": columns}}
    text, path = json.dumps(entry, indent=2, ensure_ascii=False), out.with_name("dataset_info.json")
    if path.exists() and path.read_text(encoding="utf-8").strip() != text:
        return f"add this to {path}:\n{text}"
    with atomic_file(path) as file:
        file.write((text + "\n").encode())
    return f"its entry stands in {path}: train with dataset_dir: {out.parent}, dataset: {out.stem}"


def _write_parquet(pairs: Iterator[Pair], out: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "hub") from error
    text = pyarrow.string()
    kinds = {"prompt": pyarrow.list_(pyarrow.struct({"role": text, "content": text})), "rejected_cut": pyarrow.bool_()}
    schema = pyarrow.schema({name: kinds.get(name, text) for name in Pair.__dataclass_fields__})
    with atomic_file(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while rows := [_storable(asdict(pair)) for pair in islice(pairs, PARQUET_ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _storable(value: Any) -> Any:
    """Plain data whose texts UTF-8 can hold."""
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _write_batch(config: Config, run: RunFolder, out: Path) -> str:
    problems = next(stage for stage in plan(config) if stage.name == "problems")
    if state(problems, run) != "finished":
        raise RunError(
            f"expected the problems of {run.path} to be chosen, found that they are not; "
            "do `orpo-distill run CONFIG --until problems` first"
        )
    owned: Counter[str] = Counter()
    requests = list(_requests(config, run, owned))
    texts = sum(request["body"]["n"] for request in requests)
    known = f"; {owned.total()} more stand in the ledger, `orpo-distill run` takes them from there" if owned else ""
    if not requests:
        raise RunError(
            f"expected teacher samples that {run.of('teacher')} lacks, found none that is not owned{known}; raise "
            "teacher.samples"
        )
    _write_rows(requests, out)
    return (
        f"wrote {len(requests)} requests for {texts} missing teacher texts to {out}{known}\n"
        f"when the answers are there: orpo-distill import CONFIG ANSWERS.jsonl"
    )


def _requests(config: Config, run: RunFolder, owned: Counter[str]) -> Iterator[Row]:
    """A request for each gap in a problem's samples; its id says where the gap begins.

    Samples that failed are gaps; those that the ledger holds are not, and are counted in `owned` by problem.
    """
    options = next(stage.options for stage in plan(config) if stage.name == "teacher")
    assert isinstance(options, SampleOptions)
    standing, sampler, (indices, decoding) = Standing(run.of("teacher")), options.sampler, next(waves(options))
    api = sampler if isinstance(sampler, OpenAI) else OpenAI(base_url="https://api.openai.com/v1")
    asking = Asking(api, str(options.model), decoding)
    with ExitStack() as stack:
        ledger = stack.enter_context(reading(api.ledger_path)) if api is sampler and api.ledger_path.is_file() else None
        for problem in read_jsonl(run.of("problems") / "problems.jsonl", Problem):
            messages = with_prefix(config.task.messages(problem), options.prefix)
            lacking = [
                index for index in indices if standing.lacks((problem.id, index, prompt_id_of(messages)), failed=True)
            ]
            bought = ledger.samples(asking.asked(messages).key).keys() if ledger else ()
            if found := len(set(lacking).intersection(bought)):
                owned[problem.id] = found
            yield from _rows_of_gaps(problem.id, [index for index in lacking if index not in bought], asking, messages)


def _rows_of_gaps(
    problem_id: str, missing: Sequence[int], asking: Asking, messages: Sequence[Message]
) -> Iterator[Row]:
    for first, count in _gaps(missing):
        yield {
            "custom_id": f"{problem_id}#{first}",
            "method": "POST",
            "url": asking.path,
            "body": {**asking.body(messages), "n": count},
        }


def _gaps(missing: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of numbers that follow each other, as (first, how many), none longer than a request may ask for."""
    first = count = 0
    for number in missing:
        if count and (number != first + count or count == MOST_CHOICES):
            yield first, count
            count = 0
        first, count = (first, count + 1) if count else (number, 1)
    if count:
        yield first, count
