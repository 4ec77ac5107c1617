"""What training makes small."""

from __future__ import annotations

from torch import Tensor

__all__ = ["adain", "loss"]

EDGE_PX = 8
_LEAST = 3e-5  # half a grey level, squared


def loss(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the crops of the root of the mean squared error: between its square, which the hardest
    degradations have nearly to themselves, and its logarithm, PSNR, where they hardly count. A tenth goes to
    the whole crop, the rest leaves `EDGE_PX` out: convolutions pad with zeros, which is felt there, and a
    training crop is nearly all edge where a photograph isn't.
    """
    error = (output - wanted).square()
    inner = error[..., EDGE_PX:-EDGE_PX, EDGE_PX:-EDGE_PX].mean((1, 2, 3))
    return ((inner + _LEAST).sqrt() + 0.1 * (error.mean((1, 2, 3)) + _LEAST).sqrt()).mean()


def adain(image: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) with the reference's mean and deviation per channel (unbiased variance + 1e-5)."""
    mean, variance = image.mean((2, 3), keepdim=True), image.var((2, 3), keepdim=True)
    wanted, spread = reference.mean((2, 3), keepdim=True), reference.var((2, 3), keepdim=True)
    return (image - mean) * ((spread + 1e-5) / (variance + 1e-5)).sqrt() + wanted
