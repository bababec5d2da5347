"""TRL's DPO trainer (1.16) against ours, on the same tokens: loss, gradients and metrics of `dpo` and `sppo`.

It computes its reference in the step; ours comes from the score stage. Its `logps` metrics are sums, ours means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_distill.given import read_given
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.objectives import Objective
from orpo_distill.stages.score import ScoreOptions, score
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.training import objective, ragged_pairs, ready_trainer, rows_of, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def trl_trainer(folder: Path, reference: Path, out: Path, loss_type: str, beta: float) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(out),
        beta=beta,
        loss_type=[loss_type],
        max_length=256,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}  # the trainer wants some; its batch is made below
    return DPOTrainer(
        model=load_model(str(folder), "float32", "cpu"),
        ref_model=load_model(str(reference), "float32", "cpu"),
        args=args,
        train_dataset=Dataset.from_list([row]),
        processing_class=load_tokenizer(str(folder)),
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    ("loss", "theirs", "beta"),
    [(objective("dpo", beta=0.3), "sigmoid", 0.3), (objective("sppo", beta=0.02), "sppo_hard", 0.02)],
)
def test_loss_metrics_and_gradients(
    architecture: str, loss: Objective, theirs: str, beta: float, tmp_path: Path
) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture, chat_template=CHAT_TEMPLATE)
    reference = save_tiny_checkpoint(tmp_path / "reference", architecture, seed=1, chat_template=CHAT_TEMPLATE)
    pairs = ragged_pairs(4)
    rows = rows_of(folder, pairs)
    trl = trl_trainer(folder, reference, tmp_path / "trl", theirs, beta)
    batch = trl.data_collator(
        [{"prompt_ids": [*row.prompt], "chosen_ids": [*row.chosen], "rejected_ids": [*row.rejected]} for row in rows]
    )
    expected = trl._compute_loss(trl.model, batch, return_outputs=False)
    expected.backward()

    scored = tmp_path / "scored"
    scored.mkdir()
    inputs = {"pairs": write_pairs(tmp_path / "pairs", pairs)}
    score(ScoreOptions(model=str(reference), policy="student-0", student=str(folder)), inputs, scored)
    ours = ready_trainer(folder, pairs, loss, tmp_path)
    ours.course.given.update(read_given(loss.requires, {"reference-scores": scored}, rows))
    assert ours.training_step(ours.model, {}).item() == pytest.approx(expected.item(), rel=1e-5)
    line = ours._step.line(1, ours._step.sums.tolist(), 0.0, 0.0)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        (value,) = trl._metrics["eval"][name]  # as `load_model` leaves it
        assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    gradients = dict(trl.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        assert torch.allclose(weight.grad, gradients[name].grad, rtol=1e-3, atol=1e-5 * weight.grad.abs().max()), name
