"""The score stage: what the model itself gives, once a trace, however often it is killed or its pairs change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_distill.errors import ConfigError, DataError, ModelError
from orpo_distill.likelihood import _sums
from orpo_distill.models import load_tokenizer
from orpo_distill.packing import Batch
from orpo_distill.records import Message, Pair, Score, read_jsonl
from orpo_distill.samplers.prompts import encode_prompt, end_of_response
from orpo_distill.stages.score import PARTIAL, ScoreOptions, score
from tests.checkpoints import save_tiny_checkpoint
from tests.training import ragged_pairs, write_pairs


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("student"))


def run(
    model: Path, pairs: list[Pair], out: Path, previous: Path | None = None, student: Path | None = None, **changes: Any
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    what = ScoreOptions(
        model=str(model), policy="teacher", student=str(student or model), tokens_per_batch=80, **changes
    )
    inputs = {"pairs": write_pairs(out.with_name(f"{out.name}-pairs"), pairs)}
    return score(what, inputs | ({"previous": previous} if previous else {}), out)


def found(out: Path) -> dict[str, Score]:
    return {one.trace_id: one for one in read_jsonl(out / "scores.jsonl", Score)}


def plainly(folder: Path, prompt: tuple[Message, ...], text: str, cut: bool) -> tuple[float, int, float]:
    """Sum, number and mean normalised entropy over a response's tokens, from the model's own logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = encode_prompt(tokenizer, prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if cut else [end_of_response(tokenizer)])
    with torch.no_grad():
        logps = model(torch.tensor([[*asked, *ids]])).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1) / torch.tensor(logps.shape[-1]).log()
    return logps[range(len(ids)), ids].sum().item(), len(ids), entropy.mean().item()


@pytest.mark.parametrize("architecture", ["llama", "mamba", "gemma3_tied"])  # one cannot share prompts, one caps logits
def test_it_is_the_models_own(architecture: str, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "tiny", architecture)
    pairs = ragged_pairs(4)
    assert any(pair.rejected_cut for pair in pairs)
    metrics = run(model, pairs, tmp_path / "out", prefix="As to a child.")
    scores = found(tmp_path / "out")
    prompts = {pair.problem_id: Message("user", f"As to a child.\n\n{pair.prompt[0].content}") for pair in pairs}
    for pair in pairs:
        for trace, text, cut in (
            (pair.chosen_id, pair.chosen, False),
            (pair.rejected_id, pair.rejected, pair.rejected_cut),
        ):
            one = scores[trace]
            expected = plainly(model, (prompts[pair.problem_id],), text, cut)
            assert (one.logp_sum, one.tokens, one.entropy) == pytest.approx(expected, rel=1e-4), trace
    assert metrics["traces"] == metrics["scored"] == len(scores)
    assert metrics["tokens"] == sum(one.tokens for one in scores.values())
    assert metrics["mean_logp"] == pytest.approx(sum(one.logp_sum for one in scores.values()) / metrics["tokens"])


def test_a_trace_of_an_earlier_round_is_never_scored_again(student: Path, tmp_path: Path) -> None:
    """Round 2 has the last problems of round 1 and new ones; were all old, no model would be opened."""
    pairs = ragged_pairs(7)
    first, second = [one for one in pairs if one.problem_id < "p4"], [one for one in pairs if one.problem_id > "p1"]
    run(student, first, tmp_path / "1")
    metrics = run(student, second, tmp_path / "2", tmp_path / "1")
    before, after = found(tmp_path / "1"), found(tmp_path / "2")
    assert list(after)[: len(before)] == list(before)
    assert {name: after[name] for name in before} == before
    assert metrics["scored"] == len(after) - len(before) > 0
    metrics = run(tmp_path / "no-model", first, tmp_path / "3", tmp_path / "2")
    assert (metrics["scored"], metrics["mean_logp"]) == (0, None)
    assert (tmp_path / "3/scores.jsonl").read_bytes() == (tmp_path / "2/scores.jsonl").read_bytes()


