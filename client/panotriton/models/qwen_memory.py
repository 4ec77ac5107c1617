"""How much memory a Qwen-VL model needs, before any of it is taken.

Bytes of the three things that count: the weights, the keys and values of a full batch, and the
largest set of activations that is alive at once. Attention is taken to be fused: no matrix of
tokens by tokens is ever stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panotriton.errors import InvalidInput

__all__ = ["Need", "check_fits", "estimate", "free_ram_bytes", "stored_parameters"]

_LEAST_PIXELS = 4 * 28 * 28  # what the export takes at least
_TEXT_TOKENS = 1024 + 512  # the prompts and a scorer's longest reply
_MARGIN = 1.1  # allocators keep blocks of several sizes
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def estimate(
    config: Mapping[str, Any],
    parameters: int,
    value_bytes: int,
    max_batch: int,
    max_pixels: int,
    *,
    further_tokens: int = 0,
) -> Need:
    """For a folder's config as transformers writes it (with text_config and vision_config).

    max_pixels bounds an image once the processor has resized it; value_bytes is 2 for bf16 and fp16,
    4 for fp32. further_tokens: for which a full batch's cache has room besides.
    """
    text, vision = config["text_config"], config["vision_config"]
    patches = math.ceil(max_pixels / vision["patch_size"] ** 2)
    tokens = patches // vision["spatial_merge_size"] ** 2 + _TEXT_TOKENS
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    keys = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head
    pixels = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    # A layer at a time: residual, normed input, q, k, v and output, and the gated feed-forward.
    seeing = 6 * _vision_width(vision) + 2 * _vision_feed_forward(vision)
    reading = 6 * text["hidden_size"] + 3 * text["intermediate_size"]
    working = max(patches * seeing, tokens * reading) * value_bytes
    logits = 2 * 4 * text["vocab_size"]
    shown = patches * pixels * (4 + value_bytes)  # as the processor makes them, and cast
    return Need(
        parameters * value_bytes,
        max_batch * (tokens + further_tokens) * keys * value_bytes,
        int(_MARGIN * max_batch * (working + logits + shown)),
    )


def _vision_width(vision: Mapping[str, Any]) -> int:
    # Qwen2-VL calls it embed_dim: its hidden_size is the width of the text side.
    return int(vision.get("embed_dim") or vision["hidden_size"])


def _vision_feed_forward(vision: Mapping[str, Any]) -> int:
    if "mlp_ratio" in vision:
        return int(_vision_width(vision) * vision["mlp_ratio"])
    return int(vision["intermediate_size"])


def check_fits(
    needed: Callable[[int, int], Need], max_batch: int, max_pixels: int, free_bytes: int, where: str
) -> None:
    """Raise InvalidInput, with what would fit, where `needed`(max_batch, max_pixels) is more than free."""
    need = needed(max_batch, max_pixels)
    if need.total <= free_bytes:
        return
    ways = []
    pixels = _largest(lambda n: needed(max_batch, n).total <= free_bytes, max_pixels)
    if pixels >= _LEAST_PIXELS:
        ways.append(f"export with --max-pixels {pixels} or less")
    batch = _largest(lambda n: needed(n, max_pixels).total <= free_bytes, max_batch)
    if batch:
        ways.append(f"set max_batch_images in qwen/config.pbtxt to {batch} or less")
    ways = ways or ["use a smaller model, or one with fewer bytes per weight (--dtype bf16)"]
    raise InvalidInput(
        f"{max_batch} images of {max_pixels} pixels need about {_gb(need.total)} of memory (weights "
        f"{_gb(need.weights)}, keys and values {_gb(need.cache)}, activations "
        f"{_gb(need.activations)}); {where} has {_gb(free_bytes)} free: {', or '.join(ways)}"
    )


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, by halving; 0 where none does."""
    low = 0
    while below - low > 1:
        middle = (low + below) // 2
        low, below = (middle, below) if fits(middle) else (low, middle)
    return low


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def stored_parameters(folder: Path) -> int:
    """How many numbers the folder's *.safetensors hold, from their headers alone."""
    return sum(_parameters(path) for path in folder.glob("*.safetensors"))


def _parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(e["shape"]) for name, e in header.items() if name != "__metadata__")


def free_ram_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """What this process may still take: the machine's available memory, or its cgroup's (v2) if less.

    Of the cgroup's use, file pages that have not been touched lately do not count: they give way.
    """
    lines = (line.split() for line in meminfo.read_text().splitlines())
    available = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (cgroup / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):  # no cgroup of its own, or "max"
        return available
    return min(available, limit - used + int(statistics["inactive_file"]))
