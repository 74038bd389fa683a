"""Caches with room for more tokens: a step writes its keys and values in place, where `DynamicCache` copies all.

transformers makes new tensors for every layer and token, one column longer. On a CPU that is an eighth of the step of 8
rows in a 12-layer model at 256 tokens, a sixth at 512. Short texts are copied as well: that takes a hundredth less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

SHORT = 128  # columns up to which copies are as good: they leave the data in the processor's cache
COLUMNS = 64  # room to start with
SHARE = 4  # and a quarter of what is there: so copying costs a fixed price per token


def preallocated_cache(model: PreTrainedModel) -> Cache:
    """An empty cache for `model`. Layers of other kinds (sliding window, linear attention) are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """As DynamicLayer; `keys` and `values` [rows, heads, columns, width] are the front part of larger buffers.

    Whatever replaces them (a selection of rows, say) gets a buffer of its own with the next token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys_buffer: Tensor | None = None
        self._values_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones behind the old ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self._keys_buffer = _append(self.keys, key_states, self._keys_buffer)
        self.values, self._values_buffer = _append(self.values, value_states, self._values_buffer)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._keys_buffer = self._values_buffer = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._keys_buffer = self._values_buffer = None  # else all rows stay in memory until the next token


def _append(old: Tensor, new: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(old and new columns as one tensor, the buffer that it is the front of: None for short ones)."""
    before = old.shape[-2] if old.numel() else 0
    after = before + new.shape[-2]
    if after <= SHORT:
        return torch.cat([old, new] if before else [new], -2), None
    if buffer is None or not _is_front(old, buffer) or after > buffer.shape[-2]:
        buffer = new.new_empty(*new.shape[:-2], after + max(COLUMNS, after // SHARE), new.shape[-1])
        if before:
            buffer[..., :before, :] = old
    buffer[..., before:after, :] = new
    return buffer[..., :after, :], buffer


def _is_front(part: Tensor, buffer: Tensor) -> bool:
    if part.shape[:-2] != buffer.shape[:-2]:
        return False
    return part.data_ptr() == buffer.data_ptr() and part.stride() == buffer.stride()
