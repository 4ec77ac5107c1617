"""OSEDiff in plain PyTorch, written from the paper and upstream's behaviour, apart from the server's
code: what the exported graphs and the server are compared with.

It differs from upstream in two places: the latent is the mode instead of an unseeded sample, and
the VAE is never tiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from panotriton_export.osediff.base import PROMPT_TOKENS, TIMESTEP
from panotriton_export.osediff.checkpoint import Checkpoint, open_checkpoint

__all__ = [
    "LATENT_OVERLAP",
    "LATENT_TILE",
    "PROCESS_SIZE",
    "Pipeline",
    "from_checkpoint",
    "load_pipeline",
    "super_resolve",
]

PROCESS_SIZE = 512
LATENT_TILE = 96
LATENT_OVERLAP = 32

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Merged networks in fp32 on the CPU."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    alpha_cumprod: float


def load_pipeline(base: Path, checkpoint: Path) -> Pipeline:
    """Read a diffusers folder and an osediff.pkl whole; raises CheckpointError."""
    return from_checkpoint(open_checkpoint(base, checkpoint))


def from_checkpoint(checkpoint: Checkpoint) -> Pipeline:
    base = checkpoint.base
    return Pipeline(
        checkpoint.load_unet(),
        checkpoint.load_vae(),
        base.load_text_encoder(),
        base.load_tokenizer(),
        base.alpha_cumprod,
    )


@torch.no_grad()
def super_resolve(
    pipeline: Pipeline,
    image: U8,
    *,
    upscale: int = 2,
    align: str = "adain",
    prompt: str = "",
    tiled: bool | None = None,
) -> U8:
    """Super-resolve one RGB image (H, W, 3). tiled: None tiles latents of more than 96² values.

    Returns upscale × the input, its sides rounded down to multiples of 8 unless the image is so
    small that it was enlarged first.
    """
    source = _network_size(Image.fromarray(image), upscale)
    result = Image.fromarray(_sharpen(pipeline, np.asarray(source), prompt, tiled))
    if align != "nofix":
        result = _align(result, source, align)
    height, width = image.shape[:2]
    if min(height, width) < PROCESS_SIZE // upscale:
        result = result.resize((upscale * width, upscale * height))
    return np.asarray(result)


def _network_size(image: Image.Image, upscale: int) -> Image.Image:
    least = PROCESS_SIZE // upscale
    if min(image.size) < least:
        scale = least / min(image.size)
        image = image.resize((int(scale * image.width), int(scale * image.height)))
    image = image.resize((image.width * upscale, image.height * upscale))
    multiple = (image.width // 8 * 8, image.height // 8 * 8)
    return image.resize(multiple, Image.Resampling.LANCZOS)


def _sharpen(pipeline: Pipeline, source: U8, prompt: str, tiled: bool | None) -> U8:
    vae = pipeline.vae
    pixels = torch.tensor(source).permute(2, 0, 1)[None] / 255  # (1, 3, H, W) in [0, 1]
    latent = vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    noise = _predict_noise(pipeline, latent, embed(pipeline, prompt), tiled)  # (1, C, h, w)
    alpha = pipeline.alpha_cumprod
    x0 = (latent - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sample = vae.decode(x0 / vae.config.scaling_factor).sample.clamp(-1, 1)
    return _to_uint8(sample[0] * 0.5 + 0.5)


@torch.no_grad()
def embed(pipeline: Pipeline, prompt: str) -> Tensor:
    """A prompt's embedding (1, 77, D)."""
    tokens = pipeline.tokenizer(
        prompt,
        max_length=PROMPT_TOKENS,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    embedding: Tensor = pipeline.text_encoder(tokens.input_ids)[0]
    return embedding


def _predict_noise(
    pipeline: Pipeline, latent: Tensor, embeds: Tensor, tiled: bool | None
) -> Tensor:
    height, width = latent.shape[2:]
    if tiled is None:
        tiled = height * width > LATENT_TILE**2
    if not tiled:
        return _unet(pipeline, latent, embeds)
    tile = min(LATENT_TILE, height, width)
    weights = _gaussian(tile)
    total, weight = torch.zeros_like(latent), torch.zeros_like(latent)
    for y in _offsets(height, tile):
        for x in _offsets(width, tile):
            window = (..., slice(y, y + tile), slice(x, x + tile))
            total[window] += _unet(pipeline, latent[window], embeds) * weights
            weight[window] += weights
    return total / weight


def _unet(pipeline: Pipeline, latent: Tensor, embeds: Tensor) -> Tensor:
    noise: Tensor = pipeline.unet(latent, TIMESTEP, encoder_hidden_states=embeds).sample
    return noise


def _offsets(side: int, tile: int) -> list[int]:
    """Tile starts at steps of tile - overlap until the side is covered, the last at its end."""
    offsets = [0]
    while offsets[-1] + tile < side:
        offsets.append(offsets[-1] + tile - LATENT_OVERLAP)
    offsets[-1] = side - tile
    return offsets


def _gaussian(tile: int) -> Tensor:
    """Upstream's weights (tile, tile), float64; their centre is half a latent off along y."""
    index = torch.arange(tile, dtype=torch.float64)
    variance = 0.01
    rows, columns = ((index - middle) / tile for middle in (tile / 2, (tile - 1) / 2))
    bells = [torch.exp(-(d**2) / (2 * variance)) for d in (rows, columns)]
    return torch.outer(*bells) / (2 * torch.pi * variance)


def _to_uint8(image: Tensor) -> U8:
    """(3, H, W) in [0, 1] → (H, W, 3), truncated."""
    return np.asarray((image * 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _align(image: Image.Image, source: Image.Image, align: str) -> Image.Image:
    content, style = (
        torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 255
        for picture in (image, source)
    )
    aligned = _adain(content, style) if align == "adain" else _wavelet(content, style)
    return Image.fromarray(_to_uint8(aligned[0].clamp(0, 1)))


def _adain(content: Tensor, style: Tensor) -> Tensor:
    (mean, deviation), (target_mean, target_deviation) = map(_moments, (content, style))
    return (content - mean) / deviation * target_deviation + target_mean


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(image, dim=(2, 3), keepdim=True)  # unbiased
    return mean, (variance + 1e-5).sqrt()


def _wavelet(content: Tensor, style: Tensor) -> Tensor:
    return content - _low_band(content) + _low_band(style)


def _low_band(image: Tensor) -> Tensor:
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    for distance in (1, 2, 4, 8, 16):
        padded = F.pad(image, (distance,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, groups=3, dilation=distance)
    return image
