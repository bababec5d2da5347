"""What an optimizer step of training was made of, and its line in the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orpo_distill.groups import Row, distinct_traces
from orpo_distill.records import write_text

COUNTS = ("pairs", "traces", "tokens", "teacher_tokens", "written_tokens")
"""What a step's line counts. The last two stand there if a teacher reads the texts, if the student writes some."""


class Step:
    """What one process gathers in an optimizer step. Numbers stay on the device until they are logged."""

    def __init__(
        self, number: int, rows: Sequence[Row], learning_rate: float, beside: Mapping[str, int] | None = None
    ) -> None:
        self.number = number
        self.rows = rows
        self.learning_rate = learning_rate
        self.beside = beside or {}  # counts of what is done beside scoring
        self.grad_norm: Any = None
        self.names: tuple[str, ...] = ()
        self.values: list[Tensor] = []  # of each micro-batch (K, B): the loss and the metrics of its pairs
        self.passed: list[Row] = []
        self._highest: list[Tensor] = []

    def add(self, rows: Sequence[Row], values: Tensor, names: tuple[str, ...]) -> None:
        """Take in a micro-batch's loss (first) and metrics, (K, B)."""
        self.names = names
        self.values.append(values)
        self.passed += rows

    def add_rejected(self, highest: Tensor) -> None:
        """Take in the highest mean token probability among a micro-batch's rejected traces."""
        self._highest.append(highest)

    @property
    def loss_sum(self) -> Tensor:
        """The loss summed over this process's pairs."""
        return self.sums[0]

    @property
    def sums(self) -> Tensor:
        """(K,) the loss and the metrics summed over this process's pairs."""
        return torch.cat(self.values, dim=1).sum(1)

    @property
    def rejected_max(self) -> Tensor:
        """The highest mean token probability that a rejected trace had; 0 without rejected traces."""
        return torch.stack(self._highest).max() if self._highest else self.values[0].new_zeros(())

    def mean_chosen_tokens(self, with_prompt: bool) -> float:
        """Mean over the step's pairs, on all processes, of the chosen side's scored tokens."""
        total = sum(len(row.chosen) + (len(row.prompt) - 1 if with_prompt else 0) for row in self.rows)
        return total / len(self.rows)

    @property
    def mean_rollout_tokens(self) -> float:
        """The same of what the student wrote, or else the chosen side."""
        return sum(len(row.rollout or row.chosen) for row in self.rows) / len(self.rows)

    def not_finite(self) -> list[str]:
        """The rows of this process whose loss is not finite, with the loss."""
        losses = torch.cat([values[0] for values in self.values]).tolist()
        return [f"{loss} for {row.name}" for row, loss in zip(self.passed, losses, strict=True) if loss - loss != 0]

    def line(self, round_number: int, sums: Sequence[float], rejected_max: float, grad_norm: float) -> dict[str, Any]:
        """The step's line in the log. Nothing in it depends on time or machine."""
        traces = distinct_traces(self.rows)
        return {
            "step": self.number + 1,
            "round": round_number,
            **{name: value / len(self.rows) for name, value in zip(self.names, sums, strict=True)},
            "rejected_probability_max": rejected_max,
            "grad_norm": grad_norm,
            "learning_rate": self.learning_rate,
            "pairs": len(self.rows),
            "traces": len(traces),
            "tokens": sum(len(trace) for _, trace in traces),
            **self.beside,
        }


def cut_log(log: Path, step: int) -> None:
    """Drop the log's lines of steps after `step`: what a resumed run is about to do again."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(log, "".join(kept))


def means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of every metric that is one (the loss and the like are transformers' to log)."""
    own = {"step", "round", "loss", "grad_norm", "learning_rate", *COUNTS}
    names = [name for name in lines[0] if name not in own] if lines else []
    return {name: sum(line[name] for line in lines) / len(lines) for name in names}
