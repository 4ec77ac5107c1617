"""osediff_vae_encoder: IMAGE uint8 (B, H, W, 3) RGB → LATENT (B, C, h, w), the mode, scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, WEIGHTS, Component, Probe

__all__ = ["PROBED", "Encoder", "vae_encoder_component"]

_TRACED = (2, 6, 10)  # batch, h, w in latents
PROBED = ((1, 9, 4), (3, 5, 8))


class Encoder(nn.Module):
    """Bytes to scaled latents; the [-1, 1] normalisation is part of the graph."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv or nn.Identity()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype = dtype
        self.to(dtype)

    def forward(self, IMAGE: Tensor) -> Tensor:
        # Bytes are no type that TensorRT computes in, not even to move them.
        pixels = IMAGE.float().permute(0, 3, 1, 2) / 127.5 - 1  # (B, 3, H, W)
        moments = self.quant_conv(self.encoder(pixels.to(self.dtype)))  # (B, 2C, h, w)
        mode = moments[:, : moments.shape[1] // 2]
        return mode.float() * self.scaling_factor  # type: ignore[no-any-return]


@torch.no_grad()
def vae_encoder_component(vae: Any, precision: str = "fp32") -> Component:
    """Takes the encoder over and leaves the decoder alone."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    probes = [_probe(vae, factor, *shape) for shape in PROBED]
    module = Encoder(vae, WEIGHTS[precision])
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    axes = {0: torch.export.Dim("batch", max=MAX_BATCH), 1: factor * height, 2: factor * width}
    traced = {"IMAGE": _image(factor, *_TRACED)}
    limits = {"LATENT": LIMITS[precision]}
    return Component(OSEDIFF.encoder, module, traced, {"IMAGE": axes}, ["LATENT"], probes, limits)


def _image(factor: int, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    shape = (batch, factor * height, factor * width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _probe(vae: Any, factor: int, *shape: int) -> Probe:
    image = _image(factor, *shape)
    pixels = image.permute(0, 3, 1, 2) / 255 * 2 - 1
    latent = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    return Probe({"IMAGE": image}, {"LATENT": latent})
