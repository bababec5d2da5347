"""The bill: what the ledger shows and exports, and the forecast of `check`."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from orpo_distill.billing import export_ledger, forecast, ledger_table
from orpo_distill.config import Config, parse_config
from orpo_distill.errors import ConfigError, RunError
from orpo_distill.ledger import Asked, Ledger, Plan, Spent, Usage
from orpo_distill.records import Problem, Trace, write_jsonl
from tests.checkpoints import save_tiny_checkpoint


def filled(folder: Path) -> Path:
    """A ledger with a call of two samples, an unknown one, its repetition and a void one."""
    path = folder / "ledger.sqlite"
    plan = Plan(Asked("http://e/v1", "m", '{"prompt": "é"}'), (0, 1), Spent(0.5, 50, 1))
    other = Plan(Asked("http://e/v1", "m", "{}"), (0,), Spent(0.25, 25, 1))
    with Ledger(path) as ledger:
        first, unseen = ledger.transaction(
            [lambda one: one.begin(plan, "a", {}), lambda one: one.begin(other, "a", {})]
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
    with pytest.raises(RunError, match=r"expected a ledger at .*nothing, found none; name it with --ledger PATH"):
        ledger_table(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.jsonl or \.parquet, found"):
        export_ledger(filled(tmp_path), tmp_path / "out.csv", "samples")
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


def test_before_anything_is_bought_the_bill_is_a_bound(tmp_path: Path) -> None:
    """48 calls; the prompt is [{"role": "user", "content": "What is 0 + 0?"}]: 47 or 49 bytes, so 16 or 17 thirds."""
    found = bill(experiment(tmp_path, budget={"money": 3}))
    prompt = 4 * (10 * 16 + 2 * 17)
    assert found == {
        "teacher: samples": ("48 of 48 (0 bought already)", "48 calls"),
        "teacher: prompt tokens": ("", f"{prompt} (bytes / 3: a bound)"),
        "teacher: completion tokens": ("not measured: run --pilot N", "2400"),
        "teacher: money": ("", f"{(prompt * 10 + 2400 * 100) / 1e6:.4f}"),
        "teacher: budget": ("", "3 money"),
    }


def test_several_samples_a_call_a_tokenizer_and_batches_are_cheaper(tmp_path: Path) -> None:
    tokenizer = str(save_tiny_checkpoint(tmp_path / "tokenizer"))
    plain, cheap = bill(experiment(tmp_path, tokenizer=tokenizer)), bill(experiment(tmp_path, n=True, batch=True))
    assert "bound" not in plain["teacher: prompt tokens"][1]
    assert cheap["teacher: samples"][1] == "12 calls"
    assert cheap["teacher: prompt tokens"][1].startswith(f"{10 * 16 + 2 * 17} ")
    assert float(cheap["teacher: money"][1]) == pytest.approx(((10 * 16 + 2 * 17) * 10 + 240_000) / 2e6, abs=1e-4)


def test_traces_measure_and_what_is_bought_is_free(tmp_path: Path) -> None:
    """Lengths of 10 and 20 tokens: mean 15, standard error 5, so 5.2 to 24.8 a sample."""
    config = experiment(tmp_path)
    (config.run_dir / "teacher").mkdir(parents=True)
    traces = (Trace(str(n), "p", "teacher", n, "text", completion_tokens=10 * n) for n in (1, 2))
    write_jsonl(config.run_dir / "teacher" / "traces.partial.jsonl", traces)
    assert bill(config)["teacher: completion tokens"] == ("250 to 1190", "2400")


def test_a_task_on_the_hub_is_known_once_its_problems_are(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    hub = parse_config({**config.model_dump(mode="json"), "task": "gsm8k"})
    assert forecast(hub)[1][0] == "teacher: not known yet"
    (hub.run_dir / "problems").mkdir(parents=True)
    write_jsonl(hub.run_dir / "problems" / "problems.jsonl", [Problem("a", "What is 1 + 1?", "2")])
    assert bill(hub)["teacher: samples"] == ("4 of 4 (0 bought already)", "4 calls")


def test_a_run_that_pays_for_nothing_has_no_bill(tmp_path: Path) -> None:
    config = experiment(tmp_path).model_dump(mode="json")
    assert forecast(parse_config({**config, "teacher": {"model": "local"}})) == []
