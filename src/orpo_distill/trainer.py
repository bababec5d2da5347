"""The trainer: transformers' own, whose step is a whole optimizer step of groups.

Checkpoints, schedules, mixed precision, adapters and trackers are transformers'. The batch that its loop hands
over is empty: step number n of the run trains on entry n of the course, in micro-batches dealt out to the processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_distill.checkpoints import damaged, seal, sweep
from orpo_distill.component import blamed, type_name
from orpo_distill.errors import OrpoDistillError, RunError, TrainingError, ran_out_of_memory
from orpo_distill.given import Given, with_given
from orpo_distill.groups import Row, distinct_traces, written_for
from orpo_distill.interrupt import Stop
from orpo_distill.models import restore, save_checkpoint
from orpo_distill.objectives import Objective
from orpo_distill.packing import Size, collate, micro_batches, packed_tokens, padded_tokens
from orpo_distill.progress import say
from orpo_distill.records import derive_seed
from orpo_distill.rollouts import Writer, rollout_seeds
from orpo_distill.scoring import prepare, score
from orpo_distill.steps import Step, means
from orpo_distill.teaching import Teacher

CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Course:
    """What a stage trains on: the rows of each of its optimizer steps, the first of which is the run's `first_step`."""

    steps: Sequence[Sequence[Row]]
    first_step: int
    steps_per_round: int
    objective: Objective
    tokens_per_batch: int
    log: Path  # one JSON line a step
    given: Given = field(default_factory=dict)  # what other models gave the traces
    teacher: Teacher | None = None  # where the objective requires its distribution

    @property
    def last_step(self) -> int:
        """How many steps the run has had when the course is done."""
        return self.first_step + len(self.steps)

    def rows(self, step: int) -> Sequence[Row]:
        """The rows of the run's optimizer step number `step`, from 0."""
        return self.steps[step - self.first_step]


@dataclass(frozen=True)
class Watch:
    """What watches the training: a signal to stop, the clock for checkpoints, the progress bar."""

    stop: Stop
    checkpoint_minutes: float
    advance: Callable[[int], None]


def run(
    model: nn.Module, tokenizer: Any, args: TrainingArguments, course: Course, watch: Watch, start: Path | None
) -> None:
    """Train `model` to the end of the course, from the checkpoint `start` if there is one, and save a last checkpoint.

    Raises TrainingError where the loss is not finite or memory runs out, RunError for a checkpoint that cannot be read
    or written.
    """
    trainer = None
    try:
        trainer = GroupTrainer(model, tokenizer, args, course, watch)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            rows, size = (trainer.under_way, trainer.size) if trainer else ((), packed_tokens)
            raise out_of_memory(rows, size, course.tokens_per_batch) from error
        raise


