"""The bill: what the ledger shows and exports, and the forecast of `check`."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from orpo_distill.billing import export_ledger, forecast, ledger_table, nothing_bought
from orpo_distill.config import Config
from orpo_distill.errors import ConfigError, RunError
from orpo_distill.experiment import run
from orpo_distill.ledger import Asked, Ledger, Plan, Spent, Usage
from orpo_distill.loading import parse_config
from orpo_distill.plan import plan
from orpo_distill.records import FinishReason, Message, Problem, Trace, write_jsonl
from orpo_distill.samplers.asking import Asking
from orpo_distill.sampling import prompt_id_of
from tests.checkpoints import save_tiny_checkpoint
from tests.servers import faulty_server


def filled(folder: Path) -> Path:
    """A ledger with a call of two samples, an unknown one, its repetition and a void one."""
    path = folder / "ledger.sqlite"
    asked = Plan(Asked("http://e/v1", "m", '{"prompt": "é"}'), (0, 1), Spent(0.5, 50, 1))
    other = Plan(Asked("http://e/v1", "m", "{}"), (0,), Spent(0.25, 25, 1))
    with Ledger(path) as ledger:
        first, unseen = ledger.transaction(
            [lambda one: one.begin(asked, "a", {}), lambda one: one.begin(other, "a", {})]
        )
        ledger.transaction(
            [
                lambda one: one.settle(first, ['{"text": "x"}', '{"text": "y"}'], [3, 4], Usage(10, 7, 2, 1), 0.125),
                lambda one: one.fail(unseen, "cut", paid=True),
            ]
        )
        (again,) = ledger.transaction([lambda one: one.begin(other, "a", {})])
        ledger.transaction([lambda one: one.settle(again, ['{"text": "z"}'], [1], Usage(5, 1), 0.0625)])
        (refused,) = ledger.transaction([lambda one: one.begin(Plan(other.asked, (9,), other.most), "a", {})])
        ledger.transaction([lambda one: one.fail(refused, "HTTP 500", paid=False)])
    return path


def test_a_day_of_a_model_is_a_row(tmp_path: Path) -> None:
    header, (day, *row) = ledger_table(filled(tmp_path))
    assert header[:5] == ("day", "endpoint", "model", "calls", "samples") and len(day) == 10
    assert dict(zip(header[3:], row[2:], strict=True)) == {
        "calls": "4",
        "samples": "3",
        "prompt": "15",
        "cached": "2",
        "completion": "8",
        "reasoning": "1",
        "money": "0.1875",
        "unknown": "1",
        "unknown money": "0.2500",
        "again": "1",
    }


def test_export_as_lines_and_parquet(tmp_path: Path) -> None:
    path, lines, table = filled(tmp_path), tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert export_ledger(path, lines, "samples") == export_ledger(path, table, "samples") == 3
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert pyarrow.parquet.read_table(table).to_pylist() == rows
    assert [(row["sample_index"], row["choice"], row["completion_tokens"]) for row in rows] == [
        (0, '{"text": "x"}', 3),
        (1, '{"text": "y"}', 4),
        (0, '{"text": "z"}', 1),
    ]
    assert rows[0]["request"] == '{"prompt": "é"}'
    assert export_ledger(path, lines, "attempts") == 4
    assert [json.loads(line)["state"] for line in lines.read_text().splitlines()] == [
        "settled",
        "unknown",
        "settled",
        "void",
    ]


def test_mistakes(tmp_path: Path) -> None:
    assert nothing_bought(tmp_path / "nothing") == (
        f"nothing bought yet: there is no ledger at {tmp_path / 'nothing'} (--ledger PATH names another)"
    )
    (tmp_path / "text").write_text("Dear diary, " * 400)
    with pytest.raises(RunError, match=r"not a database; this is no ledger .*: name another file \(--ledger PATH"):
        ledger_table(tmp_path / "text")
    path = filled(tmp_path)
    assert nothing_bought(path) is None
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.jsonl or \.parquet, found"):
        export_ledger(path, tmp_path / "out.csv", "samples")
    assert not (tmp_path / "nothing").exists()


def experiment(folder: Path, **sampler: object) -> Config:
    """Twelve problems, four samples each, of a server that nobody asks."""
    (folder / "data").mkdir(exist_ok=True)
    for split, numbers in (("train", range(12)), ("validation", range(50, 52)), ("test", range(70, 75))):
        rows = ({"id": f"{split}{n}", "question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in numbers)
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    api = {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "price": {"prompt": 10, "completion": 100}, **sampler}
    return parse_config(
        {
            "name": "bill",
            "task": {"type": "jsonl", "path": str(folder / "data"), "verifier": "number", "prompt": "{question}"},
            "teacher": {"model": "m", "samples": 4, "decoding": {"max_new_tokens": 50}, "sampler": api},
            "student": {"model": "none"},
            "runs": str(folder / "runs"),
            "ledger": str(folder / "ledger.sqlite"),
        }
    )


def bill(config: Config) -> dict[str, tuple[str, str]]:
    return {name: (expected, most) for name, expected, most in forecast(config)[1:]}


def test_before_anything_is_bought_the_bill_says_what_is_a_guess_and_what_a_maximum(tmp_path: Path) -> None:
    """48 calls; the prompt is [{"role": "user", "content": "What is 0 + 0?"}]: 47 or 49 bytes, so 16 or 17 thirds.

    At most it is the request's bytes, and what a server may put around it: as the budget counts.
    """
    found = bill(experiment(tmp_path, budget={"money": 3}))
    prompt = 4 * (10 * 16 + 2 * 17)
    request = '{"max_tokens": 50, "messages": [{"content": "What is 0 + 0?", "role": "user"}], "model": "m", '
    most = 4 * (12 * (len(request + '"temperature": 0.8}') + 256 + 16) + 2 * 2)
    assert found == {
        "teacher: samples": ("48 of 48 (0 in the run, 0 in the ledger)", "48 calls"),
        "teacher: prompt tokens": (f"{prompt} (bytes / 3, a guess)", f"{most} (bytes)"),
        "teacher: completion tokens": ("not measured: run --pilot N", "2400"),
        "teacher: money": ("", f"{(most * 10 + 2400 * 100) / 1e6:.4f}"),
        "teacher: budget": ("enough", "3 money, 0 used up"),
    }


def test_a_budget_that_will_not_do_is_warned_of(tmp_path: Path) -> None:
    """0.43 at most; once lengths are measured (10 and 20 tokens), up to 0.12 expected. What is used up counts."""
    config = experiment(tmp_path, budget={"money": 0.3, "calls": 47}, account="a")
    assert bill(config)["teacher: budget"] == (
        ("WARNING: not enough, the stage will stop before its end", "47 calls, 0 used up")
    )
    config = experiment(tmp_path, budget={"money": 0.3}, account="a")
    assert bill(config)["teacher: budget"][0] == "may be reached: then the stage stops before its end"
    (config.run_dir / "teacher").mkdir(parents=True)
    write_jsonl(
        config.run_dir / "teacher" / "traces.partial.jsonl",
        (Trace(str(n), "p", "teacher", n, "text", completion_tokens=10 * n) for n in (1, 2)),
    )
    assert bill(config)["teacher: budget"][0] == "may be reached: then the stage stops before its end"
    begun = Plan(Asked("e", "m", "{}"), (0,), Spent(0.25, 50, 1))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.transaction([lambda one: one.begin(begun, "a", {})])
    assert bill(config)["teacher: budget"] == (
        ("WARNING: not enough, the stage will stop before its end", "0.3 money, 0.25 used up")
    )


def test_what_stands_in_the_run_is_not_to_be_bought_and_waves_are_known_by_their_temperatures(tmp_path: Path) -> None:
    """Waves of 4 up to 12, the second at another temperature; two imported texts, one that failed, one bought."""
    config = experiment(tmp_path)
    waved = parse_config(
        config.model_dump(mode="json")
        | {"teacher": {**config.model_dump(mode="json")["teacher"], "stop_at": 2, "max_samples": 12}}
        | {"ledger": str(tmp_path / "ledger.sqlite")}
    )
    waved = waved.model_copy(update={"teacher": waved.teacher.model_copy(update={"temperatures": (0.7, 1.1)})})
    assert bill(waved)["teacher: samples"] == ("144 of 144 (0 in the run, 0 in the ledger)", "144 calls")
    options = next(stage.options for stage in plan(waved) if stage.name == "teacher")
    messages = (Message("user", "What is 3 + 3?"),)
    (config.run_dir / "teacher").mkdir(parents=True)
    prompt = prompt_id_of(messages)
    good = [Trace(str(n), "train3", "teacher", n, "text", prompt_id=prompt) for n in (0, 5)]
    failed = Trace("f", "train3", "teacher", 1, "", FinishReason.ERROR, error="cut", prompt_id=prompt)
    write_jsonl(config.run_dir / "teacher" / "traces.partial-import.jsonl", [*good, failed])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for temperature, index in ((0.7, 2), (1.1, 6), (0.7, 7)):  # the last one is no sample of its wave
            decoding = options.decoding.model_copy(update={"temperature": temperature})
            asked = Asking(options.sampler, "m", decoding).asked(messages)
            (attempt,) = ledger.transaction([lambda one, a=asked, i=index: one.begin(Plan(a, (i,), Spent()), "x", {})])
            ledger.transaction([lambda one, a=attempt: one.settle(a, ['{"text": "x"}'], [1], Usage(1, 1), 0.0)])
    assert bill(waved)["teacher: samples"] == ("140 of 144 (2 in the run, 2 in the ledger)", "140 calls")


def test_several_samples_a_call_a_tokenizer_and_batches_are_cheaper(tmp_path: Path) -> None:
    tokenizer = str(save_tiny_checkpoint(tmp_path / "tokenizer"))
    plain, cheap = bill(experiment(tmp_path, tokenizer=tokenizer)), bill(experiment(tmp_path, n=True, batch=True))
    assert plain["teacher: prompt tokens"][0].endswith(" (tokenizer)")
    assert cheap["teacher: samples"][1] == "12 calls"
    assert cheap["teacher: prompt tokens"][0].startswith(f"{10 * 16 + 2 * 17} ")
    most = int(cheap["teacher: prompt tokens"][1].split()[0])
    assert float(cheap["teacher: money"][1]) == pytest.approx((most * 10 + 240_000) / 2e6, abs=1e-4)


def test_traces_measure_and_what_is_bought_is_free(tmp_path: Path) -> None:
    """Lengths of 10 and 20 tokens: mean 15, standard error 5, so 5.2 to 24.8 a sample, rounded up in sum."""
    config = experiment(tmp_path)
    (config.run_dir / "teacher").mkdir(parents=True)
    traces = (Trace(str(n), "p", "teacher", n, "text", completion_tokens=10 * n) for n in (1, 2))
    write_jsonl(config.run_dir / "teacher" / "traces.partial.jsonl", traces)
    assert bill(config)["teacher: completion tokens"] == ("250 to 1191", "2400")


def test_a_stage_that_is_finished_buys_nothing_more(tmp_path: Path) -> None:
    """Also where its stop rule would have allowed more samples."""
    script = {"type": "scripted", "default": ["The answer is 0."]}
    settings = experiment(tmp_path).model_dump(mode="json")
    with faulty_server(right=1) as server:
        sampler = {"type": "openai", "base_url": server.base_url}
        teacher = {**settings["teacher"], "model": "faulty", "stop_at": 1, "max_samples": 12, "sampler": sampler}
        config = parse_config({**settings, "teacher": teacher, "student": {"model": "s", "sampler": script}})
        run(config, until="teacher")
    assert bill(config)["teacher: samples"][0].startswith("0 of 144 (144 in the run")


def test_after_a_pilot_the_other_problems_are_still_to_be_bought(tmp_path: Path) -> None:
    settings = experiment(tmp_path).model_dump(mode="json")
    with faulty_server(right=1) as server:
        sampler = {"type": "openai", "base_url": server.base_url}
        teacher = {**settings["teacher"], "model": "faulty", "sampler": sampler}
        config = parse_config({**settings, "teacher": teacher})
        run(config.model_copy(update={"problems": config.problems.model_copy(update={"limit": 3})}), until="teacher")
    assert bill(config)["teacher: samples"] == ("36 of 48 (12 in the run, 0 in the ledger)", "36 calls")


def test_a_task_on_the_hub_is_known_once_its_problems_are(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    hub = parse_config({**config.model_dump(mode="json"), "task": "gsm8k"})
    assert forecast(hub)[1][0] == "teacher: not known yet"
    (hub.run_dir / "problems").mkdir(parents=True)
    write_jsonl(hub.run_dir / "problems" / "problems.jsonl", [Problem("a", "What is 1 + 1?", "2")])
    assert bill(hub)["teacher: samples"] == ("4 of 4 (0 in the run, 0 in the ledger)", "4 calls")


def test_a_run_that_pays_for_nothing_has_no_bill(tmp_path: Path) -> None:
    config = experiment(tmp_path).model_dump(mode="json")
    assert forecast(parse_config({**config, "teacher": {"model": "local"}})) == []
