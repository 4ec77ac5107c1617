"""Attention inside a vision tower's windows, of one length in one call instead of a call for each.

transformers does the latter wherever flash attention is not installed: over a thousand calls a layer for 16
images of a megapixel, which a GPU is done with before the next one has been asked for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["join_windows"]

# By "flash" in its name an attention is given all windows at once and the places where they begin.
_NAME = "flash_windows_by_sdpa"


def join_windows(model: Any) -> None:
    """Have a Qwen-VL model's tower, which uses PyTorch's fused attention, use this one."""
    AttentionInterface.register(_NAME, _attention)
    model.model.visual.config._attn_implementation = _NAME


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, heads, patches, width) each → (1, patches, heads, width); windows begin at `cu_seq_lens_q`."""
    bounds = cu_seq_lens_q.tolist()
    starts: dict[int, list[int]] = {}  # of the windows of each length
    for start, end in pairwise(bounds):
        starts.setdefault(end - start, []).append(start)
    result = torch.empty_like(value[0].transpose(0, 1))  # (patches, heads, width)
    for length, firsts in starts.items():
        first = torch.tensor(firsts, device=query.device)[:, None]
        places = first + torch.arange(length, device=query.device)  # (windows, length)
        q, k, v = (each[0][:, places].transpose(0, 1) for each in (query, key, value))
        found = scaled_dot_product_attention(q, k, v, scale=scaling)
        result[places] = found.transpose(1, 2)  # (windows, length, heads, width)
    return result[None], None
