"""What training makes small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["adain", "loss"]

EDGE_PX = 8


def loss(output: Tensor, spoilt: Tensor, wanted: Tensor) -> Tensor:
    """Charbonnier and edges of what adain makes of the output, as the server does, and a little of
    the raw output over 8-pixel means, so that its colour is right before adain too.

    All but a little leaves `EDGE_PX` out: convolutions pad with zeros, which is felt there, and a
    training crop is nearly all edge where a photograph isn't.
    """
    inside = (..., slice(EDGE_PX, -EDGE_PX), slice(EDGE_PX, -EDGE_PX))
    error = adain(output[inside], spoilt[inside]) - wanted[inside]
    edges = [error.diff(dim=axis).abs().mean() for axis in (2, 3)]
    raw = output - wanted
    coarse = _charbonnier(F.avg_pool2d(raw[inside], 8))
    return _charbonnier(error) + 0.5 * sum(edges) + 0.2 * coarse + 0.05 * _charbonnier(raw)


def adain(image: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) with the reference's mean and deviation per channel (unbiased variance + 1e-5)."""
    mean, variance = image.mean((2, 3), keepdim=True), image.var((2, 3), keepdim=True)
    wanted, spread = reference.mean((2, 3), keepdim=True), reference.var((2, 3), keepdim=True)
    return (image - mean) * ((spread + 1e-5) / (variance + 1e-5)).sqrt() + wanted


def _charbonnier(difference: Tensor) -> Tensor:
    return torch.sqrt(difference.square() + 1e-6).mean()
