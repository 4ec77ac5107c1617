"""osediff_vae_decoder: LATENT (B, C, h, w), x0 scaled → IMAGE uint8 (B, H, W, 3), SAMPLE (B, 3, H, W).

SAMPLE is the image before clamping, in [-1, 1] or nearly; the repository's config leaves it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, WEIGHTS, Component, Probe
from panotriton_export.osediff.upsample import replace_upsamplers

__all__ = ["PROBED", "Decoder", "checked_images", "vae_decoder_component"]

_TRACED = (2, 6, 10)  # batch, h, w
PROBED = ((1, 9, 4), (3, 5, 8))
_PICTURE = (16, 20)  # in latents: 128×160 px of Stable Diffusion's


class Decoder(nn.Module):
    """Scaled latents to bytes."""

    def __init__(self, vae: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.decoder = vae.decoder
        replace_upsamplers(vae.decoder.up_blocks)
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype = dtype
        self.to(dtype)

    def forward(self, LATENT: Tensor) -> tuple[Tensor, Tensor]:
        latent = (LATENT / self.scaling_factor).to(self.dtype)
        sample = self.decoder(self.post_quant_conv(latent)).float()  # (B, 3, H, W)
        levels = sample.clamp(-1, 1) * 127.5 + 127.5
        # Truncates; last of all, since TensorRT does not even move bytes.
        return levels.permute(0, 2, 3, 1).to(torch.uint8), sample


@torch.no_grad()
def vae_decoder_component(vae: Any, precision: str = "fp32") -> Component:
    """Takes the decoder over and leaves the encoder alone.

    In fp16 it also has to show whole pictures: some decoders overflow there, in the last levels.
    """
    is_half = WEIGHTS[precision] == torch.float16
    pictures = [_picture(vae, each) for each in checked_images(vae)] if is_half else []
    probes = [_probe(vae, *shape) for shape in PROBED]
    module = Decoder(vae, WEIGHTS[precision])
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    axes = {0: torch.export.Dim("batch", max=MAX_BATCH), 2: height, 3: width}
    traced = {"LATENT": _latent(vae, *_TRACED)}
    limit = LIMITS[precision]
    largest = max(float(probe.expected["SAMPLE"].abs().max()) for probe in probes)
    # A level is 1/127.5 of SAMPLE's units, and 1/255 of IMAGE's; the last is what truncation turns.
    limits = {"SAMPLE": limit, "IMAGE": 1 / 255 + limit * largest / 2}
    outputs = ["IMAGE", "SAMPLE"]
    return Component(
        OSEDIFF.decoder, module, traced, {"LATENT": axes}, outputs, probes, limits, pictures
    )


def _latent(vae: Any, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    shape = (batch, vae.config.latent_channels, height, width)
    return torch.randn(shape, generator=generator) * float(vae.config.scaling_factor)


def checked_images(vae: Any) -> list[Tensor]:
    """(1, 3, H, W) in [-1, 1]: gradients, noise, black, white, and saturated colours side by side."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (side * factor for side in _PICTURE)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    stripes = [np.sign(np.sin(x * rate) + 1e-9) for rate in (3, 9, 27)]
    noise = np.random.default_rng(0).uniform(-1, 1, (3, height, width))
    planes = [np.stack([x, y, -x * y]), noise, *(np.full_like(noise, v) for v in (-1, 1)), stripes]
    return [torch.from_numpy(np.array(each, np.float32))[None] for each in planes]


def _picture(vae: Any, pixels: Tensor) -> Probe:
    """What the decoder makes of an image's own latent."""
    return _decoded(vae, vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)


def _probe(vae: Any, *shape: int) -> Probe:
    return _decoded(vae, _latent(vae, *shape))


def _decoded(vae: Any, latent: Tensor) -> Probe:
    sample = vae.decode(latent / vae.config.scaling_factor).sample
    image = ((sample.clamp(-1, 1) * 0.5 + 0.5) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return Probe({"LATENT": latent}, {"SAMPLE": sample, "IMAGE": image})
