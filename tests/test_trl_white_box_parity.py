"""TRL 1.16's experimental GKD trainer and GOLD's ULD loss against ours, on the same tokens: loss and gradients.

Known differences of GKD. TRL takes the mean over all tokens of a batch (our `reduction: batch_tokens`); uses its
temperature in sampling only, not in the loss; tosses one coin a batch whether the student writes its texts, where we
toss one a problem; may let the teacher write others (`seq_kd`), where our chosen traces are the teacher's already; and
lets the teacher read the student's prompt. What the students write is not compared: only the loss of given texts is.

Known differences of ULD. GOLD's "observed" merging takes the logits one place too late (at a token, not before it), so
they are handed over moved by one; the end of sequence counts here, which it skips by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from orpo_distill.alignment import align
from orpo_distill.groups import Row
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives.gkd import Gkd
from orpo_distill.samplers.prompts import encode_prompt
from orpo_distill.teaching import Teacher, TeacherOptions
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.test_alignment import STUDENT, TEACHER
from tests.training import objective, ragged_pairs, ready_trainer, rows_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]


def our_step(folder: Path, teacher: Path, name: str, out: Path, **options: Any) -> tuple[float, Any, list[Row]]:
    """Loss, model with gradients and rows of one step of ours."""
    pairs = ragged_pairs(4)
    rows = rows_of(folder, pairs, with_rejected=False)
    loss = objective(name, **options)
    ours = ready_trainer(folder, pairs, loss, out)
    settings = TeacherOptions(model=str(teacher), dtype="float32")
    reader = Teacher(settings, loss, load_tokenizer(str(folder)), rows)
    ours.course = replace(ours.course, steps=[rows], teacher=reader)
    return ours.training_step(ours.model, {}).item(), ours.model, rows


def assert_same_gradients(found: Any, expected: Any) -> None:
    gradients = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        theirs = gradients[name].grad
        assert torch.allclose(weight.grad, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max()), name


def gkd_trainer(folder: Path, teacher: Path, out: Path, beta: float) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(
        output_dir=str(out), beta=beta, temperature=0.5, max_length=256, report_to="none", use_cpu=True, bf16=False
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # it wants some, and uses none
    return GKDTrainer(
        model=load_model(str(folder), "float32", "cpu"),
        teacher_model=load_model(str(teacher), "float32", "cpu"),
        args=args,
        train_dataset=Dataset.from_list([{"messages": messages}]),
        processing_class=load_tokenizer(str(folder)),
    )


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The batch as TRL's collator lays it out: padding and prompts have no label."""
    ids = [torch.tensor([*row.prompt, *row.chosen]) for row in rows]
    labels = [torch.tensor([*[-100] * len(row.prompt), *row.chosen]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@pytest.mark.parametrize(("architecture", "beta"), [("llama", 0.3), ("gpt_neox", 0.0), ("qwen3", 1.0)])
def test_gkd(architecture: str, beta: float, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture, chat_template=CHAT_TEMPLATE)
    teacher = save_tiny_checkpoint(tmp_path / "teacher", seed=1, chat_template=CHAT_TEMPLATE)
    options = {"beta": beta, "reduction": "batch_tokens", "student_share": 0.0}
    value, model, rows = our_step(folder, teacher, "gkd", tmp_path, **options)
    theirs = gkd_trainer(folder, teacher, tmp_path / "trl", beta)
    expected = theirs.compute_loss(theirs.model, padded(rows))
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, theirs.model)


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_temperature_of_the_divergence(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 5, 7).unbind()
    expected = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=0.6, reduction="none"
    )
    loss = Gkd(beta=beta, temperature=0.6)
    found = loss.divergence(student.log_softmax(-1), teacher.log_softmax(-1))
    assert torch.allclose(found, expected[0].sum(-1), rtol=1e-4, atol=1e-6)


def gold_loss() -> Any:
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = {
        "uld_crossentropy_weight": 0.0,
        "uld_distillation_weight": 1.0,
        "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "use_extended_uld": True,
        "uld_token_merge_strategy": "observed",
    }
    return ULDLoss(SimpleNamespace(**settings))


def before(model: Any, prompt: Sequence[int], text: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and, at each place, the logits that predict the token there: (1, S), (1, S), (1, S, V)."""
    ids = torch.tensor([[*prompt, *text]])
    labels = torch.tensor([[*[-100] * len(prompt), *text]])
    return ids, labels, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.roll(1, dims=1)


def offsets(tokenizer: Any, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Where in the text each token begins and ends, (1, S, 2); one byte for the end of sequence."""
    ends = [len(tokenizer.decode(text[: count + 1])) for count in range(len(text) - 1)]
    ends.append(ends[-1] + 1)
    pairs = zip([0, *ends[:-1]], ends, strict=True)
    return torch.tensor([[*[(0, 0)] * len(prompt), *pairs]])


def test_uld(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", "gpt_neox", merges=STUDENT)
    teacher = save_tiny_checkpoint(tmp_path / "teacher", "llama", seed=1, merges=TEACHER, chat_template=CHAT_TEMPLATE)
    value, model, rows = our_step(folder, teacher, "uld", tmp_path, weight=1.0)
    theirs, reader = (load_model(str(each), "float32", "cpu") for each in (folder, teacher))
    own, other = (load_tokenizer(str(each)) for each in (folder, teacher))
    read = align([(row.pair.chosen, False) for row in rows], own, other)
    loss, total = gold_loss(), torch.zeros(())
    for row in rows:
        prompt, text = encode_prompt(other, row.pair.prompt), read[row.pair.chosen, False].teacher
        ids, labels, logits = before(theirs, row.prompt, row.chosen)
        with torch.no_grad():
            read_ids, read_labels, read_logits = before(reader, prompt, text)
        places = offsets(own, row.prompt, row.chosen), offsets(other, prompt, text)
        total = total + loss(logits, read_logits, labels, read_labels, ids, read_ids, *places)
        total = total + cross_entropy(logits[0], labels[0])
    mean = total / len(rows)
    mean.backward()
    assert value == pytest.approx(mean.item(), rel=1e-5)
    assert_same_gradients(model, theirs)
