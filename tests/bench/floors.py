"""The least time of one call of a network of Stable Diffusion 2.1-base, by its FLOPs: see `cost`."""

from __future__ import annotations

from collections.abc import Sequence

import cost
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from panotriton_export.osediff.random_sd import UNET, VAE, vae_blocks

WIDTH = 1024


def at_full_size(labels: Sequence[str]) -> dict[str, float]:
    """ms at 989 TFLOP/s, by label: `osediff_unet 8x4x96x96`, a model and its first input's shape."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET["sd21"], use_linear_projection=True)
        vae = AutoencoderKL(**vae_blocks(VAE["sd21"]))
    peak, _ = cost.PUBLISHED["H100"]
    found = {}
    for label in labels:
        model, _, text = label.partition(" ")
        shape = tuple(map(int, text.split("x")))
        if model == "osediff_unet":
            work = cost.count(unet, lambda shape=shape: _denoise(unet, shape))
        elif model == "osediff_vae_encoder":
            fed = (shape[0], 3, *shape[1:3])  # (B, H, W, 3) → (B, 3, H, W)
            work = cost.count(vae.encoder, lambda fed=fed: vae.encoder(cost.meta(*fed)))
        elif model == "osediff_vae_decoder":
            work = cost.count(vae.decoder, lambda shape=shape: vae.decoder(cost.meta(*shape)))
        else:
            continue
        found[label] = round(work.flops / peak * 1e3, 2)
    return found


def _denoise(unet: torch.nn.Module, shape: tuple[int, ...]) -> object:
    batch = shape[0]
    embeds = cost.meta(batch, 77, WIDTH)
    return unet(cost.meta(*shape), cost.meta(batch), encoder_hidden_states=embeds)
