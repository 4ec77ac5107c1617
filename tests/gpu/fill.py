"""Write the weights that graphs.py left out: fill.py FOLDER, every */1/manifest.json below it.

Seeded, with the mean and deviation of what was left out; seconds on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

_TYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def fill(manifest: Path, device: str) -> int:
    """model.onnx.data beside the manifest; its bytes."""
    content = json.loads(manifest.read_text())
    generator = torch.Generator(device).manual_seed(0)
    with manifest.with_name("model.onnx.data").open("wb") as file:
        file.truncate(content["total"])
        for tensor in content["tensors"]:
            file.seek(tensor["offset"])
            file.write(_values(tensor, generator).cpu().numpy().tobytes())
    return int(content["total"])


def _values(tensor: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    kind, shape = _TYPES[tensor["dtype"]], tensor["shape"]
    if kind == torch.int64:  # positions
        return torch.arange(torch.Size(shape).numel())
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return (drawn * tensor["std"] + tensor["mean"]).to(kind)


if __name__ == "__main__":
    there = "cuda" if torch.cuda.is_available() else "cpu"
    for found in sorted(Path(sys.argv[1]).glob("*/1/manifest.json")):
        print(found.parents[1].name, f"{fill(found, there) / 1e6:.0f} MB", flush=True)
