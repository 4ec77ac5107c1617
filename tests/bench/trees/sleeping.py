"""Images through the super-resolution's arithmetic, around one device that sleeps: seconds, and its work's.

python sleeping.py FOLDER IMAGES_IN_FLIGHT: of a network's settings and tokenizer. `against` runs it with the
package of another tree: it imports no more of that than it has to.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.pipeline.contract import Options

# ms: a pair's, in the proportions that docs/PERFORMANCE.md has of one card.
SERVICE_MS = {"osediff_vae_encoder": 27, "osediff_unet": 30, "osediff_vae_decoder": 45}
TILES = 8  # that the UNet's time is for
PAIRS = 16


class Device:
    """Networks that work one after another, as on one GPU; busy_s: for how long they did."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._free = asyncio.Lock()

    async def call(self, model: str, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        if model not in SERVICE_MS:
            return {"PROMPT_EMBEDS": np.zeros((1, 77, 1024), np.float32)}
        shape = next(iter(inputs.values())).shape
        share = shape[0] / TILES if model == "osediff_unet" else 1
        async with self._free:
            began = time.perf_counter()
            await asyncio.sleep(SERVICE_MS[model] * share / 1e3)
            self.busy_s += time.perf_counter() - began
        if model == "osediff_vae_encoder":
            return {"LATENT": np.zeros((1, 4, shape[1] // 8, shape[2] // 8), np.float32)}
        if model == "osediff_unet":
            return {"NOISE": np.zeros(shape, np.float32)}
        return {"IMAGE": np.zeros((1, 8 * shape[2], 8 * shape[3], 3), np.uint8)}


async def main(folder: Path, in_flight: int, count: int) -> dict[str, float]:
    device = Device()
    resolver = SuperResolver(folder, Limits(images_in_flight=in_flight))
    images = np.random.default_rng(0).integers(0, 256, (count, 512, 1024, 3), np.uint8)
    began = time.perf_counter()
    await resolver.run(images, device.call, Options())
    return {"s": time.perf_counter() - began, "device_s": device.busy_s}


if __name__ == "__main__":
    small = "--quick" in sys.argv
    work = main(Path(sys.argv[1]), int(sys.argv[2]), 2 if small else PAIRS)
    print(json.dumps(asyncio.run(work)))
