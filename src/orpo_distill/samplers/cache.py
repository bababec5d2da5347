"""A key-value cache whose rows can be repeated, dropped and joined at any step.

Rows are aligned at their newest token: it stands in the last column of every row, and padding before the shorter ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 64  # spare columns a buffer gets when it is built: steps before it has to be built again


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values (N, heads, columns, dim), in buffers with spare columns: a step copies nothing.

    Layers with windowed attention keep every column too: the model's own mask applies the window.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = 0

    def hold(self, keys: Tensor, values: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Take over two buffers of which `columns` columns are filled; returns what is filled."""
        self.buffers, self.columns = (keys, values), columns
        filled = keys[:, :, :columns], values[:, :, :columns]
        self.keys, self.values = filled
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return filled

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns; transformers calls this in the forward pass."""
        start, end = self.columns, self.columns + key_states.shape[2]
        if not self.is_initialized:
            return self.hold(key_states, value_states, end)
        keys, values = self.buffers
        if end > keys.shape[2]:
            every = torch.arange(keys.shape[0], device=keys.device)
            keys, values = (align([(old[:, :, :start], every)], start) for old in self.buffers)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return self.hold(keys, values, end)

    def get_seq_length(self) -> int:
        """Columns filled, padding included."""
        return self.columns


def align(parts: Sequence[tuple[Tensor, Tensor]], columns: int) -> Tensor:
    """Rows of several blocks (n, heads, c, dim) in one buffer (N, heads, columns + ROOM, dim), right-aligned.

    A part is a block and the indices (m,) of its rows to take; an index may repeat. Leading columns that do not fit are
    dropped: they must be padding in every row that is taken.
    """
    block = parts[0][0]
    rows = sum(len(chosen) for _, chosen in parts)
    out = block.new_empty(rows, block.shape[1], columns + ROOM, block.shape[3])
    at = 0
    for block, chosen in parts:
        width = min(block.shape[2], columns)
        out[at : at + len(chosen), :, : columns - width] = 0  # masked, yet it must be finite
        out[at : at + len(chosen), :, columns - width : columns] = block[chosen, :, block.shape[2] - width :]
        at += len(chosen)
    return out


def empty(model: PreTrainedModel) -> Cache:
    """A cache without rows."""
    return Cache(layers=[RoomyLayer() for _ in DynamicCache(config=model.config).layers])


def merge(parts: Sequence[tuple[Cache, Tensor]], columns: int) -> Cache:
    """One cache from rows of several, as `align` does. Empties them layer by layer, so that little is held twice."""
    layers = []
    for number in range(len(parts[0][0].layers)):
        sources: list[Any] = [cache.layers[number] for cache, _ in parts]
        layer = RoomyLayer()
        if sources[0].is_initialized:  # a layer that shares another's keys holds none
            keys = [(source.keys, rows) for source, (_, rows) in zip(sources, parts, strict=True)]
            values = [(source.values, rows) for source, (_, rows) in zip(sources, parts, strict=True)]
            layer.hold(align(keys, columns), align(values, columns), columns)
        for source in sources:
            source.keys = source.values = source.buffers = None
        layers.append(layer)
    return Cache(layers=[*layers])


def manages(model: PreTrainedModel) -> bool:
    """Whether this cache can replace the model's own: plain or windowed attention, positions given from outside."""
    takes = inspect.signature(type(model).forward).parameters
    if not type(model).__module__.startswith("transformers.") or not {"position_ids", "past_key_values"} <= set(takes):
        return False
    kind: Any = type(model)
    if model.config.is_encoder_decoder or not kind._supports_default_dynamic_cache():
        return False
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
