"""osediff_vae_decoder: LATENT (B, C, h, w), x0 scaled → IMAGE uint8 (B, H, W, 3), SAMPLE (B, 3, H, W).

SAMPLE is the image before clamping, in [-1, 1] or nearly; the repository's config leaves it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, Component, Probe
from panotriton_export.osediff.upsample import replace_upsamplers

__all__ = ["Decoder", "vae_decoder_component"]

_TRACED = (2, 6, 10)  # batch, h, w
_PROBED = ((1, 9, 4), (3, 5, 8))
_LIMITS = LIMITS | {"fp16": LIMITS["fp32"]}  # half precision overflows in the last levels


class Decoder(nn.Module):
    """Scaled latents to bytes. Its weights are always fp32."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        replace_upsamplers(vae.decoder.up_blocks)
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, LATENT: Tensor) -> tuple[Tensor, Tensor]:
        sample = self.decoder(self.post_quant_conv(LATENT / self.scaling_factor))  # (B, 3, H, W)
        levels = (sample.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)  # truncates
        return levels.permute(0, 2, 3, 1), sample


@torch.no_grad()
def vae_decoder_component(vae: Any, precision: str = "fp32") -> Component:
    """Takes the decoder over and leaves the encoder alone."""
    probes = [_probe(vae, *shape) for shape in _PROBED]
    module = Decoder(vae)
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    axes = {0: torch.export.Dim("batch", max=MAX_BATCH), 2: height, 3: width}
    traced = {"LATENT": _latent(vae, *_TRACED)}
    limit = _LIMITS[precision]
    largest = max(float(probe.expected["SAMPLE"].abs().max()) for probe in probes)
    # A level is 1/127.5 of SAMPLE's units, and 1/255 of IMAGE's; the last is what truncation turns.
    limits = {"SAMPLE": limit, "IMAGE": 1 / 255 + limit * largest / 2}
    outputs = ["IMAGE", "SAMPLE"]
    return Component(OSEDIFF.decoder, module, traced, {"LATENT": axes}, outputs, probes, limits)


def _latent(vae: Any, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    shape = (batch, vae.config.latent_channels, height, width)
    return torch.randn(shape, generator=generator) * float(vae.config.scaling_factor)


def _probe(vae: Any, *shape: int) -> Probe:
    latent = _latent(vae, *shape)
    sample = vae.decode(latent / vae.config.scaling_factor).sample
    image = ((sample.clamp(-1, 1) * 0.5 + 0.5) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return Probe({"LATENT": latent}, {"SAMPLE": sample, "IMAGE": image})