def test_resuming_and_growing_score_what_is_missing(student: Path, tmp_path: Path) -> None:
    """A killed run leaves whole lines and a torn one; the resumed one ends with the same bytes."""
    run(student, ragged_pairs(), tmp_path / "whole")
    whole = (tmp_path / "whole/scores.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "killed"
    out.mkdir()
    (out / PARTIAL).write_bytes(b"".join(lines[:5]) + lines[5][:20])
    run(student, ragged_pairs(), out)
    assert (out / "scores.jsonl").read_bytes() == whole
    changed = json.loads(lines[0]) | {"logp_sum": -1.5}
    partial = (out / PARTIAL).read_text().splitlines()
    (out / PARTIAL).write_text("".join(line + "\n" for line in [json.dumps(changed), *partial[1:]]))
    run(student, ragged_pairs()[:3], out)  # fewer pairs, and no model is needed
    assert found(out)[changed["trace_id"]].logp_sum == -1.5  # a score that stands is kept
    assert len(found(out)) < len(lines)
    run(tmp_path / "no-model-here", ragged_pairs()[:0], out)


@pytest.mark.parametrize("first", [slice(0, 4), slice(3, None)])  # what comes is new at the end, or at the beginning
def test_a_trace_that_is_scored_goes_through_no_model_again(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: slice
) -> None:
    pairs, read = ragged_pairs(), []

    def spy(model: Any, batch: Batch) -> Any:
        read.append(len(batch.chosen))
        return _sums(model, batch)

    run(student, pairs[first], tmp_path / "out")
    before = found(tmp_path / "out")
    monkeypatch.setattr("orpo_distill.likelihood._sums", spy)
    run(student, pairs, tmp_path / "out")
    after = found(tmp_path / "out")
    assert sum(read) == len(after) - len(before) > 0
    assert {name: after[name] for name in before} == before


def test_another_prompt_is_another_score(student: Path, tmp_path: Path) -> None:
    pairs = ragged_pairs(2)
    run(student, pairs, tmp_path / "out")
    before = found(tmp_path / "out")
    asked = [replace(one, prompt=(Message("user", "Well?"),)) for one in pairs]
    run(student, asked, tmp_path / "out")
    after = found(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].logp_sum != before[name].logp_sum for name in after)


def test_says_whether_the_tokens_are_the_students(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ragged_pairs(2)
    letters = "".join(sorted({letter for one in pairs for letter in one.chosen + one.rejected + one.prompt[0].content}))
    other = save_tiny_checkpoint(tmp_path / "other", vocab=letters)
    twin = save_tiny_checkpoint(tmp_path / "twin", seed=1)
    assert load_tokenizer(str(other)).get_vocab() != load_tokenizer(str(student)).get_vocab()
    assert run(twin, pairs, tmp_path / "same", student=student)["same_tokens"] is True
    assert "whole texts" not in capsys.readouterr().err
    assert run(other, pairs, tmp_path / "apart", student=student)["same_tokens"] is False
    assert "only the log-probabilities of whole texts are compared" in capsys.readouterr().err


def test_a_model_that_is_not_finite_is_named(student: Path, tmp_path: Path) -> None:
    broken = save_tiny_checkpoint(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[next(name for name in tensors if "norm" in name)][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"expected a finite log-probability .* found nan for trace c\d-0; load it in"):
        run(broken, ragged_pairs(2), tmp_path / "out")
    assert (tmp_path / "out" / PARTIAL).read_bytes() == b""


def test_texts_beyond_the_context_and_pairs_without_ids(student: Path, tmp_path: Path) -> None:
    pair = ragged_pairs(1)[0]
    with pytest.raises(ConfigError, match=r"expected texts within the context of .*, 256 tokens, found one of"):
        run(student, [replace(pair, rejected="x" * 300)], tmp_path / "long")
    with pytest.raises(DataError, match="expected the ids of both traces in every pair, found none for problem 'p0'"):
        run(student, [replace(pair, rejected_id="")], tmp_path / "nameless")
