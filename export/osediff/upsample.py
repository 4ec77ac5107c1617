"""Nearest-neighbour upsampling without diffusers' workarounds, whose conditions on the number of
images and pixels would become part of what the exporter has to prove."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["replace_upsamplers"]


class _Upsample(nn.Module):
    """Twice the size, or `output_size` where an odd-sized skip connection waits."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        scale = 2.0 if output_size is None else None
        enlarged = F.interpolate(hidden_states, output_size, scale, mode="nearest")
        return self.conv(enlarged)  # type: ignore[no-any-return]


def replace_upsamplers(up_blocks: Any) -> None:
    for block in up_blocks:
        for index, upsampler in enumerate(block.upsamplers or ()):
            block.upsamplers[index] = _Upsample(upsampler.conv)
