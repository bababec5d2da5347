"""Export: a run's pairs for other trainers, and requests for texts that are missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_distill.errors import ConfigError, DataError, RunError
from orpo_distill.experiment import run
from orpo_distill.exporting import Format, export_rows
from orpo_distill.importing import import_texts
from orpo_distill.ledger import Ledger, Plan, Spent, Usage
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.plan import plan
from orpo_distill.records import FinishReason, Message, Pair, Trace, read_jsonl, write_jsonl
from orpo_distill.runs import Asked, Manifest, RunFolder
from orpo_distill.samplers.asking import Asking
from orpo_distill.samplers.prompts import encode_prompt
from orpo_distill.sampling import prompt_id_of
from tests import test_end_to_end as end_to_end
from tests import test_importing
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.test_end_to_end import cli
from tests.test_forms import batch, write
from tests.test_importing import traces
from tests.test_mistakes import one_message

PROMPT = (Message("system", "Be short."), Message("user", "2 + 2?"))
SHOTS = (PROMPT[0], Message("user", "1 + 1?"), Message("assistant", "2"), PROMPT[1])


def pair(number: int = 0, rejected: str = "5", cut: bool = False, prompt: tuple[Message, ...] = PROMPT) -> Pair:
    ids = f"c{number}", f"r{number}" if rejected else ""
    return Pair(f"p{number}", prompt, "4", rejected, *ids, "teacher", "student-0" if rejected else "", cut)


def run_folder(folder: Path, *rounds: list[Pair]) -> Path:
    """A run folder in which these rounds have pairs."""
    run = RunFolder(test_importing.experiment(folder).run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_bytes((folder / "experiment.yaml").read_bytes())
    for number, pairs in enumerate(rounds, start=1):
        name = f"round-{number}/pairs"
        run.write_asked(name, Asked("", {}, {}))
        write_jsonl(run.of(name) / "pairs.jsonl", pairs)
        run.write_manifest(name, Manifest(Asked("", {}, {}), "", {}))
    return run.path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exported(folder: Path, form: Format, pairs: list[Pair]) -> list[dict[str, Any]]:
    out = folder / "out" / "rows.jsonl"
    export_rows(run_folder(folder, pairs), form, out)
    return lines(out)


SYSTEM, USER = {"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
SAID = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "2 + 2?"}]
PLAIN = "Be short.\n\n2 + 2?\n"


@pytest.mark.parametrize(
    ("form", "row", "sft"),
    [
        (
            "trl",
            {"prompt": PLAIN, "chosen": "4", "rejected": "5"},
            {"prompt": PLAIN, "completion": "4"},
        ),
        (
            "trl-messages",
            {"prompt": [SYSTEM, USER], "chosen": [FOUR], "rejected": [FIVE]},
            {"prompt": [SYSTEM, USER], "completion": [FOUR]},
        ),
        (
            "llama-factory",
            {"conversations": SAID, "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
            {"conversations": [*SAID, {"from": "gpt", "value": "4"}]},
        ),
        (
            "ms-swift",
            {"messages": [SYSTEM, USER, FOUR], "rejected_response": "5"},
            {"messages": [SYSTEM, USER, FOUR]},
        ),
    ],
)
def test_rows_as_their_readers_document_them(
    tmp_path: Path, form: Format, row: dict[str, object], sft: dict[str, object]
) -> None:
    """Preference rows, and rows that only teach their chosen side."""
    assert exported(tmp_path, form, [pair(), pair(1)]) == [row, row]
    assert exported(tmp_path, form, [pair(rejected="")]) == [sft]


def test_parquet_holds_every_field(tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = [pair(0), pair(1, rejected=""), pair(2, cut=True, prompt=SHOTS)] * 500
    out = tmp_path / "pairs.parquet"
    export_rows(run_folder(tmp_path, pairs), "parquet", out)
    found = load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert [Pair(**{**row, "prompt": tuple(Message(**message) for message in row["prompt"])}) for row in found] == pairs


def test_the_last_round_that_has_pairs_or_the_one_asked_for(tmp_path: Path) -> None:
    path = run_folder(tmp_path, [pair()], [pair(), pair(1)])
    out = tmp_path / "rows.jsonl"
    assert export_rows(path, "trl", out) == f"wrote 2 rows of round 2 to {out}"
    assert export_rows(path, "trl", out, 1) == f"wrote 1 rows of round 1 to {out}"
    (path / "round-2/pairs/manifest.json").unlink()
    assert "round 1" in export_rows(path, "trl", out)
    with pytest.raises(RunError, match=r"pairs of round 2 .* rounds 1"):
        export_rows(path, "trl", out, 2)
    (path / "round-1/pairs/manifest.json").unlink()
    with pytest.raises(RunError, match="found none"):
        export_rows(path, "trl", out)


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    path = run_folder(tmp_path, [pair(), pair(1, cut=True)])
    assert "1 rejected texts were cut" in export_rows(path, "ms-swift", tmp_path / "rows.jsonl")
    assert "were cut" not in export_rows(path, "parquet", tmp_path / "rows.parquet")


def test_llama_factory_gets_its_entry(tmp_path: Path) -> None:
    """Beside the file, unless there is a dataset_info.json, which stays as it is."""
    path, out = run_folder(tmp_path, [pair()]), tmp_path / "data" / "mine.jsonl"
    for _ in range(2):
        assert "dataset: mine" in export_rows(path, "llama-factory", out)
    entry = {
        "mine": {
            "file_name": "mine.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        }
    }
    info = out.with_name("dataset_info.json")
    assert json.loads(info.read_text()) == entry
    info.write_text('{"theirs": {}}')
    said = export_rows(path, "llama-factory", out)
    assert json.loads(said[said.index("{") :]) == entry
    assert info.read_text() == '{"theirs": {}}'
    info.unlink()
    export_rows(run_folder(tmp_path, [pair(rejected="")]), "llama-factory", out)
    assert json.loads(info.read_text())["mine"].keys() == {"file_name", "formatting", "columns"}


def test_llama_factory_would_leave_out_what_does_not_take_turns(tmp_path: Path) -> None:
    exported(tmp_path, "llama-factory", [pair(prompt=SHOTS)])
    with pytest.raises(DataError, match="system, user, user for problem 'p1'"):
        exported(tmp_path, "llama-factory", [pair(), pair(1, prompt=(*PROMPT, PROMPT[1]))])


def test_nothing_stands_under_the_name_until_everything_is_written(tmp_path: Path) -> None:
    rows = exported(tmp_path, "llama-factory", [pair()])
    with pytest.raises(DataError):
        exported(tmp_path, "llama-factory", [pair(), pair(1, prompt=PROMPT * 2)])
    assert lines(tmp_path / "out" / "rows.jsonl") == rows
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "dataset_info.json"}


def test_texts_that_utf8_cannot_hold(tmp_path: Path) -> None:
    odd = pair(prompt=(Message("user", "a \ud83d é"),))
    assert exported(tmp_path, "trl", [odd])[0]["prompt"] == "a \ud83d é\n"
    export_rows(run_folder(tmp_path, [odd]), "parquet", tmp_path / "rows.parquet")


def test_mistakes(tmp_path: Path) -> None:
    path = run_folder(tmp_path, [pair()])
    with pytest.raises(ConfigError, match=r"\.parquet"):
        export_rows(path, "parquet", tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        export_rows(path, "trl", tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="--round"):
        export_rows(path, "batch", tmp_path / "rows.jsonl", 1)
    with pytest.raises(RunError, match="run folder"):
        export_rows(tmp_path, "trl", tmp_path / "rows.jsonl")
    with pytest.raises(RunError, match="expected to read and write"):
        export_rows(path, "trl", tmp_path / "experiment.yaml" / "rows.jsonl")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What an API would send back: the texts that the scripted teacher of these tests gives."""
    problem, _, first = request["custom_id"].rpartition("#")
    numbers = range(int(first), int(first) + request["body"]["n"])
    return batch(request["custom_id"], *((f"text {number} of {problem}", "stop") for number in numbers))


