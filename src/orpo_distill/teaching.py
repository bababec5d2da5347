"""The teacher in a train stage: it reads what the student is trained on and lends its whole distributions.

Each text is read behind the prompt that the teacher was asked with itself, priming and prefix included, in its own chat
template. Where an objective compares token by token, the teacher reads the student's very tokens of the text, so both
must have one vocabulary; where it compares spans of text, the teacher reads its own (see `alignment`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from orpo_distill.alignment import Aligned, Starts, align
from orpo_distill.component import SPEED_ONLY, Options, blamed, type_name
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.groups import Row, Tokens
from orpo_distill.models import Dtype, load_model, load_tokenizer, pick_device
from orpo_distill.objectives import Compared, Objective
from orpo_distill.packing import Batch, collate
from orpo_distill.records import Message
from orpo_distill.samplers.hf import context_length
from orpo_distill.samplers.prompts import encode_each, end_of_response
from orpo_distill.sampling import with_prefix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from orpo_distill.head import Against, Spans


OTHERWISE = "or a method that works on texts: orpo, dpo, dadpo, uld"


class TeacherOptions(Options):
    """The checkpoint that reads the texts, and how."""

    model: str
    prefix: str = ""  # before the last user message: what only the teacher sees
    dtype: Dtype = "auto"
    device: Annotated[str, SPEED_ONLY] = "auto"
    trust_remote_code: bool = False


def require_one_vocabulary(
    objective: Objective, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Raise ConfigError where the objective compares tokens and these two do not mean the same by them.

    Nor may they end a text differently: the student would learn an end that does not stop it.
    """
    if objective.across_tokenizers:
        return
    own, other = student.get_vocab(), teacher.get_vocab()
    differing = [token for token in sorted(own.keys() | other.keys()) if own.get(token) != other.get(token)]
    if differing:
        token = differing[0]
        raise ConfigError(
            f"expected a teacher with the student's vocabulary for {type_name(type(objective))}, found that "
            f"{len(differing)} tokens differ ({token!r} is {other.get(token)} to the teacher, {own.get(token)} to the "
            f"student); take a student of the teacher's family, {OTHERWISE}"
        )
    if (end := end_of_response(student)) != (others := end_of_response(teacher)):
        raise ConfigError(
            f"expected teacher and student to end a text with the same token for {type_name(type(objective))}, found "
            f"{_said(teacher, others)} and {_said(student, end)}; give the student's tokenizer the teacher's chat "
            f"template or eos_token, {OTHERWISE}"
        )


