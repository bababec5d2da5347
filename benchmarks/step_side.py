"""One side of `orpo_step.py` in a process of its own: this trainer or TRL's, timed step by step.

    python benchmarks/step_side.py SPEC RESULT

SPEC is a JSON file with the fields of `Spec`, RESULT gets those of `Result`: seconds and peak memory of every optimizer
step after the first, which warms up. With one step alone it is the loss that is wanted, at the loaded weights. TRL's
side imports nothing of this project, so that it runs wherever TRL is installed. Both sides get the same token ids and
the same settings. Linux only. Exits with OUT_OF_MEMORY where the machine's memory does not do.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

OUT_OF_MEMORY = 3  # the exit code
Row = dict[str, list[int]]  # token ids of `prompt`, `chosen` and `rejected`


@dataclass(frozen=True)
class Spec:
    """What one process is to do."""

    side: Literal["ours", "trl"]
    model: str  # a checkpoint's folder
    steps: list[list[Row]]  # rows of each optimizer step; the first warms up
    batch: int  # in one forward pass. Ours: tokens; TRL: pairs
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: bool = False
    rate: bool = False  # measure the machine's matrix rate too


@dataclass
class Result:
    """What one process found."""

    seconds: list[float] = field(default_factory=list)  # of each step after the first
    peak_bytes: list[int] = field(default_factory=list)  # of each step after the first
    loss: float | None = None  # the mean over the pairs of the only step
    tokens: list[int] = field(default_factory=list)  # of each step after the first, prompt and traces once each; ours
    parameters: int = 0
    matrix_rate: float | None = None  # operations a second


def settings(spec: Spec, out: str) -> dict[str, Any]:
    """Training arguments of both sides: AdamW, clipping, no autocast, nothing logged."""
    return {
        "output_dir": out,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": spec.checkpointing,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


class Meter(TrainerCallback):
    """Times every optimizer step but the first, and reads the peak of each above what training needs anyway.

    That is the resident size after the first optimizer step, while the gradients are there: the model, gradients and
    optimizer state, and the libraries' own memory.
    """

    def __init__(self, result: Result) -> None:
        self._result = result
        self._standing = 0
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts; the peak is forgotten."""
        Path("/proc/self/clear_refs").write_text("5")
        self._started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the first update, before its gradients go: what stands."""
        if not self._standing:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self._standing = _memory("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """The clock stops."""
        control.should_save = False
        if state.global_step > 1:
            self._result.seconds.append(time.perf_counter() - self._started)
            self._result.peak_bytes.append(_memory("VmHWM") - self._standing)
        return control


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def ours(spec: Spec, model: Any, tokenizer: Any, out: str) -> Result:
    """Train with this project's trainer."""
    from transformers import TrainingArguments

    from orpo_distill.interrupt import Stop
    from orpo_distill.objectives.orpo import Orpo
    from orpo_distill.packing import packed_tokens
    from orpo_distill.trainer import Course, GroupTrainer, Watch

    result, log = Result(), Path(out) / "log.jsonl"
    # TRL's likelihood: of prompt and response, over the tokens of all pairs.
    objective = Orpo(weight=1.0, nll_on="full", nll_reduction="batch_tokens")
    steps = [_rows(step) for step in spec.steps]
    course = Course(steps, 0, len(steps), objective, tokens_per_batch=spec.batch, log=log)
    args = TrainingArguments(**settings(spec, out), num_train_epochs=1, per_device_train_batch_size=1)
    trainer = GroupTrainer(model, tokenizer, args, course, Watch(Stop(), 1e6, lambda _: None))
    trainer.add_callback(Meter(result))
    trainer.train()
    result.tokens = [packed_tokens(step) for step in steps[1:]]
    if len(steps) == 1:
        result.loss = json.loads(log.read_text())["loss"]
    return result


def _rows(step: list[Row]) -> list[Any]:
    """The pairs as the trainer takes them. Their texts are not used."""
    from orpo_distill.groups import Row as Tokenised
    from orpo_distill.records import Pair

    return [
        Tokenised(
            number,
            Pair("problem", (), "", "", f"chosen-{number}", f"rejected-{number}", "teacher", "student"),
            *(tuple(row[part]) for part in ("prompt", "chosen", "rejected")),
        )
        for number, row in enumerate(step, start=1)
    ]


def trl(spec: Spec, model: Any, tokenizer: Any, out: str) -> Result:
    """Train with TRL's ORPO trainer, or only compute the loss."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    result, pairs = Result(), len(spec.steps[0])
    args = ORPOConfig(
        **settings(spec, out),
        beta=1.0,
        max_length=1 << 16,  # rows are whole
        max_steps=len(spec.steps),
        per_device_train_batch_size=spec.batch,
        gradient_accumulation_steps=pairs // spec.batch,
        train_sampling_strategy="sequential",
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = ORPOTrainer(model=model, args=args, train_dataset=text, processing_class=tokenizer)
    # In place of what its tokenizer would make of text: the very rows that the other side gets, in its own columns.
    trainer.train_dataset = Dataset.from_list([_columns(row) for step in spec.steps for row in step])
    if len(spec.steps) == 1:
        with torch.no_grad():
            losses = [trainer.get_batch_loss_metrics(model, batch)[0] for batch in trainer.get_train_dataloader()]
        result.loss = torch.stack(losses).double().mean().item()
    else:
        trainer.add_callback(Meter(result))
        trainer.train()
    return result


def _columns(row: Row) -> dict[str, list[int]]:
    """A pair as TRL's `tokenize_row` leaves it."""
    prompt = row["prompt"]
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        columns[f"{side}_input_ids"] = prompt + row[side]
        columns[f"{side}_attention_mask"] = [1] * len(prompt + row[side])
        columns[f"{side}_labels"] = [-100] * len(prompt) + row[side]
    return columns


def matrix_rate(model: Any, tokens: int, repeats: int = 5) -> float:
    """Operations a second of the fastest product of the model's own shapes and type: `tokens` rows by a weight."""
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    rates = []
    for wide, deep in shapes:
        rows, weight = torch.randn(tokens, deep).to(model.dtype), torch.randn(wide, deep).to(model.dtype)
        for _ in range(repeats):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            rates.append(2 * tokens * wide * deep / (time.perf_counter() - start))
    return max(rates)


def _measure(spec: Spec) -> Result:
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.dtype)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        result = {"ours": ours, "trl": trl}[spec.side](spec, model, tokenizer, out)
    result.parameters = model.num_parameters()
    if spec.rate:
        result.matrix_rate = matrix_rate(model, 2048)
    return result


def _keep_within_memory() -> None:
    """Let an allocation fail that the machine has no memory for. Without, the kernel would kill some process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))


def main(spec_file: str, result_file: str) -> None:
    """Run what SPEC asks for and write RESULT."""
    _keep_within_memory()
    try:
        result = _measure(Spec(**json.loads(Path(spec_file).read_text())))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise SystemExit(OUT_OF_MEMORY) from error
        raise
    Path(result_file).write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(*sys.argv[1:])