def test_batch_there_and_back_is_what_sampling_gives(tmp_path: Path) -> None:
    """Some texts are there before; the answers come in another order."""
    decoding = "teacher.decoding={temperature: 0.5, top_p: 0.9, max_new_tokens: 77, stop: [END]}"
    config = test_importing.experiment(tmp_path, decoding)
    out = tmp_path / "requests.jsonl"
    run(config, until="problems")
    standing = [("p1", 1), ("p2", 0), ("p2", 1), ("p2", 2)]
    mine = ({"problem_id": name, "sample_index": i, "text": f"text {i} of {name}"} for name, i in standing)
    import_texts(config, [write(tmp_path, *mine)], "teacher")
    said = export_rows(config.run_dir, "batch", out)
    assert said.startswith(f"wrote 5 requests for 11 missing teacher texts to {out}\n")
    requests = lines(out)
    assert [(one["custom_id"], one["body"]["n"]) for one in requests] == [
        ("p0#0", 3),
        ("p1#0", 1),
        ("p1#2", 1),
        ("p3#0", 3),
        ("p4#0", 3),
    ]
    assert requests[0] == {
        "custom_id": "p0#0",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "script",
            "messages": [{"role": "user", "content": "Think first.\n\nQ: What is 0 plus 0?"}],
            "n": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 77,
            "stop": ["END"],
        },
    }
    answers = write(tmp_path, *map(answer, reversed(requests)), name="answers.jsonl")
    import_texts(config, [answers], "teacher")
    (tmp_path / "replies.jsonl").write_text("")
    run(config, until="teacher")
    with pytest.raises(RunError, match=r"raise teacher\.samples"):
        export_rows(config.run_dir, "batch", out)
    sampled = test_importing.experiment(tmp_path, "name=sampled", decoding)
    run(sampled, until="teacher")
    assert [(one.id, one.prompt_id) for one in traces(config)] == [(one.id, one.prompt_id) for one in traces(sampled)]


