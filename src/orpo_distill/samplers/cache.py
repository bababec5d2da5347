"""Forward passes for rows that share prompts: a prompt's keys and values are held once, a row's own beside them.

The model keeps no cache of its own. In a pass of one token a row, transformers hands attention to `attend` (through its
AttentionInterface), which finds the keys and values in a `Step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from orpo_distill.errors import ran_out_of_memory

ATTENTION = "orpo_distill_shared_prompts"  # the name under which transformers knows `attend`
CACHE_OPTIONS = ("cache", "past_key_values")  # of a model's forward: transformers 5.24 renamed it, not everywhere
ROOM = 32  # columns that a buffer grows by
PROBE = 24  # tokens of the text on which `manages` compares

Ints = NDArray[np.int64]
Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values (rows, heads, columns, dim) of every layer


class Shelf:
    """Every layer's keys and values, in buffers with room for more rows and columns.

    A row's tokens stand in its first columns; what is behind them is finite. Attention takes all columns and masks
    some: a product with a part of the columns would copy that part first.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows = self.columns = 0

    def fit(self, like: Layers, rows: int, columns: int) -> None:
        """Room for that many rows and columns, with heads, dim and type of `like`. A half empty buffer is cut."""
        columns = -(-columns // ROOM) * ROOM
        if rows <= self.rows and columns <= self.columns < 2 * columns:
            return
        rows = max(rows, self.rows)
        for number, pair in enumerate(like):
            old = self.layers[number] if self.layers[number:] else (None, None)
            new = [self._grown(old[half], pair[half], rows, columns) for half in (0, 1)]
            self.layers[number : number + 1] = [(new[0], new[1])]
        self.rows, self.columns = rows, columns

    @staticmethod
    def _grown(old: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
        new = like.new_zeros(rows, like.shape[1], columns, like.shape[3])
        if old is not None:
            kept = min(columns, old.shape[2])
            new[: len(old), :, :kept] = old[:, :, :kept]
        return new

    def write(self, first_row: int, columns: int, layers: Layers) -> None:
        """Put the first columns of these rows into the rows from `first_row` on."""
        for pair, new in zip(self.layers, layers, strict=True):
            for buffer, block in zip(pair, new, strict=True):
                buffer[first_row : first_row + len(block), :, :columns] = block[:, :, :columns]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows to other places."""
        for pair in self.layers:
            for buffer in pair:
                buffer[target] = buffer[source]


class SharedCache:
    """The keys and values of all rows, and who shares whose prompt.

    A prompt has a home, which is a row of `prompts`, and `seats` for the rows that share it. Each row has its own
    tokens in a row of `texts`; the last token of its prompt is the first of them: a row starts with nothing to copy.
    """

    def __init__(self, model: PreTrainedModel, seats: int) -> None:
        self.model, self.seats = model, seats
        self.windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
        self.prompts, self.texts = Shelf(), Shelf()
        self.lengths: Ints = np.zeros(0, np.int64)  # (homes,) tokens of each prompt but its last
        self.seat: Ints = np.zeros(0, np.int64)  # (N,) home * seats + the seat there
        takes = inspect.signature(type(model).forward).parameters
        self.cache_option = next(name for name in CACHE_OPTIONS if name in takes)
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def attention(self) -> AbstractContextManager[None]:
        """Inside, the model attends to what is held here."""
        return shared_attention(self.model)

    @torch.inference_mode()
    def add(self, prompts: Sequence[tuple[int, ...]], sharing: Sequence[int], rows: int) -> None:
        """Compute prompts, and put `sharing[i]` rows of prompt i behind the last row. At most `rows` are ever held."""
        lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int64)
        width, homes = max(1, int(lengths.max())), len(self.lengths)
        ids = np.zeros((len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):  # padding stands behind, where causal attention never looks
            ids[row, : len(prompt) - 1] = prompt[:-1]
        cache = DynamicCache()
        self.model(input_ids=self._tensor(ids), use_cache=True, **{self.cache_option: cache}, **self.options)
        layers = [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]
        self.prompts.fit(layers, homes + len(prompts), max(width, int(self.lengths.max(initial=0))))
        self.prompts.write(homes, width, layers)
        self.texts.fit(layers, rows, max(1, self.texts.columns))
        seats = [(homes + number) * self.seats + np.arange(count) for number, count in enumerate(sharing)]
        self.lengths, self.seat = np.concatenate([self.lengths, lengths]), np.concatenate([self.seat, *seats])

    @torch.inference_mode()
    def logits(self, tokens: Ints, counts: Ints) -> Tensor:
        """Logits (N, V) after one more token (N,) of every row; `counts` (N,) are the tokens it had drawn before.

        Needs `attention` around it.
        """
        self.texts.fit(self.texts.layers, 0, int(counts.max()) + 1)
        step = Step(self, self._tensor(counts))
        output = self.model(
            input_ids=self._tensor(tokens[:, None]),
            position_ids=step.positions[:, None],
            use_cache=False,
            shared=step,
            **self.options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    @torch.inference_mode()
    def keep(self, alive: NDArray[np.bool_]) -> Ints:
        """Drop rows, and the prompts that lose their last one. Returns the place each row that stays had before."""
        order = self._close_gaps(self.texts, alive)
        home, seat = np.divmod(self.seat[order], self.seats)
        homes = self._close_gaps(self.prompts, np.bincount(home, minlength=len(self.lengths)) > 0)
        moved = np.zeros(len(self.lengths), np.int64)
        moved[homes] = np.arange(len(homes))
        self.lengths, self.seat = self.lengths[homes], moved[home] * self.seats + seat
        return order

    def _close_gaps(self, shelf: Shelf, alive: NDArray[np.bool_]) -> Ints:
        """The last rows fill the gaps, so that few are copied."""
        count = int(alive.sum())
        order = np.arange(count)
        gaps = np.flatnonzero(~alive[:count])
        order[gaps] = np.flatnonzero(alive[count:]) + count
        if len(gaps):
            shelf.move(self._tensor(order[gaps]), self._tensor(gaps))
        return order

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)


class Step:
    """One token for every row: where it is written, and what it attends to."""

    def __init__(self, cache: SharedCache, counts: Tensor) -> None:
        self.cache, self.counts, device = cache, counts, counts.device
        self.rows = torch.arange(len(counts), device=device)
        self.seat = torch.from_numpy(cache.seat).to(device)
        self.homes = len(cache.lengths)
        self.lengths = torch.from_numpy(cache.lengths).to(device)[self.seat // cache.seats]  # (N,) of its prompt
        self.positions = self.lengths + counts  # (N,) of the new token
        self.masks: dict[int | None, Tensor] = {}

    def hidden(self, layer: int) -> Tensor:
        """(N, 1, 1, prompt + own columns): what a row must not see, for padding or the layer's window."""
        window = self.cache.windows[layer]
        if window not in self.masks:
            prompt = torch.arange(self.cache.prompts.columns, device=self.counts.device)
            own = torch.arange(self.cache.texts.columns, device=self.counts.device)
            length, position = self.lengths[:, None], self.positions[:, None]
            hidden = torch.cat([prompt >= length, own > self.counts[:, None]], 1)
            if window is not None:
                hidden |= position - torch.cat([prompt.expand(len(length), -1), length + own], 1) >= window
            self.masks[window] = hidden[:, None, None]
        return self.masks[window]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the token's key and value (N, heads, 1, dim); returns the rows' own (N, heads, columns, dim)."""
        keys, values = self.cache.texts.layers[layer]
        keys[self.rows, :, self.counts] = key[:, :, 0]
        values[self.rows, :, self.counts] = value[:, :, 0]
        return keys[: len(self.rows)], values[: len(self.rows)]

    def prompt(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values (homes, heads, columns, dim)."""
        keys, values = self.cache.prompts.layers[layer]
        return keys[: self.homes], values[: self.homes]

    def by_home(self, rows: Tensor) -> Tensor:
        """Rows (N, heads, r, x) as (homes, heads, seats * r, x), with zeros where nobody sits."""
        placed = rows.new_zeros(self.homes * self.cache.seats, *rows.shape[1:])
        placed[self.seat] = rows
        heads, queries, size = rows.shape[1:]
        apart = placed.view(self.homes, self.cache.seats, heads, queries, size)
        return apart.transpose(1, 2).reshape(self.homes, heads, -1, size)

    def by_row(self, homes: Tensor) -> Tensor:
        """The inverse of `by_home`."""
        heads, queries, size = homes.shape[1:]
        apart = homes.view(self.homes, heads, self.cache.seats, queries // self.cache.seats, size)
        return apart.transpose(1, 2).flatten(0, 1)[self.seat]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a row (N, heads, 1, dim) to its prompt and its own tokens: (N, 1, heads, dim).

    Query heads that share keys stand side by side like queries, and so do rows that share a prompt: no key is repeated.
    `options` holds the `Step` as `shared`, and `softcap` where a model caps its scores.
    """
    if unknown := [name for name in ("s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)}")
    step: Step = options["shared"]
    layer: Any = module.layer_idx
    keys, values = step.append(layer, key, value)
    prompt_keys, prompt_values = step.prompt(layer)
    columns = prompt_keys.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = (query * scale).reshape(len(query), key.shape[1], -1, query.shape[-1])  # (N, key heads, r, dim)
    shared = step.by_row(step.by_home(queries) @ prompt_keys.transpose(2, 3))
    own = (keys @ queries.transpose(2, 3)).transpose(2, 3)  # keys first: on a CPU twice as fast as queries first
    scores = torch.cat([shared, own], -1)
    if cap := options.get("softcap"):
        scores = torch.tanh(scores / cap) * cap
    weights = scores.masked_fill_(step.hidden(layer), float("-inf")).softmax(-1)
    mixed = step.by_row(step.by_home(weights[..., :columns]) @ prompt_values) + weights[..., columns:] @ values
    return mixed.reshape(len(query), 1, -1, mixed.shape[-1]), None


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends through `attend`."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def manages(model: PreTrainedModel) -> bool:
    """Whether `SharedCache` is right for a model: plain or windowed attention, and the same logits on a short text."""
    kind: Any = type(model)
    takes = inspect.signature(kind.forward).parameters
    if not kind.__module__.startswith("transformers.") or "position_ids" not in takes:
        return False
    if not any(name in takes for name in CACHE_OPTIONS):
        return False
    if model.config.is_encoder_decoder or not kind._supports_default_dynamic_cache():
        return False
    names = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not set(names) <= {"full_attention", "sliding_attention"} or not kinds <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }:
        return False
    return kind._can_set_attn_implementation() and _agrees(model)


@torch.inference_mode()
def _agrees(model: PreTrainedModel) -> bool:
    """Two rows with one prompt, against a plain pass. The square root of a type's precision is far above its rounding
    and far below what attention to other tokens changes."""
    text = np.arange(PROBE, dtype=np.int64) * 7919 % model.config.get_text_config(decoder=True).vocab_size
    half = PROBE // 2
    plain: Tensor = model(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False).logits[:, -1]
    if plain.float().log_softmax(-1).isnan().any():  # nothing to compare with; whoever draws from it says so
        return True
    cache = SharedCache(model, seats=2)
    try:
        cache.add([tuple(text[:half].tolist())], [2], 2)
        with shared_attention(model):
            for count, token in enumerate(text[half - 1 :]):
                logits = cache.logits(np.array([token, token]), np.array([count, count]))
    except Exception as error:  # whatever a model's own code does with an attention that it does not expect
        if ran_out_of_memory(error):
            raise
        return False
    allowed = torch.finfo(plain.dtype).eps ** 0.5 * float(plain.abs().max())
    return bool((logits - plain).abs().max() <= allowed)