def _said(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    return "none" if token is None else repr(tokenizer.convert_ids_to_tokens(token))


class Teacher:
    """A teacher that has been loaded, for texts of given rows and what the student writes to their prompts."""

    def __init__(
        self, options: TeacherOptions, objective: Objective, student: PreTrainedTokenizerBase, rows: Sequence[Row]
    ) -> None:
        """Load it. `student` is the student's tokenizer.

        Raises ModelError, and ConfigError for a vocabulary that differs or a context that is too short.
        """
        from orpo_distill.scoring import prepare

        self.options, self.objective = options, objective
        tokenizer = load_tokenizer(options.model, options.trust_remote_code)
        require_one_vocabulary(objective, student, tokenizer)
        self._prompts = _prompts(rows, tokenizer, options.prefix)
        self._aligned = _aligned(rows, student, tokenizer) if objective.across_tokenizers else {}
        self.device = pick_device(options.device)
        self.model: Any = load_model(options.model, options.dtype, self.device, options.trust_remote_code)
        longest = max(map(self.row, rows), key=lambda row: row.length)
        self._require_fitting(longest)
        self.reasons = prepare(self.model, [longest]).reasons  # why it is slower than it might be

    def row(self, row: Row) -> Row:
        """A row of the student's in the teacher's tokens, behind the teacher's prompt."""
        row = replace(row, prompt=self._prompts[row.pair.prompt])
        if not self.objective.across_tokenizers:
            return row
        chosen = self._aligned[row.pair.chosen, False].teacher
        rejected = self._aligned[row.pair.rejected, row.pair.rejected_cut].teacher if row.rejected else ()
        return replace(row, chosen=chosen, rejected=rejected)

    def read(self, rows: Sequence[Row], batch: Batch) -> Against:
        """What the student is compared with on the rows that it scores as `batch`."""
        import torch

        from orpo_distill.head import Against

        read = [self.row(row) for row in rows]
        self._require_fitting(max(read, key=lambda row: row.length))
        own = collate(read, False, self.device)
        with torch.no_grad():
            logits = self.model(packed=own, read=lambda logits, labels: logits)
        trace, ours, theirs = self._spans(rows, batch, own)

        def divergence(student: Tensor, teacher: Tensor) -> Tensor:
            with blamed(self.objective):
                return self.objective.divergence(student, teacher)

        same = not self.objective.across_tokenizers
        return Against(logits, own.labels, theirs, ours, trace, divergence, same)

    def _require_fitting(self, row: Row) -> None:
        if (limit := context_length(self.model)) is not None and row.length > limit:
            raise ConfigError(
                f"expected texts within the teacher's context, {limit} tokens, found one of {row.length} with its "
                "prompt; lower train.max_length, or objective.max_new_tokens where the student writes texts"
            )

    def require_finite(self, compared: Compared, rows: Sequence[Row], batch: Batch) -> None:
        """Raise ModelError, naming the row, where what the teacher says is not finite, or cannot be compared with."""
        import torch

        known = compared.teacher_logp.isfinite()
        bad = ~known | (compared.logp.isfinite() & ~compared.divergence.isfinite())
        if not bad.any():
            return
        at = int(bad.nonzero()[0])
        trace, sides = int(compared.trace[at]), zip(batch.chosen.tolist(), batch.rollout.tolist(), strict=True)
        row = next((row for row, side in zip(rows, sides, strict=True) if trace in side), rows[0])
        if known[at]:
            raise ModelError(
                f"expected a finite divergence from the teacher {self.options.model}, found "
                f"{compared.divergence[at].item()} for {row.name}; it may hold a token for impossible (a logit of "
                f"-inf), which not every divergence of {type_name(type(self.objective))} can follow: reverse KL cannot"
            )
        value, dtype = compared.teacher_logp[at].item(), next(self.model.parameters()).dtype
        advice = "set teacher.scorer_dtype to bfloat16 or float32, which hold larger ones, or look for broken weights"
        if value == -math.inf and dtype != torch.float16:
            advice = "it holds a token of this text for impossible: take a checkpoint without logits of -inf"
        raise ModelError(
            f"expected finite log-probabilities of the teacher {self.options.model}, found {value} for {row.name}; its "
            f"numbers are of type {str(dtype).removeprefix('torch.')}: {advice}"
        )

    def _spans(self, rows: Sequence[Row], batch: Batch, own: Batch) -> tuple[Tensor, Spans, Spans]:
        """The trace of each span; where the spans lie among the student's labels, and among the teacher's."""
        import torch

        begins, counts = _places(batch), batch.scored.tolist()
        read_begins, read_counts = _places(own), own.scored.tolist()
        partners = self._partners(rows, batch, own)
        trace: list[int] = []
        ours, theirs = _Spans(), _Spans()
        for number in range(len(batch.prompt)):
            partner, starts = partners[number]
            first, read = starts or (range(counts[number]),) * 2
            ours.add(begins[number], counts[number], first)
            theirs.add(read_begins[partner], read_counts[partner], read)
            trace += [number] * len(first)
        return torch.tensor(trace, device=batch.labels.device), ours.made(batch.labels), theirs.made(own.labels)

    def _partners(self, rows: Sequence[Row], batch: Batch, own: Batch) -> dict[int, tuple[int, Starts | None]]:
        """The teacher's trace for each of the student's, and where spans start if they are not tokens."""
        found: dict[int, tuple[int, Starts | None]] = {}
        for side in ("chosen", "rejected", "rollout"):
            indices = zip(getattr(batch, side).tolist(), getattr(own, side).tolist(), strict=True)
            for row, (trace, read) in zip(rows, indices, strict=False):  # rejected sides may be none
                key = (row.pair.rejected, row.pair.rejected_cut) if side == "rejected" else (row.pair.chosen, False)
                found[trace] = read, self._aligned[key].starts if self._aligned else None
        return found


class _Spans:
    """The spans of one model's labels as they are found, trace by trace."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.later: list[int] = []
        self.owner: list[int] = []

    def add(self, begin: int, count: int, starts: Sequence[int]) -> None:
        """A trace of `count` labels, whose spans start at `starts` among them; the first stands at `begin`."""
        edges = set(starts)
        for place in range(count):
            if place in edges:
                self.first.append(begin + place)
            else:
                self.later.append(begin + place)
                self.owner.append(len(self.first) - 1)

    def made(self, labels: Tensor) -> Spans:
        """As tensors, on the labels' device."""
        import torch

        from orpo_distill.head import Spans

        columns = (self.first, self.later, self.owner)
        return Spans(*(torch.tensor(column, dtype=torch.long, device=labels.device) for column in columns))


def _places(batch: Batch) -> list[int]:
    """Where each trace's labels begin."""
    return (batch.scored.cumsum(0) - batch.scored).tolist()


def _prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prefix: str) -> dict[tuple[Message, ...], Tokens]:
    """Each prompt of the rows as the teacher reads it."""
    asked = {row.pair.prompt: with_prefix(row.pair.prompt, prefix) for row in rows}
    tokens = encode_each(tokenizer, asked.values())
    return {prompt: tokens[read] for prompt, read in asked.items()}


def _aligned(
    rows: Sequence[Row], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> dict[tuple[str, bool], Aligned]:
    """Each text of the rows in the teacher's tokens."""
    texts = {(row.pair.chosen, False) for row in rows}
    texts |= {(row.pair.rejected, row.pair.rejected_cut) for row in rows if row.rejected}
    return align(sorted(texts), student, teacher)