def test_batch_asks_for_at_most_128_texts_a_request(tmp_path: Path) -> None:
    config = test_importing.experiment(tmp_path, "teacher.samples=300", "teacher.decoding.top_k=5")
    run(config, until="problems")
    export_rows(config.run_dir, "batch", tmp_path / "requests.jsonl")
    requests = lines(tmp_path / "requests.jsonl")[:3]
    assert [(one["custom_id"], one["body"]["n"]) for one in requests] == [
        ("p0#0", 128),
        ("p0#128", 128),
        ("p0#256", 44),
    ]
    assert requests[0]["body"]["top_k"] == 5


def test_batch_needs_the_problems(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--until problems"):
        export_rows(run_folder(tmp_path, [pair()]), "batch", tmp_path / "requests.jsonl")


def test_the_command_line_from_import_to_export(tmp_path: Path) -> None:
    """The teacher is nothing but imported texts; what is exported can be imported again."""
    config = end_to_end.experiment(tmp_path, rounds=1)
    (tmp_path / "teacher.jsonl").rename(tmp_path / "mine.jsonl")
    (tmp_path / "teacher.jsonl").write_text("")
    done = cli("import", config, "teacher.samples=1", tmp_path / "mine.jsonl", "name=one", "--form", "texts")
    assert done.returncode == 0, done.stderr
    begin = f"imported 24 texts for 12 problems into {tmp_path / 'runs/one/teacher'}; 12 of them are kept"
    assert done.stdout.startswith(begin)
    assert cli("run", config, "name=one", "--until", "round-1/pairs").returncode == 0
    pairs = list(read_jsonl(tmp_path / "runs/one/round-1/pairs/pairs.jsonl", Pair))
    done = cli("export", tmp_path / "runs/one", "--form", "trl", "--out", tmp_path / "rows.jsonl", "--round", 1)
    assert done.stdout == f"wrote {len(pairs)} rows of round 1 to {tmp_path / 'rows.jsonl'}\n"
    assert [row["chosen"] for row in lines(tmp_path / "rows.jsonl")] == [one.chosen for one in pairs]
    done = cli("import", config, tmp_path / "rows.jsonl", "--policy", "student-0", "name=two")
    assert f"for {len({one.problem_id for one in pairs})} problems" in done.stdout


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    config = test_importing.experiment(tmp_path).runs.parent / "experiment.yaml"
    mine = write(tmp_path, {"id": "p1", "text": "mine"})
    one_message(cli("import", config, "teacher.samples=1"), "files of texts", code=2)
    one_message(cli("import", config, mine, "trian.x=1"), "trian: unknown key", code=2)
    one_message(cli("import", config, tmp_path / "a=b.jsonl"), "a=b.jsonl")
    one_message(cli("import", config, mine, "--policy", "sft"), "--policy", code=2)
    one_message(cli("export", tmp_path, "--form", "trl", "--out", tmp_path / "rows.jsonl"), "run folder")


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("form", "template"), [("trl", None), ("trl-messages", CHAT_TEMPLATE)])
def test_trl_trains_on_it(tmp_path: Path, form: Format, template: str | None) -> None:
    """Two steps of TRL's ORPO trainer; it reads each prompt in the tokens that this project trains on."""
    from datasets import load_dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    pairs = [pair(number, prompt=prompt) for number, prompt in enumerate((PROMPT, SHOTS, PROMPT[1:], SHOTS[1:]))]
    out = tmp_path / "rows.jsonl"
    export_rows(run_folder(tmp_path, pairs), form, out)
    rows = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    folder = save_tiny_checkpoint(tmp_path / "tiny", chat_template=template)
    model, tokenizer = load_model(str(folder), "float32", "cpu"), load_tokenizer(str(folder))
    args = ORPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=256,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ORPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert [row["prompt_input_ids"] for row in trainer.train_dataset] == [
        encode_prompt(tokenizer, one.prompt) for one in pairs
    ]
    before = model.lm_head.weight.detach().clone()
    assert trainer.train().training_loss > 0
    assert trainer.state.global_step == 2
    assert not before.equal(model.lm_head.weight.detach())


