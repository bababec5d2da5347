"""What models say of given tokens, from hidden states, without the full logits in float32.

The output layer runs on a few hundred positions at a time. What is kept for the backward pass is its logits in the
model's own type, or nothing at all where memory is short: then the layer runs again. Where the whole distributions of
two models are compared nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits computed at once
COMPARED = 1 << 22  # logits of each of two models that are compared at once
KEPT = 1 << 30  # bytes of logits that are kept for the backward pass of one micro-batch
ROWS = 64  # positions that are in float32 at once


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits over a vocabulary of V at M positions, made from hidden states when they are asked for."""

    hidden: Tensor  # (M, H); where there is no head, the logits themselves (M, V)
    head: Any = None  # the output layer
    softcap: float | None = None  # c turns logits x into c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, positions: slice | Tensor) -> Logits:
        return replace(self, hidden=self.hidden[positions])

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.hidden.shape[1] if self.head is None else self.head.weight.shape[0])

    def made(self) -> Tensor:
        """The logits (M, V)."""
        if self.head is None:
            return self.hidden
        logits: Tensor = self.head(self.hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def label_logps(logits: Logits, labels: Tensor, recompute: bool = False) -> Tensor:
    """Log-probability in nats (M,) float32 of each label (M,).

    With `recompute`, and for more logits than KEPT, the backward pass computes the logits again.
    """
    step = max(ROWS, CHUNK // logits.vocabulary)
    recompute = recompute or len(logits) * logits.vocabulary * logits.hidden.element_size() > KEPT
    found = []
    for start in range(0, len(logits), step):
        part = logits[start : start + step], labels[start : start + step]
        if recompute and torch.is_grad_enabled():
            found.append(checkpoint(_logps, *part, use_reentrant=False))
        else:
            found.append(_logps(*part))
    return torch.cat(found)


def _logps(logits: Logits, labels: Tensor) -> Tensor:
    return pick(logits.made(), labels)


def label_scores(logits: Logits, labels: Tensor) -> Tensor:
    """What `label_logps` gives and the entropy that `entropies` gives, (2, M) float32. Keeps nothing for gradients."""
    step = max(ROWS, CHUNK // logits.vocabulary)
    found = []
    for start in range(0, len(logits), step):
        made = logits[start : start + step].made()
        found.append(torch.stack([pick(made, labels[start : start + step]), entropies(made)]))
    return torch.cat(found, dim=1)


@dataclass(frozen=True, slots=True)
class Spans:
    """P spans of text among the M labels of one model."""

    first: Tensor  # (P,) the first label of each
    later: Tensor  # (Q,) the labels that are not the first of their span
    owner: Tensor  # (Q,) the span that each of those is part of

    def summed(self, logps: Tensor) -> Tensor:
        """The sum of logps (M,) over each span's later labels, (P,)."""
        return logps.new_zeros(len(self.first)).index_add(0, self.owner, logps[self.later])


@dataclass(frozen=True, slots=True)
class Against:
    """What a student is compared with: a teacher that has read the same P spans, perhaps in other tokens."""

    logits: Logits  # the teacher's, for M' labels of its own; without gradients, on its own device
    labels: Tensor  # (M',) on the teacher's device, as `theirs`
    theirs: Spans  # among the teacher's labels
    ours: Spans  # among the student's
    trace: Tensor  # (P,) the trace that each span is part of
    divergence: Callable[[Tensor, Tensor], Tensor]  # `Objective.divergence`
    same_tokens: bool  # otherwise spans may have several tokens, and entries of the vocabularies differ


def compare(logits: Logits, labels: Tensor, against: Against) -> tuple[Tensor, Tensor]:
    """The student's log-probability of each label, (M,), and three numbers of each span, (3, P). Float32, in nats.

    Of a span: its log-probability under the student, the same under the teacher, and the divergence of the two
    distributions it was picked from. The backward pass computes everything again, a few positions at a time.
    """
    ours, theirs = against.ours, against.theirs
    logps = _not_first(logits, labels, ours)
    later = ours.summed(logps)
    with torch.no_grad(), _outside_autocast(against.labels):
        read = theirs.summed(_not_first(against.logits, against.labels, theirs)).to(labels.device)
    step = max(ROWS, COMPARED // max(logits.vocabulary, against.logits.vocabulary))
    found = []
    for start in range(0, len(ours.first), step):
        at = slice(start, start + step)
        own, other = ours.first[at], theirs.first[at]
        student = logits[own], labels[own], later[at]
        teacher = against.logits[other], against.labels[other], read[at]
        if torch.is_grad_enabled():
            # Early stopping is by an exception, which would go through an objective's code.
            found.append(checkpoint(_compare, *student, *teacher, against, use_reentrant=False, early_stop=False))
        else:
            found.append(_compare(*student, *teacher, against))
    first, read_first, divergence = torch.cat(found, dim=1)
    logps = logps.index_copy(0, ours.first, first)
    return logps, torch.stack([first + later, read_first.detach() + read, divergence])


def _not_first(logits: Logits, labels: Tensor, spans: Spans) -> Tensor:
    """Log-probability of every label that is not the first of a span; 0 for those that are: (M,) float32."""
    found = logits.hidden.new_zeros(len(labels), dtype=torch.float32)
    rest = torch.ones_like(labels, dtype=torch.bool).index_fill(0, spans.first, False).nonzero()[:, 0]
    return found.index_copy(0, rest, label_logps(logits[rest], labels[rest], True)) if len(rest) else found


def _compare(
    student: Logits, labels: Tensor, later: Tensor, teacher: Logits, read: Tensor, read_later: Tensor, against: Against
) -> Tensor:
    """(3, P): log-probability of the spans' first labels under the student, the same under the teacher, divergence."""
    width = min(student.vocabulary, teacher.vocabulary) if against.same_tokens else None  # embeddings may be padded
    ours = student.made()[:, :width].float().log_softmax(-1)
    with torch.no_grad(), _outside_autocast(read):
        theirs = teacher.made()[:, :width].float().log_softmax(-1).to(ours.device)
    first = ours.gather(1, labels[:, None])[:, 0], theirs.gather(1, read.to(ours.device)[:, None])[:, 0]
    if not against.same_tokens:
        ours, theirs = ours + later[:, None], theirs + read_later[:, None]
    return torch.stack([*first, against.divergence(ours, theirs)])


def _outside_autocast(tensor: Tensor) -> torch.autocast:
    """The teacher computes in its own number type, whatever the student's training does."""
    return torch.autocast(tensor.device.type, enabled=False)


def entropies(logits: Tensor) -> Tensor:
    """The entropy of the softmax of logits (M, V), divided by log V: (M,) float32 from 0 to 1, a few rows at a time."""
    found = []
    for part in torch.split(logits, ROWS):
        logps = part.float().log_softmax(-1)
        found.append(torch.special.entr(logps.exp()).sum(-1))
    return torch.cat(found) / math.log(logits.shape[-1])


def pick(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-softmax of logits (M, V) at the labels (M,), float32, computed in float32 a few rows at a time."""
    found: Tensor = _Pick.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = torch.cat([part.float().logsumexp(-1) for part in torch.split(logits, ROWS)])
        ctx.save_for_backward(logits, labels, total)
        return logits.gather(1, labels[:, None])[:, 0].float() - total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """gradient * (one-hot(label) - softmax)."""
        logits, labels, total = ctx.saved_tensors
        found = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS):
            at = slice(start, start + ROWS)
            part = (logits[at] - total[at, None]).exp_().mul_(-gradient[at, None])
            found[at] = part.scatter_add_(1, labels[at, None], gradient[at, None])
        return found, None
