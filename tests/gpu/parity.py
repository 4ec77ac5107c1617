"""What the GPU computes against what the CPU does from the same files: each network, and a whole image.

python tests/gpu/parity.py --repository R
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import networks
import numpy as np
import record
from record import script

from panotriton.local import in_process
from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.pipeline.contract import Options
from panotriton.pipeline.networks import OSEDIFF
from panotriton.server.engines import CPU, Graph

SIDES = (24, 40)  # latents


def on_cpu(model: Path) -> Graph:
    """The portable twin: what the kit carries, or made here."""
    twin = model / "1" / "portable.onnx"
    if twin.is_file():
        return CPU.open(twin)
    from panotriton_export.gpu_operators import open_here  # noqa: PLC0415, the kit needs it not

    return open_here(model)


def fed(graph: Any) -> dict[str, Any]:
    """Small inputs in the shapes that the graph takes."""
    random = np.random.default_rng(1)
    feeds = {}
    for each in graph.get_inputs():
        shape = [side if isinstance(side, int) else None for side in each.shape]
        if each.type == "tensor(uint8)":
            feeds[each.name] = random.integers(
                0, 256, (1, *(8 * side for side in SIDES), 3), np.uint8
            )
        elif each.type == "tensor(int64)":
            feeds[each.name] = random.integers(0, 500, (1, *shape[1:]))
        else:
            sides = iter(SIDES)
            filled = [1, *(next(sides) if side is None else side for side in shape[1:])]
            scale = 0.18215 if each.name == "LATENT" else 1.0
            feeds[each.name] = (random.normal(size=filled) * scale).astype(np.float32)
    return feeds


def compare(model: Path) -> dict[str, Any]:
    """max |GPU − CPU| / max |CPU|, of the first output that is no picture."""
    here, there = on_cpu(model), networks.opened(model, "shipped")
    names = [each.name for each in here.get_outputs() if each.type == "tensor(float)"]
    feeds = fed(here)
    (expected,), (got,) = here.run(names[:1], feeds), there.run(names[:1], feeds)
    return {
        "difference": float(f"{np.abs(got - expected).max() / np.abs(expected).max():.2e}"),
        "finite": bool(np.isfinite(got).all()),
    }


def whole_image(repository: Path, quick: bool) -> dict[str, Any]:
    """One image through all networks and the server's arithmetic, both ways: PSNR."""
    y, x = np.mgrid[0:256, 0:256]
    image = np.stack([x, y, (x + y) % 96 * 2.6], axis=-1).astype(np.uint8)
    image = image[:64, :64] if quick else image
    resolver = SuperResolver(repository / "osediff" / "1", Limits(images_in_flight=1))

    def run(opened: Any) -> Any:
        call = in_process(lambda model: opened(repository / model))  # one in memory at a time
        return asyncio.run(resolver.run(image[None], call, Options(align="nofix")))[0]

    difference = run(lambda model: networks.opened(model, "shipped")).astype(float) - run(on_cpu)
    error = np.mean(difference**2)
    return {"psnr_db": round(float(10 * np.log10(255**2 / max(error, 1e-12))), 1)}


def main() -> None:
    """Compare."""
    chosen = record.options(__doc__)
    found = record.Record(chosen.json)
    for model in OSEDIFF.required:
        found.attempt(model, lambda model=model: compare(chosen.repository / model))
    found.attempt("whole image", lambda: whole_image(chosen.repository, chosen.quick))


if __name__ == "__main__":
    script.run(main)
