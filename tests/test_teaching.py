"""Whole distributions of a teacher beside the student's, packed and in chunks: against a text at a time in float64."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_distill import head
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.groups import Row, tokenize
from orpo_distill.head import Against, Logits, Spans, compare
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives import Compared, Loss, Objective, ScoredGroups, needed
from orpo_distill.objectives.gkd import Gkd, jensen_shannon
from orpo_distill.packing import collate
from orpo_distill.records import Message, Pair
from orpo_distill.samplers.prompts import encode_prompt
from orpo_distill.sampling import with_prefix
from orpo_distill.scoring import prepare, score
from orpo_distill.teaching import Teacher, TeacherOptions
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.test_alignment import STUDENT, TEACHER
from tests.test_scoring import assert_same, gradients, real_step, reference, trainer_of
from tests.training import objective, ragged_pairs, rows_of

PREFIX = "Be brief."
GKD = {"student_share": 0.0}
SIGNS = 2e-3  # where two probabilities are equal but for rounding, so is the sign of the distance's gradient


class BothSides(Gkd):
    """The divergence on the chosen side minus half of that on the rejected one: a loss that needs every trace."""

    requires = frozenset({"rejected", "teacher_distribution"})

    def __call__(self, batch: ScoredGroups) -> Loss:
        compared = needed(batch.compared)
        means = compared.by_trace(compared.divergence, len(batch.tokens)) / batch.tokens
        return Loss(means[batch.chosen] - 0.5 * means[batch.rejected], {})


def teacher_of(folder: Path, student: Path, loss: Objective, rows: Sequence[Row], **options: Any) -> Teacher:
    settings = TeacherOptions(model=str(folder), dtype="float32", **options)
    return Teacher(settings, loss, load_tokenizer(str(student)), rows)


def taught_step(folder: Path, teacher: Path, loss: Objective, rows: Sequence[Row], budget: int, **section: Any) -> Any:
    """Loss and gradients as training makes them."""
    trainer = trainer_of(folder, loss, folder.parent, budget, **section)
    trainer.course = replace(trainer.course, teacher=teacher_of(teacher, folder, loss, rows, prefix=PREFIX))
    return real_step(trainer, rows)


def naive_logps(model: Any, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Log-probabilities (T, V) of what comes at the place of each of the text's tokens."""
    ids = torch.tensor([[*prompt, *text]])
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    return found.log_softmax(-1)


def teachers_prompt(folder: Path, row: Row) -> list[int]:
    return encode_prompt(load_tokenizer(str(folder)), with_prefix(row.pair.prompt, PREFIX))


def naive_divergence(
    student: Any, teacher: Any, prompt: list[int], row: Row, text: Sequence[int], beta: float
) -> Tensor:
    width = min(student.get_output_embeddings().weight.shape[0], teacher.get_output_embeddings().weight.shape[0])
    ours = naive_logps(student, row.prompt, text)[:, :width].log_softmax(-1)
    with torch.no_grad():
        theirs = naive_logps(teacher, prompt, text)[:, :width].log_softmax(-1)
    return jensen_shannon(ours, theirs, beta).mean()