def test_batch_asks_neither_for_what_the_ledger_holds_nor_leaves_out_what_failed(tmp_path: Path) -> None:
    """Bought by another run, at the first wave's temperature; the run's own sample 1 of p2 has failed."""
    api = "{type: openai, base_url: 'http://127.0.0.1:9/v1'}"
    waves = "stop_at: 2, max_samples: 6, temperatures: [0.7, 1.1]"
    teacher = f"teacher={{model: m, samples: 3, sampler: {api}, prefix: Think first., {waves}}}"
    config = test_importing.experiment(tmp_path, teacher, f"ledger={tmp_path / 'ledger.sqlite'}")
    run(config, until="problems")
    options = next(stage.options for stage in plan(config) if stage.name == "teacher")
    asking = Asking(options.sampler, "m", options.decoding.model_copy(update={"temperature": 0.7}))
    prompts = {f"p{n}": (Message("user", f"Think first.\n\nQ: What is {n} plus {n}?"),) for n in range(5)}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for name, index in [("p0", 0), ("p0", 1), ("p0", 2), ("p1", 1)]:
            begun = Plan(asking.asked(prompts[name]), (index,), Spent())
            (attempt,) = ledger.transaction([lambda one, begun=begun: one.begin(begun, "x", {})])
            choice = json.dumps({"message": {"content": "mine"}})
            ledger.transaction([lambda one, a=attempt, c=choice: one.settle(a, [c], [1], Usage(1, 1), 0.0)])
    (config.run_dir / "teacher").mkdir()
    failed = Trace("f", "p2", "teacher", 1, "", FinishReason.ERROR, error="cut", prompt_id=prompt_id_of(prompts["p2"]))
    good = Trace("g", "p2", "teacher", 0, "x", prompt_id=prompt_id_of(prompts["p2"]))
    write_jsonl(config.run_dir / "teacher" / "traces.partial.jsonl", [good, failed])
    out = tmp_path / "requests.jsonl"
    said = export_rows(config.run_dir, "batch", out)
    assert "wrote 5 requests for 10 missing teacher texts" in said and "4 more stand in the ledger" in said
    asked = [(one["custom_id"], one["body"]["n"], one["body"]["temperature"]) for one in lines(out)]
    assert asked == [("p1#0", 1, 0.7), ("p1#2", 1, 0.7), ("p2#1", 2, 0.7), ("p3#0", 3, 0.7), ("p4#0", 3, 0.7)]
    assert "for 14 missing" in export_rows(config.run_dir, "batch", out, ledger=tmp_path / "another.sqlite")
