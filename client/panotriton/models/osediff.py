"""OSEDiff: its size rules and its one step.

"One-Step Effective Diffusion Network for Real-World Image Super-Resolution", Wu et al., NeurIPS 2024.
What it shares with other one-step networks is in `super_resolution`, `tiles`, `colours` and `tags`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.models.one_step import OneStepNetwork, SizePlan
from panotriton.pipeline.networks import Roles
from panotriton.pipeline.sizes import enlarged_size, network_size

__all__ = ["Network", "one_step", "plan_size"]

F32 = NDArray[np.float32]


class Network(OneStepNetwork):
    """Of osediff.json besides: `alpha_cumprod`, ᾱ at the last time step, and `process_size` in px."""

    def __init__(self, settings: Mapping[str, Any], roles: Roles) -> None:
        super().__init__(settings, roles)
        self._alpha_cumprod = float(settings["alpha_cumprod"])
        self._process_size = int(settings["process_size"])

    def plan(self, height: int, width: int, upscale: int) -> SizePlan:
        return plan_size(height, width, upscale, self._process_size)

    def step(self, latent: F32, noise: F32) -> F32:
        return one_step(latent, noise, self._alpha_cumprod)


def plan_size(height: int, width: int, upscale: int, process_size: int = 512) -> SizePlan:
    """Upstream's size rules: a short side below process_size/upscale is first enlarged to it."""
    enlarged = enlarged_size(height, width, upscale, process_size)
    upscaled = (enlarged[0] * upscale, enlarged[1] * upscale)
    network = network_size(height, width, upscale, process_size)
    small = enlarged != (height, width)
    return SizePlan(
        enlarged, upscaled, network, (upscale * height, upscale * width) if small else network
    )


def one_step(latent: F32, noise: F32, alpha_cumprod: float) -> F32:
    """x0 = (z - √(1-ᾱ)·ε)/√ᾱ at the last time step, in fp32: an error in ε grows 14.6 times."""
    scale = np.float32(1 / np.sqrt(alpha_cumprod))
    noise_scale = np.float32(np.sqrt(1 - alpha_cumprod) / np.sqrt(alpha_cumprod))
    return latent * scale - noise * noise_scale
