"""What a one-step network's models are fed, for images whose sizes are known beforehand."""

from __future__ import annotations

from collections.abc import Iterable

from panotriton.models.one_step import OneStepNetwork
from panotriton.models.super_resolution import Limits, vae_tile
from panotriton.pipeline.sizes import ImageSize

__all__ = ["input_shapes"]

Shape = tuple[int, ...]


def input_shapes(
    network: OneStepNetwork, limits: Limits, sizes: Iterable[ImageSize]
) -> dict[str, list[dict[str, Shape]]]:
    """By model: shapes of those inputs that follow an image's size, without the batch, each set once."""
    roles = network.roles
    names = {roles.encoder: "IMAGE", roles.denoiser: "LATENT", roles.decoder: "LATENT"}
    found: dict[str, list[Shape]] = {model: [] for model in names}
    for size in sizes:
        plan = network.plan(size.height, size.width, size.upscale)
        height, width = (side // network.latent_px for side in plan.network)
        pixels = vae_tile(*plan.network, limits)
        latents = (pixels[0] // network.latent_px, pixels[1] // network.latent_px)
        tile = min(network.tile, height, width)
        whole = height * width <= network.tile**2
        denoised = (height, width) if whole else (tile, tile)
        found[roles.encoder].append((*pixels, 3))
        found[roles.denoiser].append((network.channels, *denoised))
        found[roles.decoder].append((network.channels, *latents))
    return {
        model: [{names[model]: shape} for shape in dict.fromkeys(shapes)]
        for model, shapes in found.items()
    }
