"""The real path (groups, shared traces, packed micro-batches) in float32 against one pair at a time in float64."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from orpo_distill.errors import ModelError
from orpo_distill.groups import Row
from orpo_distill.models import load_model
from orpo_distill.objectives import Objective
from orpo_distill.packing import collate
from orpo_distill.records import Message, Pair
from orpo_distill.scoring import prepare, score
from tests.checkpoints import ARCHITECTURES, UNUSUAL, save_tiny_checkpoint
from tests.training import objective, ragged_pairs, ready_trainer, rows_of

LOSSES = {
    "orpo": objective("orpo", weight=0.7),
    "orpo-full": objective("orpo", nll_on="full"),
    "orpo-pooled": objective("orpo", weight=0.7, nll_reduction="batch_tokens"),
    "orpo-trl": objective("orpo", nll_on="full", nll_reduction="batch_tokens"),
    "sft": objective("sft"),
    "sft-full": objective("sft", nll_on="full"),
}
WHOLE = 1000  # a budget of tokens that takes a step in one micro-batch
PAIR = Pair("p", (Message("user", "q"),), "a", "b", "c", "r", "teacher", "student-0")


def row(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Row:
    return Row(1, PAIR, tuple(prompt), tuple(chosen), tuple(rejected))


def naive_nll(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token negative log-likelihoods of prompt (but its first token) and response, from full logits, row by row."""
    ids = torch.tensor([(*prompt, *response)])
    logps = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(-1)
    tokens = -logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
    return tokens[: len(prompt) - 1], tokens[len(prompt) - 1 :]


def naive_loss(model: Any, rows: Sequence[Row], loss: Any) -> Tensor:
    """The mean loss, pair by pair, from the equations."""
    sides = []
    for one in rows:
        prompt, chosen = naive_nll(model, one.prompt, one.chosen)
        likelihood = torch.cat([prompt, chosen]) if loss.nll_on == "full" else chosen
        ratio = torch.zeros(())
        if "rejected" in loss.requires:
            p_chosen = chosen.mean().neg().exp()
            p_rejected = naive_nll(model, one.prompt, one.rejected)[1].mean().neg().exp()
            odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
            ratio = loss.weight * (1 + 1 / odds_ratio).log()
        sides.append((likelihood, ratio))
    ratio = torch.stack([ratio for _, ratio in sides]).mean()
    if loss.nll_reduction == "batch_tokens":
        return torch.cat([likelihood for likelihood, _ in sides]).mean() + ratio
    return torch.stack([likelihood.mean() for likelihood, _ in sides]).mean() + ratio


Step = tuple[float, dict[str, Tensor]]


def naive_step(model: Any, rows: Sequence[Row], loss: Objective) -> Step:
    """Loss and gradients of a model in float64."""
    model.zero_grad()
    value = naive_loss(model, rows, loss)
    value.backward()
    return value.item(), gradients(model)


def real_step(trainer: Any, rows: Sequence[Row]) -> Step:
    """Loss and gradients as training makes them."""
    trainer.course = replace(trainer.course, steps=[list(rows)])
    trainer.model.zero_grad()
    value = trainer.training_step(trainer.model, {})
    return value.item(), gradients(trainer.model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: Step, expected: Step, rounding: float = 2e-5) -> None:
    """The same loss, and gradients that differ by `rounding` of their own largest entry, or of a typical one."""
    assert found[0] == pytest.approx(expected[0], rel=rounding)
    assert found[1].keys() == expected[1].keys()
    typical = torch.stack([gradient.abs().max() for gradient in expected[1].values()]).median()
    for name, gradient in expected[1].items():
        off = (found[1][name] - gradient).abs().max()
        assert off <= rounding * max(gradient.abs().max(), typical), f"{name}: off by {off:.2g}"


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def reference(folder: Path) -> Any:
    return load_model(str(folder), "float32", "cpu").double()


