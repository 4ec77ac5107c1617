"""Qwen-VL's vision tower as an ONNX graph for images of one size.

The tower's own code depends on the data: which patches share a window and where each of them lies is
computed from the grid at run time, in ways that cannot be exported. For one grid all of that is
constant. Windows are put in the order of their length, so that those of one length are one batch of
attention.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.vision_utils import get_vision_position_ids

from panotriton.errors import ExportError
from panotriton_export.configs import fit_config
from panotriton_export.graph import (
    LIMITS,
    MAX_BATCH,
    Component,
    ParityResult,
    Probe,
    export_component,
)

__all__ = ["NAME", "FixedGridTower", "export_tower", "export_vision", "grid_of", "load_tower"]

NAME = "qwen_vision"
# Qwen3-VL's hands features of several layers to the language side: one output is not enough.
_TOWERS = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel")

Windows = list[tuple[int, int]]  # (patches in each, how many), one after the other


class FixedGridTower(nn.Module):
    """(B, patches, 3 · 2 · 14 · 14) fp32, as the processor makes them → (B, patches / 4, hidden)."""

    patches: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, tower: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower = tower
        merge = tower.spatial_merge_size
        rows, columns = grid[0] // merge, grid[1] // merge
        groups = _windows(rows, columns, _window_side(tower) or max(rows, columns))
        order = torch.cat([group.flatten() for group in groups])  # (tokens)
        patches = (order[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        self.register_buffer("patches", patches)  # (patches): where each place is filled from
        self.register_buffer("back", order.argsort())  # (tokens)
        places = get_vision_position_ids(torch.tensor([[1, *grid]]), merge)  # (patches, 2)
        cos, sin = tower.rotary_pos_emb(torch.empty(0), places)
        self.register_buffer("cos", cos[patches][:, None])  # (patches, 1, values of a head)
        self.register_buffer("sin", sin[patches][:, None])
        self.windows: Windows = [(g.shape[1] * merge**2, len(g)) for g in groups]
        self.whole: Windows = [(len(patches), 1)]
        everywhere = range(len(tower.blocks)) if _window_side(tower) is None else ()
        self.everywhere = set(getattr(tower, "fullatt_block_indexes", everywhere))

    def forward(self, PATCHES: Tensor) -> Tensor:
        weight = self.tower.patch_embed.proj.weight.flatten(1)  # (width, 1176)
        hidden = linear(PATCHES, weight)[:, self.patches]  # (B, patches, width)
        for index, block in enumerate(self.tower.blocks):
            windows = self.whole if index in self.everywhere else self.windows
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), windows)
            hidden = hidden + block.mlp(block.norm2(hidden))
        tokens = self.tower.merger(hidden)  # (B · tokens, hidden)
        whole: Tensor = tokens.reshape(-1, len(self.back), tokens.shape[-1])
        return whole[:, self.back]

    def _attend(self, attention: Any, hidden: Tensor, windows: Windows) -> Tensor:
        count, heads = len(self.patches), attention.num_heads
        mixed = attention.qkv(hidden).reshape(-1, count, 3, heads, hidden.shape[-1] // heads)
        query, key, value = mixed.unbind(2)  # (B, patches, heads, values)
        query, key = self._turn(query), self._turn(key)
        seen, start = [], 0
        for length, number in windows:
            part = slice(start, start + length * number)
            start += length * number
            split = [
                tensor[:, part].reshape(-1, length, *tensor.shape[2:]).transpose(1, 2)
                for tensor in (query, key, value)
            ]  # (B · number, heads, length, values) each
            out = scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2)
            seen.append(out.reshape(-1, length * number, hidden.shape[-1]))
        joined: Tensor = attention.proj(torch.cat(seen, dim=1))
        return joined

    def _turn(self, states: Tensor) -> Tensor:
        """Rotary embedding of (B, patches, heads, values)."""
        first, second = states.chunk(2, dim=-1)
        return states * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def _window_side(tower: Any) -> int | None:
    """In tokens; None where every layer sees the whole image."""
    size = getattr(tower, "window_size", None)
    return None if size is None else size // tower.spatial_merge_size // tower.patch_size


def _windows(rows: int, columns: int, side: int) -> list[Tensor]:
    """The tokens of each window, (windows, tokens of one), for each length that occurs."""
    index = torch.arange(rows * columns).reshape(rows, columns)
    groups: dict[int, list[Tensor]] = {}
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            window = index[top : top + side, left : left + side].flatten()
            groups.setdefault(len(window), []).append(window)
    return [torch.stack(group) for _, group in sorted(groups.items())]


def export_vision(
    folder: Path, repository: Path, size: tuple[int, int], max_pixels: int | None
) -> tuple[tuple[int, int], list[ParityResult]]:
    """Write qwen_vision for images of `size` (height, width) px; returns the grid and the comparison.

    Raises ExportError for a model without such a tower, and where the graph differs from PyTorch by
    more than 1e-4 of the largest value.
    """
    grid = grid_of(folder, size, max_pixels)
    return grid, export_tower(load_tower(folder), repository, grid)


def export_tower(tower: Any, repository: Path, grid: tuple[int, int]) -> list[ParityResult]:
    """`export_vision` for a tower in memory and a grid of patches (down, across)."""
    fixed = FixedGridTower(tower, grid)
    patches, values = grid[0] * grid[1], tower.patch_embed.proj.weight[0].numel()
    example = torch.randn(2, patches, values, generator=torch.Generator().manual_seed(0))
    component = Component(
        NAME,
        fixed,
        {"PATCHES": example},
        {"PATCHES": {0: torch.export.Dim("batch", max=MAX_BATCH)}},
        ["TOKENS"],
        [_probe(tower, grid, example[:1]), _probe(tower, grid, torch.cat([example, -example[:1]]))],
        {"TOKENS": LIMITS["fp32"]},
    )
    results: list[ParityResult] = export_component(component, repository)
    fit_config(repository / NAME)
    return results


def load_tower(folder: Path) -> Any:
    """The folder's vision tower in fp32."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, use_safetensors=True
    )
    tower = model.model.visual
    if type(tower).__name__ not in _TOWERS:
        raise ExportError(
            f"{folder}: the vision tower {type(tower).__name__} cannot be exported; expected one of "
            f"{', '.join(_TOWERS)}: leave --export-vision out"
        )
    return tower.float().eval()


def grid_of(folder: Path, size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """What the processor makes of an image of `size` (height, width) px: patches down and across.

    Raises ExportError for sides below one merged patch, and for images too elongated for the budget.
    """
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False).image_processor
    patch, least_side = processor.patch_size, processor.patch_size * processor.merge_size
    budget = processor.size["shortest_edge"], max_pixels or processor.size["longest_edge"]
    resized = (0, 0)
    if min(size) >= least_side and max(size) <= MAX_RATIO * min(size):
        resized = smart_resize(*size, least_side, *budget)
    if 0 in resized:
        raise ExportError(
            f"the vision tower cannot be exported for {size[0]}x{size[1]} px in {budget[1]} pixels; expected "
            f"sides of {least_side} px or more, less elongated: see --export-vision and --max-pixels"
        )
    return resized[0] // patch, resized[1] // patch


@torch.no_grad()
def _probe(tower: Any, grid: tuple[int, int], patches: Tensor) -> Probe:
    grids = torch.tensor([[1, *grid]] * len(patches))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own next releases
        tokens = tower(patches.flatten(0, 1), grid_thw=grids).pooler_output
    return Probe(
        {"PATCHES": patches}, {"TOKENS": tokens.reshape(len(patches), -1, tokens.shape[-1])}
    )
