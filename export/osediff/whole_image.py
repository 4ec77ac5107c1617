"""One image through all exported graphs and the server's arithmetic, against the reference."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panotriton.local import in_process
from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.pipeline.contract import Options
from panotriton_export.gpu_operators import open_here

__all__ = ["psnr_db", "run_graphs"]

U8 = NDArray[np.uint8]


def run_graphs(repository: Path, image: U8, *, upscale: int = 2, prompt: str = "") -> U8:
    """Super-resolve (H, W, 3) with adain, one graph in memory at a time."""
    resolver = SuperResolver(repository / "osediff" / "1", Limits(images_in_flight=1))
    call = in_process(lambda model: open_here(repository / model))
    options = Options(upscale=upscale, align="adain", prompt=prompt)
    work = resolver.run(image[None], call, options)
    result: U8 = asyncio.run(work)[0]
    return result


def psnr_db(image: U8, reference: U8) -> float:
    """Peak signal-to-noise ratio; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
