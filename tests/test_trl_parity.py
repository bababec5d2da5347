"""TRL's ORPO trainer (1.16, experimental) against ours with its two differences switched on.

Its likelihood covers prompt and response, pooled over the batch's tokens. Texts are short of `max_length` and none is
cut, because it truncates and ends every answer with an end-of-sequence token.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.samplers.prompts import render
from tests.checkpoints import CHAT_TEMPLATE, save_tiny_checkpoint
from tests.training import objective, ragged_pairs, ready_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    # TRL 1.16 uses names that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]


def trl_trainer(folder: Path, rows: list[dict[str, str]], out: Path) -> Any:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(
        output_dir=str(out),
        beta=0.7,
        max_length=256,
        per_device_train_batch_size=len(rows),
        report_to="none",
        use_cpu=True,
    )
    model = load_model(str(folder), "float32", "cpu")
    tokenizer = load_tokenizer(str(folder))
    return ORPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_loss_metrics_and_gradients(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "model", architecture, chat_template=CHAT_TEMPLATE)
    pairs = [replace(pair, rejected_cut=False) for pair in ragged_pairs(4)]
    tokenizer = load_tokenizer(str(folder))
    rows = [{"prompt": render(tokenizer, p.prompt), "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    theirs = trl_trainer(folder, rows, tmp_path / "trl")
    batch = theirs.data_collator(list(theirs.train_dataset))
    loss, metrics = theirs.get_batch_loss_metrics(theirs.model, batch)
    loss.backward()

    ours = ready_trainer(folder, pairs, objective(weight=0.7, nll_on="full", nll_reduction="batch_tokens"), tmp_path)
    assert ours.training_step(ours.model, {}).item() == pytest.approx(loss.item(), rel=1e-5)
    line = ours._step.line(1, ours._step.sums.tolist(), 0.0, 0.0)
    for name, value in metrics.items():
        if not name.startswith("logits/"):
            assert line[name] == pytest.approx(value, rel=1e-4), name
    expected = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        assert torch.allclose(weight.grad, expected[name].grad, rtol=1e-3, atol=1e-5), name
