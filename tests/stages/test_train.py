import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orpo_distill.errors import ConfigError, DataError, RunError, TrainingError
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives import Objective
from orpo_distill.packing import packed_tokens
from orpo_distill.stages.train import label_of
from orpo_distill.trainer import out_of_memory
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.training import objective, options, ragged_pairs, ready_trainer, rows_of, run_train, weights, write_pairs


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student"), chat_template=CHAT_TEMPLATE)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs", ragged_pairs())


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def in_rounds(student: Path, pairs: Path, folder: Path, rounds: int, **section: Any) -> list[Path]:
    """A train stage a round, each going on from the one before."""
    outs: list[Path] = []
    for number in range(1, rounds + 1):
        outs.append(folder / f"round-{number}")
        what = options(student, (number, number, rounds), **section)
        run_train(what, pairs, outs[-1], outs[-2] if number > 1 else None)
    return outs


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_rounds_equal_one_uninterrupted_run_bit_for_bit(architecture: str, pairs: Path, tmp_path: Path) -> None:
    """GPT-2 has dropout: random numbers must go on as well. GPT-NeoX's files call its head by another name."""
    model = save_tiny_checkpoint(tmp_path / "model", architecture)
    rounds = in_rounds(model, pairs, tmp_path, 3)
    run_train(options(model, (1, 3, 3)), pairs, tmp_path / "whole")
    assert weights(rounds[-1]) == weights(tmp_path / "whole")
    assert [line for out in rounds for line in log_of(out)] == log_of(tmp_path / "whole")


def test_learning_rate_is_a_function_of_the_whole_run(student: Path, pairs: Path, tmp_path: Path) -> None:
    """Warm-up over a tenth of all steps (rounded up), then half a cosine down to zero after the last one."""
    rounds = in_rounds(student, pairs, tmp_path, 2, warmup_ratio=0.1)
    rates = [line["learning_rate"] for out in rounds for line in log_of(out)]
    total, warm = len(rates), math.ceil(len(rates) / 10)
    expected = [
        1e-2 * (step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2)
        for step in range(total)
    ]
    assert rates == pytest.approx(expected)


