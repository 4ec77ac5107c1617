"""What counts as an image, (H, W, 3) RGB uint8, and how large it may be.

Apart from `images`, since most of the server's processes need no codec.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidImage
from panotriton.pipeline.contract import MAX_PIXELS, MIN_SIDE_PX

__all__ = ["check_images", "check_panorama", "check_size"]


def check_panorama(
    name: str,
    image: NDArray[Any],
    min_side_px: int = MIN_SIDE_PX,
    max_aspect: float = math.inf,
) -> None:
    """Raise InvalidImage unless `image` is (H, W, 3) uint8 RGB with sides ≥ 64 px and ≤ 134 MP.

    max_aspect: the longer side through the shorter one.
    """
    _check_layout(name, image, ndim=3)
    check_size(name, image.shape[1], image.shape[0], min_side_px, max_aspect)


def check_images(
    name: str, images: NDArray[Any], min_side_px: int = 1, max_aspect: float = math.inf
) -> None:
    """Raise InvalidImage unless `images` is (N, H, W, 3) uint8 RGB; N may be 0."""
    _check_layout(name, images, ndim=4)
    check_size(name, images.shape[2], images.shape[1], min_side_px, max_aspect)


def _check_layout(name: str, image: NDArray[Any], ndim: int) -> None:
    layout = "(H, W, 3)" if ndim == 3 else "(N, H, W, 3)"
    if image.dtype != np.uint8:
        raise InvalidImage(
            f"{name} is {image.dtype}; expected uint8 RGB {layout} in 0…255: scale and convert it first"
        )
    if image.ndim != ndim:
        raise InvalidImage(
            f"{name} has shape {image.shape}; expected {layout}: add or drop an axis"
        )
    if image.shape[-1] != 3:
        raise InvalidImage(
            f"{name} has {image.shape[-1]} channels in shape {image.shape}; expected 3, RGB, last: "
            "drop alpha with image[..., :3] or repeat a grey channel"
        )


def check_size(name: str, width: int, height: int, min_side_px: int, max_aspect: float) -> None:
    """Raise InvalidImage for an image of fewer px a side, longer, or of more than 134 MP."""
    if min(width, height) < min_side_px:
        raise InvalidImage(
            f"{name} is {width}×{height} px; expected at least {min_side_px} px a side: enlarge it first"
        )
    if width * height > MAX_PIXELS:
        raise InvalidImage(
            f"{name} is {width}×{height} px, {width * height / 1e6:.0f} megapixels; "
            f"expected at most {MAX_PIXELS / 1e6:.0f}: downsize it first"
        )
    if max(width, height) > max_aspect * min(width, height):
        raise InvalidImage(
            f"{name} is {width}×{height} px; expected one side at most {max_aspect:g} times the other: "
            "cut it first"
        )
