"""The UNet of the one denoising step."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from panotriton_export.train_small.super_resolution.autoencoder import LATENT_CHANNELS
from panotriton_export.train_small.super_resolution.text import PROMPT_WIDTH

__all__ = ["new_unet"]

_NORM_EPS = 16.0


def new_unet() -> UNet2DConditionModel:
    """Most of its work is done at a quarter of the image's size; attention only where 288 × 288 latents
    have become 18 × 18. Starts by predicting ε = 0.

    `norm_eps` is far above the variance of what is normalised: what is left of group norm is a
    shift, which a crop and the photograph that it is of have in common better than their contrast.
    """
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*["DownBlock2D"] * 4, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * 4),
        block_out_channels=(8, 16, 24, 24, 24),
        layers_per_block=1,
        cross_attention_dim=PROMPT_WIDTH,
        attention_head_dim=1,  # that many heads, by diffusers' old naming
        norm_num_groups=1,
        norm_eps=_NORM_EPS,
        use_linear_projection=True,
    )
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.GroupNorm) and module.eps == _NORM_EPS:
            nn.init.constant_(module.weight, 2 * _NORM_EPS**0.5)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
    with torch.no_grad():
        unet.conv_in.weight.mul_(3)
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet
