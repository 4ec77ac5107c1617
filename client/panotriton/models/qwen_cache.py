"""Keys and values of batches that begin with tokens computed before: copied, read, or in fixed buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

__all__ = ["LENGTHS", "StaticCaches", "compile_each_shape", "read_only", "repeated"]

LENGTHS = 256
"""Tokens by which fixed buffers differ in length."""

_SHAPES = 64  # PyTorch gives up after 8


def repeated(first: DynamicCache, rows: int) -> DynamicCache:
    """For a pass that adds to it: a copy in which every row begins with the one of `first`."""
    cache = copy.deepcopy(first)
    cache.batch_repeat_interleave(rows)
    return cache


def read_only(first: DynamicCache, rows: int) -> Any:
    """For one pass after which nothing follows: what the pass computes is used and not kept.

    Every row begins with the one of `first`, which is not copied.
    """
    if any(type(layer) is not DynamicLayer for layer in first.layers):
        return repeated(first, rows)
    cache = copy.copy(first)
    cache.layers = [_ReadOnly(layer, rows) for layer in first.layers]
    return cache


class _ReadOnly(DynamicLayer):  # type: ignore[misc]
    def __init__(self, layer: DynamicLayer, rows: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys = layer.keys.expand(rows, -1, -1, -1)  # (B, heads, tokens, width)
        self.values = layer.values.expand(rows, -1, -1, -1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *rest: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """Those of a layer for this pass."""
        keys, values = (self.keys, key_states), (self.values, value_states)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


def compile_each_shape() -> CompileConfig:
    """How `generate` is to compile a step: left to itself, it would make one graph for batches of any size.

    CUDA graphs are of one size each. Every length that the buffers grow to is another.
    """
    torch._dynamo.config.recompile_limit = _SHAPES
    return CompileConfig(dynamic=False)


class StaticCaches:
    """Buffers whose addresses and shapes stay, so that a step of decoding is always the same work.

    A compiled step, and the CUDA graph that records it, are for one shape of batch and buffers, at one
    address. So batches are filled up to powers of two (`rows`), smaller ones take the first rows of the
    largest's buffers, and all are as long as the longest so far: a multiple of `LENGTHS`, which only grows.
    config: the model's. most: rows of the largest batch.
    """

    def __init__(self, config: Any, most: int) -> None:
        self._config = config
        self._most = most
        self._length = 0
        self._by_rows: dict[int, StaticCache] = {}
        self._buffers: list[_Buffers] = []

    def rows(self, count: int) -> int:
        """What a batch of so many images is filled up to."""
        return min(1 << (count - 1).bit_length(), self._most)

    def take(self, rows: int, tokens: int, first: DynamicCache | None) -> StaticCache:
        """Buffers for so many tokens, each row begun with the one of `first`; until the next call."""
        length = -(-tokens // LENGTHS) * LENGTHS
        if length > self._length:
            self._by_rows.clear()  # before: both may not fit
            self._buffers.clear()
            self._length = length
        if rows not in self._by_rows:
            self._by_rows[rows] = self._made()
        cache = self._by_rows[rows]
        cache.reset()
        for index, layer in enumerate(first.layers if first else ()):
            sides = (side.expand(rows, -1, -1, -1) for side in (layer.keys, layer.values))
            cache.update(*sides, index)
        return cache

    def _made(self) -> StaticCache:
        cache = StaticCache(config=self._config, max_cache_len=self._length)
        self._buffers = self._buffers or [_Buffers() for _ in cache.layers]
        for index, layer in enumerate(cache.layers):
            if type(layer) is StaticLayer:  # others keep less, in an order of their own
                cache.layers[index] = _FirstRows(self._length, self._most, self._buffers[index])
        return cache


class _Buffers:
    """A layer's keys and values, (most, heads, length, width), once their other sides are known."""

    keys: Tensor | None = None
    values: Tensor | None = None


class _FirstRows(StaticLayer):  # type: ignore[misc]
    keys: Tensor
    values: Tensor
    cumulative_length: Tensor

    def __init__(self, length: int, most: int, buffers: _Buffers) -> None:
        super().__init__(max_cache_len=length)
        self._most = most
        self._buffers = buffers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The largest batch's buffers, if they are not there, and the first rows of them."""
        sides = (side[:1].expand(self._most, -1, -1, -1) for side in (key_states, value_states))
        whole, rows = self._buffers, len(key_states)
        if whole.keys is None or whole.values is None:
            super().lazy_initialization(*sides)
            whole.keys, whole.values = self.keys, self.values
        else:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.num_heads = key_states.shape[1]
            self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
            self.cumulative_length = self.cumulative_length.to(self.device)
        self.batch_size = rows
        self.keys, self.values = whole.keys[:rows], whole.values[:rows]
        for tensor in (self.keys, self.values, self.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True
