"""Keys and values of batches that begin with tokens computed before: copied, read, or in fixed buffers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

__all__ = ["KEPT", "LENGTHS", "StaticCaches", "read_only", "repeated"]

LENGTHS = 256
"""Tokens by which fixed buffers differ in length."""

KEPT = 2
"""Replies of the scorer's length and of the describer's take turns."""


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


class StaticCaches:
    """Buffers whose addresses and shapes stay, so that a step of decoding is always the same work.

    A compiled step, and the CUDA graph that records it, are for one shape of batch and buffers. So batches
    are filled up to powers of two (`rows`) and lengths to multiples of `LENGTHS`; the buffers of the last
    `KEPT` shapes stay. config: the model's. most: rows of the largest batch.
    """

    def __init__(self, config: Any, most: int) -> None:
        self._config = config
        self._most = most
        self._kept: OrderedDict[tuple[int, int], StaticCache] = OrderedDict()

    def rows(self, count: int) -> int:
        """What a batch of so many images is filled up to."""
        return min(1 << (count - 1).bit_length(), self._most)

    def take(self, rows: int, tokens: int, first: DynamicCache | None) -> StaticCache:
        """Buffers for so many tokens, each row begun with the one of `first`; until the next call."""
        key = rows, -(-tokens // LENGTHS) * LENGTHS
        if key not in self._kept:
            while len(self._kept) >= KEPT:  # before: three may not fit
                self._kept.popitem(last=False)
            self._kept[key] = StaticCache(config=self._config, max_cache_len=key[1])
        self._kept.move_to_end(key)
        cache = self._kept[key]
        cache.reset()
        for index, layer in enumerate(first.layers if first else ()):
            sides = (side.expand(rows, -1, -1, -1) for side in (layer.keys, layer.values))
            cache.update(*sides, index)
        return cache
