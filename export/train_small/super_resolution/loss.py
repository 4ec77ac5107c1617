"""What training makes small."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["adain", "loss"]

EDGE_PX = 8
_LEAST = 3e-5  # half a grey level, squared


def loss(output: Tensor, wanted: Tensor, tones: float = 0.0) -> Tensor:
    """Mean over the crops of the root of the mean squared error: between its square, which the hardest
    degradations have nearly to themselves, and its logarithm, PSNR, where they hardly count. A tenth goes to
    the whole crop, the rest leaves `EDGE_PX` out: convolutions pad with zeros, which is felt there, and a
    training crop is nearly all edge where a photograph isn't. tones: the weight of the same of means of
    8 × 8 px, which detail leaves alone and a shift of colour does not.
    """
    apart = output - wanted
    inner = apart[..., EDGE_PX:-EDGE_PX, EDGE_PX:-EDGE_PX]
    value = _root(inner) + 0.1 * _root(apart)
    if tones:
        value = value + tones * _root(F.avg_pool2d(inner, 8, 4), _LEAST / 16)
    return value


def _root(apart: Tensor, least: float = _LEAST) -> Tensor:
    return (apart.square().mean((1, 2, 3)) + least).sqrt().mean()


def adain(image: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) with the reference's mean and deviation per channel (unbiased variance + 1e-5)."""
    mean, variance = image.mean((2, 3), keepdim=True), image.var((2, 3), keepdim=True)
    wanted, spread = reference.mean((2, 3), keepdim=True), reference.var((2, 3), keepdim=True)
    return (image - mean) * ((spread + 1e-5) / (variance + 1e-5)).sqrt() + wanted
