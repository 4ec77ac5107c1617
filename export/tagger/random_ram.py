"""ram_swin_large_14m.pth, DAPE.pth and the two tag lists with seeded random values, in the real formats.

`tiny` is for tests. `swin_l` has the layers and shapes of the real tagger: what it costs to export and
to run is what the real weights cost. The names are upstream's, spelled out; the captioning half,
which the export ignores, has one tensor per part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RandomFiles", "write_random"]

Size = Literal["tiny", "swin_l"]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

_RANK = 8
_TABLE_ROWS = 23 * 23  # offsets within a window of 12×12
_TOKENS_A_WINDOW = 144
_WORDS = ("sky", "tree", "building", "street", "window", "wall", "floor", "person", "car", "water", "road",
          "lamp")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sizes:
    embed_width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    text_width: int
    width: int
    inner_width: int
    tags: int


_SIZES: dict[Size, _Sizes] = {
    "tiny": _Sizes(8, (2, 1, 3, 2), (1, 2, 4, 8), 24, 32, 64, 40),
    "swin_l": _Sizes(192, (2, 2, 18, 2), (6, 12, 24, 48), 512, 768, 3072, 4585),
}


@dataclass(frozen=True, slots=True)
class RandomFiles:
    """The four files that the export of a tagger reads."""

    ram: Path
    dape: Path
    tags: Path
    thresholds: Path


def write_random(folder: Path, size: Size = "tiny", *, seed: int = 0) -> RandomFiles:
    """Write the four files into `folder`. swin_l takes 0.9 GB."""
    torch.manual_seed(seed)
    sizes = _SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    files = RandomFiles(
        folder / "ram_swin_large_14m.pth",
        folder / "DAPE.pth",
        folder / "ram_tag_list.txt",
        folder / "ram_tag_list_threshold.txt",
    )
    model = {name: _values(name, shape) for name, shape in _ram(sizes)}
    torch.save({"model": model, "config": {"image_size": 384}, "epoch": 9}, files.ram)
    torch.save({name: 0.3 * torch.randn(shape) for name, shape in _dape(sizes)}, files.dape)
    files.tags.write_text("\n".join(_names(sizes.tags)), "utf-8")
    files.thresholds.write_text("".join(f"{_threshold(i)}\r\n" for i in range(sizes.tags)))
    return files


def _names(count: int) -> Iterator[str]:
    return (_WORDS[i] if i < len(_WORDS) else f"{_WORDS[i % 12]} {i // 12}" for i in range(count))


def _threshold(index: int) -> float:
    """Spread evenly, so that a small change of an image changes some tag."""
    return round(index * 0.618 % 1, 2)


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of about the size of trained ones, except that images differ more."""
    if name.endswith("relative_position_index"):
        return torch.zeros(shape, dtype=torch.int64)
    if "norm" in name.lower() and name.endswith("weight"):
        return 1 + 0.2 * torch.randn(shape)
    if name == "label_embed":
        return torch.randn(shape)
    fan_in = shape[-1] if len(shape) == 2 else shape[0]
    return torch.randn(shape) / (fan_in**0.5 if name.endswith("weight") else 5)


def _ram(sizes: _Sizes) -> Shapes:
    yield "label_embed", (sizes.tags, sizes.text_width)
    yield from _swin(sizes)
    yield from _linear("image_proj", 8 * sizes.embed_width, sizes.text_width)
    yield from _linear("wordvec_proj", sizes.text_width, sizes.width)
    for layer in range(2):
        yield from _tagging_layer(f"tagging_head.encoder.layer.{layer}", sizes)
    yield from _linear("fc", sizes.width, 1)
    yield "tag_encoder.embeddings.position_ids", (1, 512)
    yield "text_decoder.cls.predictions.bias", (30524,)


def _swin(sizes: _Sizes) -> Shapes:
    yield "visual_encoder.patch_embed.proj.weight", (sizes.embed_width, 3, 4, 4)
    yield "visual_encoder.patch_embed.proj.bias", (sizes.embed_width,)
    yield from _norm("visual_encoder.patch_embed.norm", sizes.embed_width)
    for stage, (depth, heads) in enumerate(zip(sizes.depths, sizes.heads, strict=True)):
        width, name = sizes.embed_width << stage, f"visual_encoder.layers.{stage}"
        for block in range(depth):
            yield from _block(f"{name}.blocks.{block}", width, heads)
        if stage < len(sizes.depths) - 1:
            yield f"{name}.downsample.reduction.weight", (2 * width, 4 * width)
            yield from _norm(f"{name}.downsample.norm", 4 * width)
    yield from _norm("visual_encoder.norm", sizes.embed_width << len(sizes.depths) - 1)


def _block(name: str, width: int, heads: int) -> Shapes:
    yield f"{name}.attn_mask", (1, _TOKENS_A_WINDOW, _TOKENS_A_WINDOW)
    yield from _norm(f"{name}.norm1", width)
    yield f"{name}.attn.relative_position_bias_table", (_TABLE_ROWS, heads)
    yield f"{name}.attn.relative_position_index", (_TOKENS_A_WINDOW, _TOKENS_A_WINDOW)
    yield from _linear(f"{name}.attn.qkv", width, 3 * width)
    yield from _linear(f"{name}.attn.proj", width, width)
    yield from _norm(f"{name}.norm2", width)
    yield from _linear(f"{name}.mlp.fc1", width, 4 * width)
    yield from _linear(f"{name}.mlp.fc2", 4 * width, width)


def _tagging_layer(name: str, sizes: _Sizes) -> Shapes:
    yield from _linear(f"{name}.crossattention.self.query", sizes.width, sizes.width)
    yield from _linear(f"{name}.crossattention.self.key", sizes.text_width, sizes.width)
    yield from _linear(f"{name}.crossattention.self.value", sizes.text_width, sizes.width)
    yield from _linear(f"{name}.crossattention.output.dense", sizes.width, sizes.width)
    yield from _norm(f"{name}.crossattention.output.LayerNorm", sizes.width)
    yield from _linear(f"{name}.intermediate.dense", sizes.width, sizes.inner_width)
    yield from _linear(f"{name}.output.dense", sizes.inner_width, sizes.width)
    yield from _norm(f"{name}.output.LayerNorm", sizes.width)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _dape(sizes: _Sizes) -> Shapes:
    for stage, depth in enumerate(sizes.depths):
        width = sizes.embed_width << stage
        for block in range(depth):
            name = f"visual_encoder.layers.{stage}.blocks.{block}.attn.qkv"
            yield f"{name}.lora_A", (2 * _RANK, width)
            yield f"{name}.lora_B", (2 * width, _RANK)
    for part in ("tagging_head", "tag_encoder"):
        for layer in range(2):
            name = f"{part}.encoder.layer.{layer}.crossattention.self"
            yield from _pair(f"{name}.query", sizes.width, sizes.width)
            yield from _pair(f"{name}.key", sizes.text_width, sizes.width)
    yield from _pair("text_decoder.bert.encoder.layer.0.attention.self.query", 768, 768)


def _pair(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.lora_A", (_RANK, inputs)
    yield f"{name}.lora_B", (outputs, _RANK)
