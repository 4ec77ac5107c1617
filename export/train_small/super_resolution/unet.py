"""The UNet of the one denoising step."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn

from panotriton_export.train_small.super_resolution.autoencoder import LATENT_CHANNELS
from panotriton_export.train_small.super_resolution.text import PROMPT_WIDTH

__all__ = ["new_unet"]


def new_unet() -> UNet2DConditionModel:
    """Attention only where 96 × 96 latents have become 6 × 6. Starts by predicting ε = 0."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*["DownBlock2D"] * 4, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * 4),
        block_out_channels=(4, 8, 16, 16, 32),
        layers_per_block=1,
        cross_attention_dim=PROMPT_WIDTH,
        attention_head_dim=1,  # that many heads, by diffusers' old naming
        norm_num_groups=2,
        use_linear_projection=True,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet
