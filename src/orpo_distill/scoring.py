"""Model and packed groups to the log-probability of every trace: the hot path of training.

`prepare` teaches a causal language model of transformers to take a packed batch: `model(packed=batch)`. It tries two
short cuts on real tokens and keeps those that give what the model itself gives:

- groups: the batch is one forward pass over one row, in which prompts are computed once (`attention`). Otherwise every
  trace is a row of its own behind its prompt, padded on the right.
- head: the output layer runs on the positions that count, in chunks (`head`). Otherwise the model makes its logits.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orpo_distill import attention
from orpo_distill.errors import ModelError, ran_out_of_memory
from orpo_distill.groups import Row
from orpo_distill.head import Against, Logits, compare, label_logps, label_scores, pick
from orpo_distill.objectives import Compared, ScoredGroups
from orpo_distill.packing import Batch, collate, pad

# Nats, mean over tokens. In bfloat16 rounding alone moves SmolLM2's by about 0.04 (docs/performance.md).
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
SAME_LOGITS = 1e-3  # nats, where one and the same thing is computed twice
TRIED = 64  # labels at the end of each trace that `prepare` compares
Reader = Callable[[Logits, Tensor], Any]
"""What is made of a batch's logits and labels; left out, the labels' log-probabilities (M,)."""


def score(model: nn.Module, batch: Batch, mean_chosen_tokens: float, against: Against | None = None) -> ScoredGroups:
    """Score each of the batch's N traces once with a model that was prepared; compare it with a teacher, if given."""
    compared = None
    if against is None:
        logps: Tensor = model(packed=batch)  # (M,)
    else:
        logps, spans = model(packed=batch, read=partial(compare, against=against))
        compared = Compared(against.trace, *spans)
    sums = logps.new_zeros(len(batch.scored)).index_add(0, batch.owner, logps)  # (N + G,)
    traces = len(batch.prompt)
    return ScoredGroups(
        logp_sum=sums[:traces],
        tokens=batch.scored[:traces],
        prompt_logp_sum=sums[traces:][batch.prompt],
        prompt_tokens=batch.scored[traces:][batch.prompt],
        chosen=batch.chosen,
        rejected=batch.rejected,
        mean_chosen_tokens=mean_chosen_tokens,
        rollout=batch.rollout,
        compared=compared,
    )


def measure(model: nn.Module, batch: Batch) -> Tensor:
    """(3, N) float32, without gradients, of each of the batch's traces, with a model that was prepared.

    The log-probability of its tokens in nats, summed; how many they are; the mean over them of the entropy of the
    distribution that each was picked from, over log V.
    """
    with torch.no_grad():
        found: Tensor = model(packed=batch, read=label_scores)  # (2, M)
        sums = found.new_zeros(2, len(batch.scored)).index_add(1, batch.owner, found)[:, : len(batch.prompt)]
        tokens = batch.scored[: len(batch.prompt)].to(sums.dtype)
        return torch.stack([sums[0], tokens, sums[1] / tokens])


@dataclasses.dataclass
class Route:
    """How a prepared model computes, and why not otherwise."""

    groups: bool = True
    head: bool = True
    recompute: bool = False  # the logits, in the backward pass
    reasons: tuple[str, ...] = ()


def prepare(model: nn.Module, probe: Sequence[Row], recompute: bool = False) -> Route:
    """Let `model(packed=batch)` return log-probabilities (M,), by the fastest route that is right for `probe`.

    `model(packed=batch, read=function)` returns what the function makes of logits and labels instead. `recompute` never
    keeps logits for the backward pass. Adapters (peft) around the model are fine; wrap it for several processes
    afterwards. Calls without `packed` are what they were.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    forward = _Forward(inner, Route(recompute=recompute))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _choose(model, inner, forward, probe)
    finally:
        model.train(training)
    return forward.route


def _choose(model: nn.Module, inner: Any, forward: _Forward, probe: Sequence[Row]) -> None:
    """Set the route by trying."""
    weight: Tensor = inner.get_input_embeddings().weight
    limit = TOLERANCE.get(weight.dtype, min(TOLERANCE.values()))
    batch = collate(probe, False, str(weight.device))
    expected, compared = forward.plain(batch)
    route = forward.route
    if not expected.isfinite().all():  # nothing to compare with; training will name the row whose loss is not finite
        inner.forward = types.MethodType(forward, inner)
        route.groups = route.head = False
        return

    def fault(of: Callable[[], str]) -> str:
        try:
            return of()
        except (attention.Unsupported, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            if ran_out_of_memory(error):
                raise
            return str(error).strip().partition("\n")[0] or type(error).__name__

    def difference() -> str:
        found = (model(packed=batch)[compared] - expected).abs().mean().item()
        return "" if found <= limit else f"its log-probabilities differ by {found:.2g} nats a token"

    def groups_fault() -> str:
        inner.set_attn_implementation(attention.NAME)
        return _sharing_fault(model, inner, probe[0]) or difference()

    if reason := fault(lambda: forward.head_fault(inner, batch)):
        route.head = False
        route.reasons += (f"the model makes all logits ({reason})",)
    inner.forward = types.MethodType(forward, inner)
    if reason := fault(groups_fault):
        route.groups = False
        inner.set_attn_implementation(forward.attention)
        route.reasons += (f"every trace is padded and repeats its prompt ({reason})",)
        if reason := fault(difference):
            raise ModelError(
                f"expected a causal language model of transformers, found that {type(inner).__name__} gives other "
                f"results in a padded batch ({reason}); use another student"
            )


def _sharing_fault(model: nn.Module, inner: Any, row: Row) -> str:
    """Why two traces cannot follow one prompt in the model's row. Exact in every number type, unlike TOLERANCE.

    The second must not depend on the first (a gradient is zero), and must depend on the positions it is given.
    """
    prompt, trace = row.prompt[-16:], (row.chosen * 8)[:8]
    device = str(inner.get_input_embeddings().weight.device)
    batch = collate([dataclasses.replace(row, prompt=prompt, chosen=(*trace, trace[0]), rejected=trace)], False, device)
    first = slice(len(prompt), len(prompt) + len(trace))
    embedded: list[Tensor] = []

    def follow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = inner.get_input_embeddings().register_forward_hook(follow)
    try:
        with torch.enable_grad():
            found = model(packed=batch)[batch.owner == 1]
            (gradient,) = torch.autograd.grad(found.sum(), embedded[0])
    finally:
        hook.remove()
    if gradient[:, first].any():
        return "its layers carry something from one trace to the next"
    position_ids = batch.position_ids.clone()
    position_ids[:, first.stop :] += 5
    moved = model(packed=dataclasses.replace(batch, position_ids=position_ids))[batch.owner == 1]
    return "it does not use the positions it is given" if torch.equal(moved, found.detach()) else ""


class _Forward:
    """The forward method of a prepared model: the model's own, unless it gets a packed batch."""

    def __init__(self, model: Any, route: Route) -> None:
        self.route = route
        self.own = model.forward
        self.__signature__ = inspect.signature(type(model).forward)  # `generate` looks at it
        self.attention: str = model.config._attn_implementation
        self.picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(
        self, model: Any, *inputs: Any, packed: Batch | None = None, read: Reader | None = None, **options: Any
    ) -> Any:
        if packed is None:
            with self._ordinary_attention(model):
                return self.own(*inputs, **options)
        given, at = self._inputs(packed)
        if self.route.head:
            logits = self._from_hidden(model, model.base_model(**given).last_hidden_state.flatten(0, 1)[at])
        else:
            logits = Logits(self.own(**given).logits.flatten(0, 1)[at])
        if read is not None:
            return read(logits, packed.labels)
        return label_logps(logits, packed.labels, self.route.recompute and model.training)

    def _from_hidden(self, model: Any, hidden: Tensor) -> Logits:
        return Logits(hidden, model.get_output_embeddings(), self.softcap)

    @contextmanager
    def _ordinary_attention(self, model: Any) -> Iterator[None]:
        """The attention that the model had before it was prepared, unless another one was set since."""
        if model.config._attn_implementation != attention.NAME:
            yield
            return
        model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            model.set_attn_implementation(attention.NAME)

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """What the model takes, and where among the flattened positions each label is predicted."""
        if self.route.groups:
            row = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            return {**row, "use_cache": False, "packed": batch}, batch.sources
        input_ids, at = pad(batch)
        return {"input_ids": input_ids, "use_cache": False}, at

    def plain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the last few labels of each trace as the model gives them, and which labels they are."""
        found: list[Tensor] = []
        which: list[int] = []
        for row, end in zip(_rows(batch), batch.scored.cumsum(0).tolist(), strict=False):
            tried = min(TRIED, int(batch.scored[len(found)]))
            found.append(pick(self._logits(row, tried + 1)[:-1], row[-tried:]))
            which += range(end - tried, end)
        return torch.cat(found), torch.tensor(which, device=batch.labels.device)

    def head_fault(self, model: Any, batch: Batch) -> str:
        """Why the model's logits are not its output layer's of its last hidden state: nearly exact in every type."""
        row = _rows(batch)[0]
        logits = self._logits(row, min(TRIED, len(row)))
        labels = row[-len(logits) :]
        hidden = model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, -len(logits) :]
        found = label_logps(self._from_hidden(model, hidden), labels)
        difference = (found - pick(logits, labels)).abs().max().item()
        return "" if difference <= SAME_LOGITS else f"its log-probabilities differ by {difference:.2g} nats"

    def _logits(self, row: Tensor, last: int) -> Tensor:
        """The model's own logits of a row's last positions, (last, V)."""
        few = {"logits_to_keep": last} if self.picks else {}
        found: Tensor = self.own(input_ids=row[None], use_cache=False, **few).logits[0, -last:]
        return found


def _rows(batch: Batch) -> list[Tensor]:
    """Each trace behind its prompt, without padding."""
    input_ids, _ = pad(batch)
    places = [batch.prompts[number] for number in batch.prompt.tolist()]
    lengths = [place.stop - place.start + int(batch.scored[number]) for number, place in enumerate(places)]
    return [row[:length] for row, length in zip(input_ids, lengths, strict=True)]
