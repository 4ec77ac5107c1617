"""The VAE."""

from __future__ import annotations

from diffusers import AutoencoderKL

__all__ = ["LATENT_CHANNELS", "new_vae"]

LATENT_CHANNELS = 4


def new_vae(scaling_factor: float) -> AutoencoderKL:
    """Two pixels per latent along each side, where Stable Diffusion has 8: at x2 a latent is then an
    input pixel, and no decoder this small has to tell the pixels of a block apart. One norm group:
    with four channels at full size, more would take every channel's mean, so the colour, away."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=512,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )
