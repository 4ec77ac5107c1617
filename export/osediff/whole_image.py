"""One image through all exported graphs and the server's arithmetic, against the reference."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from panotriton.errors import ExportError
from panotriton.local import in_process
from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.pipeline.contract import Options
from panotriton.pipeline.files import TOKENIZER
from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.gpu_operators import open_here

__all__ = ["check_distinct", "psnr_db", "run_graphs"]

_PROMPTS = ("a red house under trees", "seven boats at sea, fog")

U8 = NDArray[np.uint8]


def run_graphs(repository: Path, image: U8, *, upscale: int = 2, prompt: str = "") -> U8:
    """Super-resolve (H, W, 3) with adain, one graph in memory at a time."""
    resolver = SuperResolver(repository / "osediff" / "1", Limits(images_in_flight=1))
    call = in_process(lambda model: open_here(repository / model))
    options = Options(upscale=upscale, align="adain", prompt=prompt)
    work = resolver.run(image[None], call, options)
    result: U8 = asyncio.run(work)[0]
    return result


def check_distinct(repository: Path) -> None:
    """Raise ExportError for a network that answers two inputs alike, or with what is no number.

    Of such weights the graphs equal PyTorch, too.
    """
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(repository / "osediff" / "1" / TOKENIZER))
    ids = [np.array([tokenizer.encode(text).ids], np.int64) for text in _PROMPTS]
    images = [rng.integers(0, 256, (1, 256, 256, 3), np.uint8) for _ in range(2)]
    embeds = _distinct(
        repository / OSEDIFF.text_encoder, "PROMPT_EMBEDS", [{"INPUT_IDS": i} for i in ids]
    )
    latents = _distinct(repository / OSEDIFF.encoder, "LATENT", [{"IMAGE": i} for i in images])
    conditioned = [{"LATENT": one, "PROMPT_EMBEDS": embeds[0]} for one in latents]
    _distinct(repository / OSEDIFF.denoiser, "NOISE", conditioned)
    _distinct(repository / OSEDIFF.decoder, "IMAGE", [{"LATENT": one} for one in latents])


def _distinct(model: Path, output: str, inputs: list[dict[str, Any]]) -> list[NDArray[Any]]:
    """The network's answer to each of two inputs."""
    name = model.name
    network = open_here(model)
    answers = [np.asarray(network.run([output], one)[0]) for one in inputs]
    if not all(np.isfinite(answer).all() for answer in answers):
        raise ExportError(f"{name} answers with what is no number: its weights are damaged")
    if np.allclose(*answers, rtol=1e-4, atol=1e-6):
        raise ExportError(
            f"{name} answers two different inputs alike; expected different answers: its weights, or the "
            "tokenizer's vocabulary, are not those of a trained model"
        )
    return answers


def psnr_db(image: U8, reference: U8) -> float:
    """Peak signal-to-noise ratio; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
