"""The VAE."""

from __future__ import annotations

from diffusers import AutoencoderKL

__all__ = ["LATENT_CHANNELS", "new_vae"]

LATENT_CHANNELS = 8


def new_vae(scaling_factor: float) -> AutoencoderKL:
    """Two pixels per latent along each side, where Stable Diffusion has 8: at x2 a latent is then an
    input pixel, and no decoder this small has to tell the pixels of a block apart.

    Next to nothing at the full size, where a channel costs most: the encoder has no block there, the
    decoder one. Eight channels are what a vector register holds. One norm group, see `codec`.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=0,  # and one more in the decoder, as always
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=512,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )
