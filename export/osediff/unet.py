"""osediff_unet: LATENT (B, C, h, w), PROMPT_EMBEDS (B, 77, D) → NOISE (B, C, h, w), at t = 999."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from panotriton.pipeline.networks import OSEDIFF
from panotriton_export.graph import LIMITS, MAX_BATCH, WEIGHTS, Component, Probe
from panotriton_export.osediff.base import PROMPT_TOKENS, TIMESTEP
from panotriton_export.osediff.upsample import replace_upsamplers

__all__ = ["PROBED", "OneStepUNet", "unet_component"]

_TRACED = (2, 24, 40)  # batch, h, w
PROBED = ((1, 17, 30), (3, 32, 16))  # odd sides too: 600 px make 75 latents


class OneStepUNet(nn.Module):
    """A UNet2DConditionModel at one fixed time step. Takes the network over and changes it.

    The time embedding only ever adds a constant after each ResNet block's first convolution: it
    moves into that convolution's bias. Sides need not be multiples of anything: every upsampling
    is told the size of the skip connection that it meets.
    """

    def __init__(self, unet: Any, dtype: torch.dtype) -> None:
        super().__init__()
        _fold_time(unet)
        replace_upsamplers(unet.up_blocks)
        self.unet = unet
        self.dtype = dtype
        self.to(dtype)

    def forward(self, LATENT: Tensor, PROMPT_EMBEDS: Tensor) -> Tensor:
        sample, embeds = LATENT.to(self.dtype), PROMPT_EMBEDS.to(self.dtype)
        sample = self.unet.conv_in(sample)
        skips = [sample]
        for block in self.unet.down_blocks:
            sample, passed = block(sample, temb=None, **_prompt(block, embeds))
            skips += passed
        if self.unet.mid_block is not None:
            sample = self.unet.mid_block(sample, temb=None, encoder_hidden_states=embeds)
        for block in self.unet.up_blocks:
            sample = _up(block, sample, skips, embeds)
        sample = self.unet.conv_act(self.unet.conv_norm_out(sample))
        return self.unet.conv_out(sample).float()  # type: ignore[no-any-return]


def _up(block: Any, sample: Tensor, skips: list[Tensor], embeds: Tensor) -> Tensor:
    """Run an up block on the skips that belong to it, which are taken off the list."""
    count = len(block.resnets)
    own = tuple(skips[-count:])
    del skips[-count:]
    size = skips[-1].shape[2:] if skips else None
    result: Tensor = block(
        sample,
        temb=None,
        res_hidden_states_tuple=own,
        upsample_size=size,
        **_prompt(block, embeds),
    )
    return result


def _prompt(block: Any, embeds: Tensor) -> dict[str, Tensor]:
    has_cross_attention = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": embeds} if has_cross_attention else {}


@torch.no_grad()
def _fold_time(unet: Any) -> None:
    embedding = unet.time_embedding(unet.time_proj(torch.tensor([TIMESTEP])))  # (1, 4·C₀)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
            block.conv1.bias += block.time_emb_proj(block.nonlinearity(embedding))[0]
            block.time_emb_proj = None


@torch.no_grad()
def unet_component(unet: Any, precision: str = "fp32") -> Component:
    """Takes the network over: it is unusable afterwards, so that it is never in memory twice."""
    probes = [_probe(unet, *shape) for shape in PROBED]
    traced = _inputs(unet, *_TRACED)
    module = OneStepUNet(unet, WEIGHTS[precision])
    batch = torch.export.Dim("batch", max=MAX_BATCH)
    least = 2 ** (len(unet.config.block_out_channels) - 1) + 1  # the exporter takes 1 for special
    height, width = (torch.export.Dim(side, min=least) for side in ("height", "width"))
    dynamic = {"LATENT": {0: batch, 2: height, 3: width}, "PROMPT_EMBEDS": {0: batch}}
    limits = {"NOISE": LIMITS[precision]}
    return Component(OSEDIFF.denoiser, module, traced, dynamic, ["NOISE"], probes, limits)


def _inputs(unet: Any, batch: int, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(height)
    shapes = {
        "LATENT": (batch, unet.config.in_channels, height, width),
        "PROMPT_EMBEDS": (batch, PROMPT_TOKENS, unet.config.cross_attention_dim),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _probe(unet: Any, batch: int, height: int, width: int) -> Probe:
    inputs = _inputs(unet, batch, height, width)
    noise = unet(inputs["LATENT"], TIMESTEP, inputs["PROMPT_EMBEDS"]).sample
    return Probe(inputs, {"NOISE": noise})