def trainer_of(folder: Path, loss: Objective, out: Path, budget: int = WHOLE, **section: Any) -> Any:
    trainer = ready_trainer(folder, ragged_pairs(2), loss, out, budget, **section)
    without_dropout(trainer.model)
    return trainer


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNUSUAL])
@pytest.mark.parametrize("loss", ["orpo", "orpo-trl"])
def test_step_equals_one_pair_at_a_time(architecture: str, loss: str, tmp_path: Path) -> None:
    """Texts of up to 60 tokens; sliding windows have 8. 100 tokens a micro-batch cut the larger groups."""
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    rows = rows_of(folder, ragged_pairs(5))
    expected = naive_step(reference(folder), rows, LOSSES[loss])
    for budget in (WHOLE, 100):
        trainer = trainer_of(folder, LOSSES[loss], tmp_path, budget)
        assert_same(real_step(trainer, rows), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective(loss: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", "gemma3_tied")
    rows = rows_of(folder, ragged_pairs(5), "rejected" in LOSSES[loss].requires)
    expected = naive_step(reference(folder), rows, LOSSES[loss])
    for budget in (WHOLE, 60):
        assert_same(real_step(trainer_of(folder, LOSSES[loss], tmp_path, budget), rows), expected)


SEARCHED = ("llama_tied", "qwen3", "gpt_neox", "gemma3_tied")


@cache
def ready(architecture: str) -> tuple[Any, Any]:
    """A reference and a trainer that hypothesis uses again and again."""
    folder = save_tiny_checkpoint(Path(mkdtemp()) / "model", architecture)
    return reference(folder), trainer_of(folder, LOSSES["orpo"], folder.parent)


def texts(longest: int) -> st.SearchStrategy[list[int]]:
    """Few different tokens, so that traces and prompts are often the same or begin alike."""
    return st.lists(st.integers(3, 5), min_size=1, max_size=longest)


@st.composite
def groups(draw: st.DrawFn) -> list[Row]:
    """Pairs of one to three prompts: any pairing of any traces, the same trace on both sides too."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        prompt, traces = draw(texts(6)), draw(st.lists(texts(12), min_size=1, max_size=4))
        ends = st.sampled_from(traces)
        rows += [row(prompt, *ends) for ends in draw(st.lists(st.tuples(ends, ends), min_size=1, max_size=5))]
    return rows


@settings(max_examples=120, deadline=None)
@given(groups(), st.sampled_from(SEARCHED), st.sampled_from(["orpo", "orpo-trl"]), st.sampled_from([1, 20, WHOLE]))
def test_no_shape_of_groups_differs(rows: list[Row], architecture: str, loss: str, budget: int) -> None:
    model, trainer = ready(architecture)
    trainer.course = replace(trainer.course, objective=LOSSES[loss], tokens_per_batch=budget)
    assert_same(real_step(trainer, rows), naive_step(model, rows, LOSSES[loss]))


PAIRINGS = {
    "cycle": [(number, number % 2) for number in range(4)],
    "product": [(c, r) for c in range(4) for r in range(2)],
    "random": [(2, 0), (0, 0), (3, 1), (2, 0)],
}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("budget", [WHOLE, 1])
def test_every_pairing(pairing: str, budget: int) -> None:
    """A prompt of one token, responses of one token among them, the same text on both sides, a pair twice."""
    chosen, rejected = ((3,), (4, 5, 6), (7,) * 20, (5, 4, 3, 8)), ((9,), (4, 5, 6))
    rows = [row((6,), chosen[c], rejected[r]) for c, r in PAIRINGS[pairing]]
    for architecture in SEARCHED:
        model, trainer = ready(architecture)
        trainer.course = replace(trainer.course, objective=LOSSES["orpo-full"], tokens_per_batch=budget)
        assert_same(real_step(trainer, rows), naive_step(model, rows, LOSSES["orpo-full"]))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_tied", "cohere2", "mamba"])
def test_gradient_checkpointing_changes_nothing(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    rows = rows_of(folder, ragged_pairs(5))
    plain = real_step(trainer_of(folder, LOSSES["orpo"], tmp_path), rows)
    trainer = trainer_of(folder, LOSSES["orpo"], tmp_path, gradient_checkpointing=True)
    trainer.model.activation_checkpointing_enable()
    assert_same(real_step(trainer, rows), plain, 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma3_tied", "cohere2", "gemma2"])
def test_bfloat16_and_autocast_are_near(architecture: str, tmp_path: Path) -> None:
    """Weights are scaled down to the size that a trained model's have; 0.3 lets a bfloat16 model wander."""
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    model = load_model(str(folder), "float32", "cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.3 if weight.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    rows = rows_of(folder, ragged_pairs(5))
    value, expected = real_step(trainer_of(folder, LOSSES["orpo"], tmp_path), rows)
    for section in ({"dtype": "bfloat16"}, {"autocast": True}):
        trainer = trainer_of(folder, LOSSES["orpo"], tmp_path, **section)
        with trainer.compute_loss_context_manager():
            found, gradient = real_step(trainer, rows)
        assert found == pytest.approx(value, abs=0.02), section
        flat, flat_expected = (
            torch.cat([one.float().flatten() for one in side.values()]) for side in (gradient, expected)
        )
        assert torch.cosine_similarity(flat, flat_expected, 0) > 0.999, section


ADAPTED = [
    ("llama", ["q_proj", "v_proj"]),
    ("gemma3", ["q_proj", "lm_head"]),
    ("gpt_neox", ["query_key_value", "lm_head"]),
    ("cohere2", ["lm_head"]),
    ("llama", ["embed_tokens", "down_proj"]),
]


@pytest.mark.parametrize(("architecture", "targets"), ADAPTED)
def test_adapters(architecture: str, targets: list[str], tmp_path: Path) -> None:
    """The adapters' gradients, on the head too, against the adapted model in float64."""
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    rows = rows_of(folder, ragged_pairs(4))
    lora = {"r": 2, "alpha": 8, "dropout": 0.0, "target_modules": targets}
    trainer = trainer_of(folder, LOSSES["orpo"], tmp_path, 100, lora=lora)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:  # one side of a fresh adapter is zero, and so would be the other's gradient
                weight.normal_(std=0.3)
    found = real_step(trainer, rows)
    expected = naive_step(trainer.model.double(), rows, LOSSES["orpo"])
    assert_same(found, expected)
    assert all(any(target in name for name in found[1]) for target in targets)


REASONS = {
    "bloom": ("carry something from one trace to the next",),
    "mamba": ("carry something from one trace to the next",),
    "falcon_h1": ("carry something from one trace to the next",),
    "gemma2": ("softcap",),
    "cohere2": ("all logits .its log-probabilities differ",),
    "llama4": ("all logits", "log-probabilities differ"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNUSUAL])
def test_route(architecture: str, dtype: Any, tmp_path: Path) -> None:
    """Short cuts are taken where they are right, in bfloat16 too, and what is not taken is said."""
    model = load_model(str(save_tiny_checkpoint(tmp_path / "model", architecture)), dtype, "cpu")
    route = prepare(model, [row(range(4, 40), range(40, 60), range(70, 86))])
    reasons = REASONS.get(architecture, ())
    if (architecture, dtype) == ("mamba", "bfloat16"):  # it turns its hidden states into bfloat16 for the head
        reasons = ("all logits .expected m1 and m2", *reasons)
    assert len(route.reasons) == len(reasons)
    for pattern, reason in zip(reasons, route.reasons, strict=True):
        assert re.search(pattern, reason)
    assert route.groups == (not reasons or architecture == "cohere2")
    assert route.head == (not any(pattern.startswith("all logits") for pattern in reasons))


def test_other_calls_are_what_they_were(tmp_path: Path) -> None:
    """A prepared model still answers, with a cache and with masks."""
    folder = save_tiny_checkpoint(tmp_path / "model", "gemma3")
    model, plain = (load_model(str(folder), "float32", "cpu") for _ in range(2))
    prepare(model, rows_of(folder, ragged_pairs(1))[:1])
    ids = torch.arange(5, 35)[None]
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, plain(ids).logits)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_model_that_makes_its_own_positions_is_padded(tmp_path: Path) -> None:
    """In bfloat16 as well, where a shift of positions can be as small as rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = load_model(str(save_tiny_checkpoint(tmp_path / "model")), "float32", "cpu").to(dtype)
        own = model.model.forward
        model.model.forward = lambda *a, position_ids=None, own=own, **k: own(*a, **k)
        route = prepare(model, [row(range(4, 20), range(30, 50), range(60, 80))])
        assert not route.groups and "positions" in route.reasons[0]


def test_a_model_that_depends_on_the_batch_is_refused(tmp_path: Path) -> None:
    model: Any = load_model(str(save_tiny_checkpoint(tmp_path / "model", "mamba")), "float32", "cpu")
    layer = model.backbone.layers[0]
    own = layer.forward
    layer.forward = lambda hidden, **k: own(hidden - hidden.mean(0) / 2, **k)
    with pytest.raises(ModelError, match=r"expected a causal language model .* use another student"):
        prepare(model, [row(range(4, 20), range(30, 50), range(60, 70))])


def test_attention_by_torchs_own_kernel_is_the_same(tmp_path: Path) -> None:
    """What accelerators use, and a CPU where attention has dropout: here one so small that nothing is dropped."""
    for architecture in ("llama", "gpt_neox", "gemma3_tied", "gpt2"):
        folder = save_tiny_checkpoint(tmp_path / architecture, architecture)
        rows = rows_of(folder, ragged_pairs(4))
        trainer = trainer_of(folder, LOSSES["orpo"], tmp_path)
        expected = real_step(trainer, rows)
        kernels: list[str] = []
        for module in trainer.model.modules():
            for name in ("attention_dropout", "attn_dropout"):
                if hasattr(module, name):
                    kernels.append(name)
                    setattr(module, name, nn.Dropout(1e-12) if name == "attn_dropout" else 1e-12)
        assert kernels
        assert_same(real_step(trainer, rows), expected, 1e-5)


def test_scores_of_each_trace_and_prompt(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model")
    model, plain = load_model(str(folder), "float32", "cpu"), reference(folder)
    rows = [row((3, 4, 5), (6, 7), (8,)), row((3, 4, 5), (8,), (6, 7, 8)), row((9,), (6, 7), (6, 7))]
    prepare(model, rows[:1])
    found = score(model, collate(rows, True), 2.0)
    assert len(found.tokens) == 4 and found.mean_chosen_tokens == 2.0
    for number, one in enumerate(rows):
        for side, trace in ((found.chosen, one.chosen), (found.rejected, one.rejected)):
            at = side[number]
            prompt, response = naive_nll(plain, one.prompt, trace)
            assert found.logp_sum[at].item() == pytest.approx(-response.sum().item(), rel=1e-5)
            assert found.prompt_logp_sum[at].item() == pytest.approx(-prompt.sum().item(), rel=1e-5)
            assert (found.tokens[at], found.prompt_tokens[at]) == (len(trace), len(one.prompt) - 1)


def test_adapted_model_is_prepared_inside(tmp_path: Path) -> None:
    """The hub's auto class gives the same model that prepare changes in place, with its type and state."""
    model: Any = AutoModelForCausalLM.from_pretrained(save_tiny_checkpoint(tmp_path / "model"), dtype="float32")
    before = list(model.state_dict())
    model.train()
    prepare(model, [row((3, 4), (5, 6), (7,))])
    assert model.training and list(model.state_dict()) == before
