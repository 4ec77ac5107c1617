"""One image through all exported graphs and the server's arithmetic, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from panotriton.osediff import align, one_step, plan_size
from panotriton_export.osediff.graph import session

__all__ = ["psnr_db", "run_graphs"]

U8 = NDArray[np.uint8]


def run_graphs(
    repository: Path, image: U8, alpha_cumprod: float, *, upscale: int = 2, prompt: str = ""
) -> U8:
    """Super-resolve (H, W, 3) without latent tiles, one graph in memory at a time; adain."""
    plan = plan_size(image.shape[0], image.shape[1], upscale)
    source = plan.prepare(image)
    tokens = Tokenizer.from_file(str(repository / "osediff" / "1" / "tokenizer.json"))
    ids = np.array([tokens.encode(prompt).ids])  # (1, 77)
    embeds = _run(repository, "osediff_text_encoder", "PROMPT_EMBEDS", INPUT_IDS=ids)
    latent = _run(repository, "osediff_vae_encoder", "LATENT", IMAGE=source[None])
    noise = _run(repository, "osediff_unet", "NOISE", LATENT=latent, PROMPT_EMBEDS=embeds)
    x0 = one_step(latent, noise, alpha_cumprod)
    sharp = _run(repository, "osediff_vae_decoder", "IMAGE", LATENT=x0)[0]
    return plan.finish(align(sharp, source, "adain"))


def _run(repository: Path, model: str, output: str, **inputs: NDArray[Any]) -> NDArray[Any]:
    graph = session(repository / model / "1" / "model.onnx")
    result: NDArray[Any] = graph.run([output], inputs)[0]
    return result


def psnr_db(image: U8, reference: U8) -> float:
    """Peak signal-to-noise ratio; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