class GroupTrainer(Trainer):
    """Trains a model along a course. `tokenizer` is saved beside the weights."""

    def __init__(self, model: nn.Module, tokenizer: Any, args: TrainingArguments, course: Course, watch: Watch) -> None:
        super().__init__(model=model, args=args)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self, watch))
        self.course = course
        self.tokenizer = tokenizer
        self.writer = self._writer(model)  # of texts in the step
        longest = max((row for step in course.steps for row in step), key=lambda row: row.length)
        route = prepare(model, [longest], bool(args.activation_checkpointing))
        self.size = packed_tokens if route.groups else padded_tokens
        for reason in route.reasons if args.process_index == 0 else ():
            say(f"  {type(model).__name__}: {reason}; training is right, but slower and larger")
        self.under_way: Sequence[Row] = ()  # the rows of the micro-batch in memory
        self._step: Step
        self._pending: list[Step] = []  # steps not yet in the log
        self._window: list[dict[str, Any]] = []  # log lines since trackers were told

    def _writer(self, model: nn.Module) -> Writer | None:
        writing, teacher = self.course.objective.writing, self.course.teacher
        return Writer(model, self.tokenizer, writing, teacher.model if teacher else None) if writing else None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One empty batch a step, on every process."""
        return DataLoader(range(self.course.steps_per_round), batch_size=1, collate_fn=_empty)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One optimizer step's gradients: the mean loss over its pairs on all processes. Returns that mean."""
        number = self.state.global_step
        world: int = self.args.world_size
        # Random numbers (dropout) are a function of the step, so that no interruption can shift them.
        torch.manual_seed(derive_seed(self.args.seed, "dropout", number, self.args.process_index))
        model.train()
        rows = self._written(number, self.course.rows(number))
        batches = micro_batches(rows, self.course.tokens_per_batch, world, self.size)
        own = batches[self.args.process_index :: world]
        self._step = Step(number, rows, self._get_learning_rate(), self._beside(rows))
        for place, batch in enumerate(own, start=1):
            last = place == len(own)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                # Every process does the same number of passes, for each is waited for. One to spare weighs nothing.
                self._pass(model, batch or batches[0], counts=bool(batch))
        mean: Tensor = self._step.loss_sum / len(rows)
        return mean * world  # transformers averages it over processes

    def _written(self, number: int, rows: Sequence[Row]) -> Sequence[Row]:
        """The step's rows, with what the student writes for them now where the objective wants that."""
        writing = self.course.objective.writing
        if writing is None or self.writer is None:
            return rows
        drawn = written_for(rows, writing.share, self.args.seed, number)
        seeds = rollout_seeds(rows, self.args.seed, number)
        own = drawn[self.args.process_index :: self.args.world_size]
        teacher = self.course.teacher
        read = [(teacher.row(rows[place]) if teacher else rows[place]).prompt for place in own]
        with self.accelerator.autocast():
            texts = self.writer([rows[place].prompt for place in own], [seeds[place] for place in own], read)
        found = {place: text.tokens for place, text in zip(own, texts, strict=True)}
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            found = dict(gather_object([*found.items()]))
        return [row.written(found.get(place, ()), writing.keeps_chosen) for place, row in enumerate(rows)]

    def _beside(self, rows: Sequence[Row]) -> dict[str, int]:
        """What a step costs beside scoring: response tokens that the teacher reads, and that the student writes."""
        found = {}
        if teacher := self.course.teacher:
            found["teacher_tokens"] = sum(len(trace) for _, trace in distinct_traces(map(teacher.row, rows)))
            if self.writer and self.writer.writing.teacher_share:  # it reads along while the texts are written
                found["teacher_tokens"] += sum(len(row.rollout) for row in rows)
        if self.writer:
            found["written_tokens"] = sum(len(row.rollout) for row in rows)
        return found

    def _pass(self, model: nn.Module, rows: Sequence[Row], counts: bool) -> None:
        """Forward and backward of a micro-batch. The gradient is divided once, by the step's number of pairs."""
        step, objective, self.under_way = self._step, self.course.objective, rows
        batch = collate(rows, objective.scores_prompt, str(self.args.device))
        teacher = self.course.teacher
        against = teacher.read(rows, batch) if teacher else None
        scored = score(model, batch, step.mean_chosen_tokens(objective.scores_prompt), against)
        if teacher and scored.compared:
            teacher.require_finite(scored.compared, rows, batch)
        scored = replace(scored, mean_rollout_tokens=step.mean_rollout_tokens)
        with blamed(objective):
            loss = objective(with_given(scored, rows, self.course.given))
        if loss.per_pair.shape != (len(rows),):
            raise TrainingError(
                f"expected a loss a pair ({len(rows)}) of {type_name(type(objective))}, found the shape "
                f"{tuple(loss.per_pair.shape)}; `per_pair` must not be reduced"
            )
        # Gradients are averaged over processes afterwards, hence the factor.
        self.accelerator.backward(loss.per_pair.sum() * (counts * self.args.world_size / len(step.rows)))
        values = torch.stack([loss.per_pair.detach(), *loss.metrics.values()])
        step.add(rows, values * counts, ("loss", *loss.metrics))
        if len(scored.rejected):
            step.add_rejected((scored.logp_sum.detach() / scored.tokens)[scored.rejected].max().exp() * counts)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._step.grad_norm = norm
        finite = torch.isfinite(torch.cat([values[0] for values in self._step.values])).all()
        if norm is not None:
            finite = finite & torch.isfinite(torch.as_tensor(norm)).to(finite.device)
        if self.any_process(not finite.item()):
            raise self._not_finite()
        self._pending.append(self._step)
        return norm

    def _not_finite(self) -> TrainingError:
        """The error for a loss or gradient that is not finite. All processes must call it together."""
        bad = self._step.not_finite()
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            bad = gather_object(bad)
        advice = "lower train.learning_rate or, if this is the first step, look for broken weights in the student"
        if not bad:
            longest = max(self._step.rows, key=lambda row: row.length)
            found = f"a gradient norm of {self._step.grad_norm}, though every row's loss is finite"
            return TrainingError(
                f"expected finite gradients at step {self._step.number + 1}, found {found} (the longest of "
                f"{len(self._step.rows)} rows is {longest.name}); {advice}"
            )
        more = f" and {len(bad) - 1} more of its {len(self._step.rows)} rows" if len(bad) > 1 else ""
        return TrainingError(
            f"expected a finite loss at step {self._step.number + 1}, found {bad[0]}{more}; {advice}; "
            "if it is one row alone, remove that row"
        )

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` holds on any process. All processes must call it together."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device)).item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell trackers: what transformers logs, and the method's metrics as means over the steps since last time."""
        self._flush()
        super().log({**means(self._window), **logs}, start_time)
        self._window.clear()

    def _flush(self) -> None:
        """Append the steps that are not yet in the log. All processes must call it together."""
        if not self._pending:
            return
        sums = torch.stack([step.sums for step in self._pending])  # (S, K)
        highest = torch.stack([step.rejected_max for step in self._pending])  # (S,)
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
            highest = self.accelerator.gather(highest[None]).amax(0)
        norms = torch.stack([torch.as_tensor(step.grad_norm, dtype=torch.float32) for step in self._pending])
        numbers = zip(self._pending, sums.tolist(), highest.tolist(), norms.tolist(), strict=True)
        a_round = self.course.steps_per_round
        lines = [step.line(step.number // a_round + 1, *values) for step, *values in numbers]
        if self.is_world_process_zero():
            with self.course.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._window += lines
        self._pending.clear()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, configuration and tokenizer. Unlike transformers, no pickled arguments."""
        if self.args.should_save:
            model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            save_checkpoint(model, self.tokenizer, Path(str(output_dir)), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._flush()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
                sweep(folder.parent, CHECKPOINTS_KEPT)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(
                f"expected to write a checkpoint in {folder.parent}, found: {error}; make room on that disk and run "
                "the same command: it goes on from the last checkpoint"
            ) from error
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a whole model come through `from_pretrained`, which knows how the files name them.

        transformers' trainer reads them by name and leaves out, silently, those that are saved under another one: the
        head of GPT-NeoX, the experts of Mixtral.
        """
        target: Any = self.model if model is None else model
        with _reading(resume_from_checkpoint):
            if hasattr(target, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                restore(target, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Not needed: every step sets its own seed."""


class _Flow(TrainerCallback):
    """Says after each step whether to save and whether to stop."""

    def __init__(self, trainer: GroupTrainer, watch: Watch) -> None:
        self._trainer = trainer
        self._watch = watch
        self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._watch.advance(1)
        done = state.global_step >= self._trainer.course.last_step
        overdue = time.monotonic() - self._saved >= self._watch.checkpoint_minutes * 60
        save = self._trainer.any_process(overdue and state.is_world_process_zero)
        stop = self._trainer.any_process(self._watch.stop.requested)
        control.should_log |= done
        control.should_save |= save or stop or done
        control.should_training_stop |= stop or done
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()


def out_of_memory(rows: Sequence[Row], size: Size, tokens_per_batch: int) -> TrainingError:
    """The error for a micro-batch that does not fit, with the setting to lower and the longest row."""
    if not rows:
        return TrainingError(
            "expected the student to fit into memory, found that it does not; use train.dtype: bfloat16, train.lora or "
            "a smaller student"
        )
    longest = max(rows, key=lambda row: row.length)
    lower = f"lower train.tokens_per_batch (now {tokens_per_batch})"
    if len(rows) == 1:
        lower = "set train.gradient_checkpointing: true, or lower train.max_length and pairs.max_response_tokens"
    return TrainingError(
        f"expected a micro-batch of {len(rows)} pairs ({size(rows)} tokens) to fit into memory, found that it "
        f"does not; its longest row has {longest.length} tokens: {longest.name}; {lower}"
    )


def _empty(_: Any) -> dict[str, Any]:
    return {}


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read is the checkpoint's fault."""
    try:
        yield
    except OrpoDistillError:
        raise
    except Exception as error:
        raise damaged(Path(str(checkpoint)), error) from error