def test_result_is_an_ordinary_checkpoint(student: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run_train(options(student), pairs, out)
    model, before = load_model(str(out / "model"), "float32", "cpu"), load_model(str(student), "float32", "cpu")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model.config.use_cache == before.config.use_cache
    assert load_tokenizer(str(out / "model")).chat_template == CHAT_TEMPLATE
    files = {path.name for path in (out / "model").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in files if name.endswith((".pt", ".pth", ".bin"))]
    assert not list(out.rglob("training_args.bin"))
    assert metrics == json.loads((out / "train.json").read_text())


def test_metrics_and_log(student: Path, pairs: Path, tmp_path: Path) -> None:
    metrics = run_train(options(student, (1, 2, 2)), pairs, tmp_path / "out")
    lines = log_of(tmp_path / "out")
    count = len(ragged_pairs())
    assert metrics["rows"] == count and metrics["pairs"] == 2 * count
    assert metrics["steps_per_round"] == math.ceil(count / 4) and metrics["steps"] == len(lines)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert metrics["rows_repeated"] == metrics["rows_left_out"] == metrics["clamped"] == 0
    assert metrics["groups"] == 7
    assert 0 < metrics["rejected_probability_max"] < 1
    assert metrics["traces"] < 2 * metrics["pairs"]
    last = lines[-10:]
    assert metrics["loss"] == pytest.approx(sum(line["loss"] for line in last) / len(last))
    names = {"nll_loss", "logps/chosen", "logps/rejected", "log_odds_ratio", "log_odds_chosen"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    assert names <= metrics.keys() and names <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll_loss"] - line["log_odds_ratio"], rel=1e-5)


def test_trackers_get_means_of_the_steps(student: Path, tmp_path: Path) -> None:
    trainer = ready_trainer(student, ragged_pairs(), objective(), tmp_path)
    trainer.train()
    told, line = trainer.state.log_history[0], log_of(tmp_path)[0]
    assert told["step"] == line["step"] == 1
    for name in ("loss", "rewards/margins", "nll_loss", "grad_norm", "learning_rate", "rejected_probability_max"):
        assert told[name] == pytest.approx(line[name]), name
    assert "tokens" not in told


def test_sharded_parameters_are_refused(
    student: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="expected whole parameters on every process, found ACCELERATE_USE_FSDP set"):
        run_train(options(student, (1, 1, 1)), pairs, tmp_path / "out")


def test_out_of_memory_says_what_to_lower(student: Path) -> None:
    rows = rows_of(student, ragged_pairs())
    longest = max(rows, key=lambda row: row.length)
    lower = r"lower train.tokens_per_batch \(now 64\)"
    for few, setting in ((rows, lower), ([longest], "gradient_checkpointing: true")):
        with pytest.raises(TrainingError, match=setting) as caught:
            raise out_of_memory(few, packed_tokens, 64)
        assert longest.name in str(caught.value) and f"{longest.length} tokens" in str(caught.value)
    assert "smaller student" in str(out_of_memory([], packed_tokens, 8))


def test_same_run_same_log_and_weights(student: Path, pairs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_train(options(student), pairs, tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


def test_finished_stage_does_nothing(student: Path, pairs: Path, tmp_path: Path) -> None:
    first = run_train(options(student), pairs, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (pairs / "pairs.jsonl").unlink()
    assert run_train(options(student), pairs, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps


@pytest.mark.parametrize(
    "loss", [objective(), objective(nll_on="full", nll_reduction="batch_tokens"), objective("sft")]
)
def test_micro_batches_do_not_matter(student: Path, loss: Objective, tmp_path: Path) -> None:
    """8 x 1 = 3 x 3 = 1 x 8: the loss and every gradient of a step."""
    found = []
    for size in (1, 3, 100):
        trainer = ready_trainer(student, ragged_pairs(), loss, tmp_path, size)
        value = trainer.training_step(trainer.model, {})
        found.append((value, [weight.grad for weight in trainer.model.parameters()]))
    for value, gradients in found[1:]:
        assert torch.allclose(value, found[0][0], rtol=1e-6)
        for gradient, expected in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_autocast_change_little(student: Path, pairs: Path, tmp_path: Path) -> None:
    plain = run_train(options(student), pairs, tmp_path / "plain")
    saving = run_train(options(student, gradient_checkpointing=True), pairs, tmp_path / "saving")
    assert saving["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    half = run_train(options(student, autocast=True), pairs, tmp_path / "half")
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.05)
    run_train(options(student, dtype="bfloat16"), pairs, tmp_path / "brain")
    assert {weight.dtype for weight in load_file(tmp_path / "brain/model/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_steps_per_round_stay_those_of_round_one(student: Path, tmp_path: Path) -> None:
    """16 pairs make 4 steps; in round 2, 5 pairs are used 16 times in all; in round 3, 16 of 20."""
    many, few, more = (
        write_pairs(tmp_path / name, ragged_pairs(30)[:count]) for name, count in (("m", 16), ("f", 5), ("n", 20))
    )
    metrics = [run_train(options(student, (1, 1, 3)), many, tmp_path / "1")]
    metrics.append(run_train(options(student, (2, 2, 3)), few, tmp_path / "2", tmp_path / "1"))
    metrics.append(run_train(options(student, (3, 3, 3)), more, tmp_path / "3", tmp_path / "2"))
    found = [(one["steps"], one["pairs"], one["rows_repeated"], one["rows_left_out"]) for one in metrics]
    assert found == [(4, 16, 0, 0), (4, 16, 11, 0), (4, 16, 0, 4)]
    assert [line["step"] for line in log_of(tmp_path / "3")] == [9, 10, 11, 12]


@pytest.mark.parametrize("keep", ["last", "all"])
def test_keep(student: Path, pairs: Path, tmp_path: Path, keep: str) -> None:
    """`last`: a finished round's optimizer state goes once the next round is done; its model stays."""
    rounds = in_rounds(student, pairs, tmp_path, 2, keep=keep)
    assert (rounds[0] / "checkpoint").exists() == (keep == "all")
    assert (rounds[1] / "checkpoint").exists()
    assert len(weights(rounds[0])) == len(weights(rounds[1]))


def test_round_two_needs_what_round_one_left(student: Path, pairs: Path, tmp_path: Path) -> None:
    run_train(options(student, (1, 1, 2)), pairs, tmp_path / "1")
    shutil.rmtree(tmp_path / "1" / "checkpoint")
    with pytest.raises(RunError, match=r"expected the last checkpoint of round 1 .* found none"):
        run_train(options(student, (2, 2, 2)), pairs, tmp_path / "2", tmp_path / "1")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_round_trip(student: Path, pairs: Path, tmp_path: Path, checkpointing: bool) -> None:
    """Rounds equal the uninterrupted run, and the adapter's folder is a model that answers differently."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.1}
    for number, previous in ((1, None), (2, tmp_path / "1")):
        what = options(student, (number, number, 2), lora=lora, gradient_checkpointing=checkpointing)
        run_train(what, pairs, tmp_path / str(number), previous)
    what = options(student, (1, 2, 2), lora=lora, gradient_checkpointing=checkpointing)
    run_train(what, pairs, tmp_path / "whole")
    adapter = "model/adapter_model.safetensors"
    assert (tmp_path / "2" / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    assert not (tmp_path / "2" / "model" / "model.safetensors").exists()
    assert (tmp_path / "2" / "model" / "tokenizer.json").exists()
    ids = torch.arange(12)[None]
    base, adapted = (
        load_model(str(path), "float32", "cpu")(ids).logits for path in (student, tmp_path / "2" / "model")
    )
    assert (base - adapted).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral"])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "embed_out", "q_proj", "query_key_value"]])
def test_adapters_of_models_whose_files_rename_weights_go_on_bit_for_bit(
    architecture: str, targets: Any, pairs: Path, tmp_path: Path
) -> None:
    """GPT-NeoX's files call its head otherwise, Mixtral's its experts: an adapter must not lose what hangs on them."""
    model = save_tiny_checkpoint(tmp_path / "model", architecture)
    section = {"lora": {"r": 4, "alpha": 8, "target_modules": targets}}
    rounds = in_rounds(model, pairs, tmp_path, 2, **section)
    run_train(options(model, (1, 2, 2), **section), pairs, tmp_path / "whole")
    adapter = "model/adapter_model.safetensors"
    assert (rounds[-1] / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
    assert [line for out in rounds for line in log_of(out)] == log_of(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / adapter)
    assert all(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "rounds, loss, label", [((2, 2, 3), "orpo", "train round 2"), ((1, 3, 3), "sft", "train sft, 3 epochs")]
)
def test_what_is_said_while_it_works(student: Path, rounds: tuple[int, int, int], loss: str, label: str) -> None:
    assert label_of(options(student, rounds, objective(loss))) == label


def test_sft_needs_no_rejected_side_and_learns(student: Path, tmp_path: Path) -> None:
    lone = [replace(pair, rejected="", rejected_id="", rejected_policy="") for pair in ragged_pairs()]
    pairs = write_pairs(tmp_path / "pairs", lone)
    what = options(student, (1, 8, 8), loss=objective("sft"))
    run_train(what, pairs, tmp_path / "out")
    lines = log_of(tmp_path / "out")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    with pytest.raises(DataError, match="expected a rejected text"):
        run_train(options(student), pairs, tmp_path / "other")


def test_orpo_learns_the_preference(student: Path, pairs: Path, tmp_path: Path) -> None:
    run_train(options(student, (1, 10, 10)), pairs, tmp_path / "out")
    lines = log_of(tmp_path / "out")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert sum(line["rewards/accuracies"] for line in lines[-7:]) / 7 > 0.8


def broken_student(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    save_tiny_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_stops_and_names_the_row(tmp_path: Path) -> None:
    """The embedding of the letter z is NaN, and only one row has a z."""
    tokenizer = load_tokenizer(str(save_tiny_checkpoint(tmp_path / "sound")))
    letter = tokenizer.encode("z", add_special_tokens=False)[0]
    model = broken_student(tmp_path / "model", lambda state: state["model.embed_tokens.weight"][letter].fill_(math.nan))
    rows = ragged_pairs()
    rows[5] = replace(rows[5], rejected="a z", rejected_id="guilty")
    pairs = write_pairs(tmp_path / "pairs", rows)
    with pytest.raises(
        TrainingError, match=r"expected a finite loss at step \d+, found nan for pairs.jsonl:6 .*guilty"
    ):
        run_train(options(model), pairs, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_infinite_gradient_stops_too(tmp_path: Path) -> None:
    """Weights so large that the loss is finite and its gradient is not."""

    def grow(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"].fill_(1e30)
        state["lm_head.weight"].mul_(1e-30)

    model = broken_student(tmp_path / "model", grow)
    pairs = write_pairs(tmp_path / "pairs", ragged_pairs())
    with pytest.raises(TrainingError, match="expected finite gradients at step 1, found a gradient norm of"):
        run_train(options(model), pairs, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_damaged_checkpoint_of_the_round_before(student: Path, pairs: Path, tmp_path: Path, name: str) -> None:
    """Its size is right and its content is not."""
    run_train(options(student, (1, 1, 2)), pairs, tmp_path / "1")
    victim = tmp_path / "1" / "checkpoint" / name
    victim.write_bytes(b"\x00" * victim.stat().st_size)
    with pytest.raises(RunError, match=r"expected a whole checkpoint in .*1/checkpoint, found: "):
        run_train(options(student, (2, 2, 2)), pairs, tmp_path / "2", tmp_path / "1")