def naive_step(folder: Path, teacher: Path, rows: Sequence[Row], beta: float, both: bool = False) -> Any:
    """Loss and gradients, row by row."""
    student, reader = reference(folder), reference(teacher)
    losses = []
    for row in rows:
        prompt = teachers_prompt(teacher, row)
        loss = naive_divergence(student, reader, prompt, row, row.chosen, beta)
        if both:
            loss = loss - 0.5 * naive_divergence(student, reader, prompt, row, row.rejected, beta)
        losses.append(loss)
    value = torch.stack(losses).mean()
    value.backward()
    return value.item(), gradients(student)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("architecture", "reader"),
    [
        ("gemma3_tied", "gemma2"),
        ("cohere2", "mamba"),
        pytest.param("gpt_neox", "llama", marks=SLOW),
        pytest.param("mamba", "llama", marks=SLOW),
    ],
)
def test_step_equals_one_pair_at_a_time(architecture: str, reader: str, tmp_path: Path) -> None:
    """Gemmas cap their logits, cohere2 makes them itself, mamba pads; 64 tokens a micro-batch cut groups."""
    folder = save_tiny_checkpoint(tmp_path / "model", architecture)
    teacher = save_tiny_checkpoint(tmp_path / "teacher", reader, seed=1, chat_template=CHAT_TEMPLATE)
    rows = rows_of(folder, ragged_pairs(3), with_rejected=False)
    loss = objective("gkd", beta=0.3, **GKD)
    expected = naive_step(folder, teacher, rows, 0.3)
    for budget in (1000, 64):
        assert_same(taught_step(folder, teacher, loss, rows, budget), expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_both_sides_and_chunks_of_a_few_positions(beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected sides, some of them cut, have spans of their own."""
    monkeypatch.setattr(head, "COMPARED", 1)
    monkeypatch.setattr(head, "ROWS", 7)
    folder = save_tiny_checkpoint(tmp_path / "model")
    teacher = save_tiny_checkpoint(tmp_path / "teacher", "qwen3", seed=1)
    rows = rows_of(folder, ragged_pairs(3))
    expected = naive_step(folder, teacher, rows, beta, both=True)
    assert_same(taught_step(folder, teacher, BothSides(beta=beta, **GKD), rows, 100), expected)


def test_adapters(tmp_path: Path) -> None:
    """LoRA's second factor begins at 0, so the loss is the base model's, and its gradients are those of the weights."""
    folder = save_tiny_checkpoint(tmp_path / "model")
    teacher = save_tiny_checkpoint(tmp_path / "teacher", seed=1)
    rows = rows_of(folder, ragged_pairs(3), with_rejected=False)
    expected = naive_step(folder, teacher, rows, 0.5)
    lora = {"r": 2, "alpha": 2, "target_modules": ["q_proj"]}
    value, found = taught_step(folder, teacher, objective("gkd", **GKD), rows, 100, lora=lora)
    assert value == pytest.approx(expected[0], rel=1e-5)
    second = {name: gradient for name, gradient in found.items() if "lora_B" in name}
    assert len(second) == 2 and all(gradient.any() for gradient in second.values())


def test_embeddings_padded_to_another_size_are_one_vocabulary(tmp_path: Path) -> None:
    folder, teacher = (
        save_tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (("model", 0), ("teacher", 1))
    )
    padded: Any = load_model(str(teacher), "float32", "cpu")
    with torch.random.fork_rng():
        padded.resize_token_embeddings(320)
    padded.save_pretrained(teacher)
    rows = rows_of(folder, ragged_pairs(3), with_rejected=False)
    found = taught_step(folder, teacher, objective("gkd", **GKD), rows, 1000)
    assert_same(found, naive_step(folder, teacher, rows, 0.5))


def test_a_text_counts_its_own_tokens_whatever_stands_beside_it(tmp_path: Path) -> None:
    """Nothing behind the end of a short text counts, packed or padded, with a long text beside it or without."""
    for architecture in ("llama", "mamba"):
        folder = save_tiny_checkpoint(tmp_path / architecture, architecture)
        teacher = save_tiny_checkpoint(tmp_path / f"{architecture}-teacher", architecture, seed=1)
        rows = rows_of(folder, pairs_of("ab", "a" * 60, "bb" * 9), with_rejected=False)
        model: Any = load_model(str(folder), "float32", "cpu")
        prepare(model, rows)
        reader = teacher_of(teacher, folder, Gkd(**GKD), rows)
        together, alone = scored(model, reader, rows), scored(model, reader, rows[:1])
        assert together.compared is not None and alone.compared is not None
        own = together.compared.trace == together.chosen[0]
        assert own.sum() == len(rows[0].chosen) == 3
        for name in ("logp", "teacher_logp", "divergence"):
            one, other = (getattr(each.compared, name) for each in (together, alone))
            assert torch.allclose(one[own], other, atol=1e-5), name
        counts = torch.bincount(together.compared.trace)
        assert torch.equal(counts, together.tokens)


def pairs_of(*texts: str) -> list[Pair]:
    prompt = (Message("user", "why?"),)
    return [Pair(f"p{n}", prompt, text, "c", f"c{n}", f"r{n}", "teacher", "student-0") for n, text in enumerate(texts)]


def scored(model: Any, reader: Teacher, rows: Sequence[Row]) -> ScoredGroups:
    batch = collate(rows, False)
    with torch.no_grad():
        return score(model, batch, 1.0, reader.read(rows, batch))


def naive_uld(folder: Path, teacher: Path, rows: Sequence[Row], weight: float) -> tuple[Any, int]:
    """Loss and gradients, row by row, from the boundaries of the tokens' texts; and the most tokens that a span has."""
    student, reader = reference(folder), reference(teacher)
    ours, theirs = (load_tokenizer(str(each)) for each in (folder, teacher))
    losses, longest = [], 0
    for row in rows:
        read = tokenize([row.pair], theirs, 256, False)[0].chosen
        own = naive_logps(student, row.prompt, row.chosen)
        with torch.no_grad():
            other = naive_logps(reader, teachers_prompt(teacher, row), read)
        nll = -own.gather(1, torch.tensor(row.chosen)[:, None]).mean()
        distances = []
        for (a, b), (c, d) in naive_spans(ends_of(ours, row.chosen), ends_of(theirs, read)):
            longest = max(longest, b - a, d - c)
            merged = [logps[x].exp() for logps, x in ((own, a), (other, c))]
            for place in range(a + 1, b):
                merged[0] = merged[0] * own[place, row.chosen[place]].exp()
            for place in range(c + 1, d):
                merged[1] = merged[1] * other[place, read[place]].exp()
            one, two = (each.sort(descending=True).values for each in merged)
            width = max(len(one), len(two))
            one, two = (torch.cat([each, each.new_zeros(width - len(each))]) for each in (one, two))
            distances.append((one - two).abs().sum())
        losses.append(nll + weight * torch.stack(distances).mean())
    value = torch.stack(losses).mean()
    value.backward()
    return (value.item(), gradients(student)), longest


def ends_of(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Where each token ends in the text's letters; the last is the end of sequence."""
    return [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]


def naive_spans(ends: list[int], others: list[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    shared = sorted(set(ends) & set(others))
    stops = [(ends.index(place) + 1, others.index(place) + 1) for place in shared]
    starts = [(0, 0), *stops[:-1]]
    return [((a, b), (c, d)) for (a, c), (b, d) in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("architecture", ["gpt_neox", pytest.param("mamba", marks=SLOW)])
def test_uld_across_tokenizers_equals_a_loop_over_spans(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture, merges=STUDENT)
    teacher = save_tiny_checkpoint(tmp_path / "teacher", "llama", seed=1, merges=TEACHER, chat_template=CHAT_TEMPLATE)
    rows = rows_of(folder, ragged_pairs(5), with_rejected=False)
    expected, longest = naive_uld(folder, teacher, rows, 0.8)
    assert longest >= 2
    for budget in (1000, 60):
        found = taught_step(folder, teacher, objective("uld", weight=0.8), rows, budget)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert_same(found, expected, SIGNS)


def test_uld_with_one_tokenizer_has_a_span_a_token(tmp_path: Path) -> None:
    folder, teacher = (
        save_tiny_checkpoint(tmp_path / name, seed=seed) for name, seed in (("model", 0), ("teacher", 1))
    )
    rows = rows_of(folder, ragged_pairs(3), with_rejected=False)
    expected, longest = naive_uld(folder, teacher, rows, 1.5)
    assert longest == 1
    found = taught_step(folder, teacher, objective("uld"), rows, 100)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_same(found, expected, SIGNS)


def test_a_teacher_that_is_the_student_is_at_no_distance(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", merges=STUDENT)
    rows = rows_of(folder, ragged_pairs(3), with_rejected=False)
    model: Any = load_model(str(folder), "float32", "cpu")
    prepare(model, rows)
    for loss in (Gkd(**GKD), objective("uld")):
        found = scored(model, teacher_of(folder, folder, loss, rows), rows).compared
        assert found is not None and found.divergence.abs().max() < 1e-5
        assert torch.allclose(found.logp, found.teacher_logp, atol=1e-5)


def test_neither_models_logits_are_kept() -> None:
    """Of 200 positions and 5,000 words: what the backward pass holds is a small part of one model's logits."""
    words, count = 5_000, 200
    hidden, read = torch.randn(count, 4, requires_grad=True), torch.randn(count, 6)
    layer, other = nn.Linear(4, words, bias=False), nn.Linear(6, words, bias=False).requires_grad_(False)
    labels = torch.zeros(count, dtype=torch.long)
    nothing = torch.zeros(0, dtype=torch.long)
    spans = Spans(torch.arange(count), nothing, nothing)
    against = Against(Logits(read, other), labels, spans, spans, labels, Gkd().divergence, True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compare(Logits(hidden, layer), labels, against)
    for own in (hidden, layer.weight, other.weight):
        kept.pop(own.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < words * count * 4 / 50


def test_another_vocabulary_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    folder, teacher = (
        save_tiny_checkpoint(tmp_path / "model"),
        save_tiny_checkpoint(tmp_path / "teacher", merges=TEACHER),
    )
    rows = rows_of(folder, ragged_pairs(1), with_rejected=False)
    (teacher / "model.safetensors").unlink()
    expected = (
        r"expected a teacher with the student's vocabulary for gkd, found that 3 tokens differ \('ab' is .* None to"
    )
    with pytest.raises(ConfigError, match=expected):
        teacher_of(teacher, folder, Gkd(**GKD), rows)


def test_another_end_of_texts_is_refused(tmp_path: Path) -> None:
    """As of a base model and an instruct one: the student would learn an end that does not stop it."""
    template = "{%- for message in messages -%}{{ message.content + '<turn>' }}{%- endfor -%}"
    folder, teacher = (
        save_tiny_checkpoint(tmp_path / "model"),
        save_tiny_checkpoint(tmp_path / "teacher", chat_template=template),
    )
    rows = rows_of(folder, ragged_pairs(1), with_rejected=False)
    with pytest.raises(ConfigError, match="to end a text with the same token for gkd, found '<turn>' and '<eos>'"):
        teacher_of(teacher, folder, Gkd(**GKD), rows)


def test_a_context_that_is_too_short(tmp_path: Path) -> None:
    folder, teacher = (save_tiny_checkpoint(tmp_path / name) for name in ("model", "teacher"))
    rows = rows_of(folder, ragged_pairs(1), with_rejected=False)
    with pytest.raises(ConfigError, match="within the teacher's context, 256 tokens, found one of"):
        teacher_of(teacher, folder, Gkd(**GKD), rows, prefix="x" * 300)


def test_overflow_in_half_precision_names_the_row_and_the_remedy(tmp_path: Path) -> None:
    """Activations beyond 65,504 are infinite in float16 and ordinary in bfloat16."""
    folder, teacher = (save_tiny_checkpoint(tmp_path / name) for name in ("model", "teacher"))
    large: Any = load_model(str(teacher), "float32", "cpu")
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight.mul_(1e4)
        large.model.layers[0].mlp.gate_proj.weight.mul_(1e4)
    large.save_pretrained(teacher)
    rows = rows_of(folder, ragged_pairs(2), with_rejected=False)
    model: Any = load_model(str(folder), "float32", "cpu")
    prepare(model, rows)
    batch = collate(rows, False)
    for dtype in ("float16", "bfloat16"):
        options = TeacherOptions(model=str(teacher), dtype=dtype)
        reader = Teacher(options, Gkd(**GKD), load_tokenizer(str(folder)), rows)
        compared = score(model, batch, 1.0, reader.read(rows, batch)).compared
        assert isinstance(compared, Compared)
        if dtype == "bfloat16":
            reader.require_finite(compared, rows, batch)
            without = replace(compared, divergence=compared.divergence / 0)
            with pytest.raises(ModelError, match=r"finite divergence from the teacher .*, found inf for pairs\.jsonl:"):
                reader.require_finite(without, rows, batch)
            continue
        expected = (
            r"found nan for pairs.jsonl:\d+ \(problem p\d, chosen .*of type float16: set teacher.scorer_dtype to bfl"
        )
        with pytest.raises(ModelError, match=expected):
            reader.require_finite(compared, rows, batch)
