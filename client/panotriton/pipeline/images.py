"""What counts as an image, how large it may be, and how an encoded one becomes pixels.

An image is RGB uint8, (H, W, 3). Sizes are checked before memory is taken for the pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from panotriton.errors import InvalidImage
from panotriton.pipeline.contract import MAX_PIXELS, MIN_SIDE_PX

__all__ = [
    "check_encoded",
    "check_images",
    "check_panorama",
    "decode_image",
]

_FORMATS = ("JPEG", "PNG", "WEBP")


def check_panorama(name: str, image: NDArray[Any], min_side_px: int = MIN_SIDE_PX) -> None:
    """Raise InvalidImage unless `image` is (H, W, 3) uint8 RGB with sides ≥ 64 px and ≤ 134 MP."""
    _check_layout(name, image, ndim=3)
    _check_size(name, image.shape[1], image.shape[0], min_side_px)


def check_images(name: str, images: NDArray[Any], min_side_px: int = 1) -> None:
    """Raise InvalidImage unless `images` is (N, H, W, 3) uint8 RGB; N may be 0."""
    _check_layout(name, images, ndim=4)
    _check_size(name, images.shape[2], images.shape[1], min_side_px)


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


def _check_size(name: str, width: int, height: int, min_side_px: int) -> None:
    if min(width, height) < min_side_px:
        raise InvalidImage(
            f"{name} is {width}×{height} px; expected at least {min_side_px} px a side: enlarge it first"
        )
    if width * height > MAX_PIXELS:
        raise InvalidImage(
            f"{name} is {width}×{height} px, {width * height / 1e6:.0f} megapixels; "
            f"expected at most {MAX_PIXELS / 1e6:.0f}: downsize it first"
        )


def decode_image(name: str, data: bytes, min_side_px: int = MIN_SIDE_PX) -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP bytes to (H, W, 3) uint8 RGB; transparency is dropped.

    Raises InvalidImage for other formats, truncated data, 16-bit pixels and over-large sizes,
    the last before anything is decoded.
    """
    with _opened(name, data, min_side_px) as image:
        return np.asarray(image.convert("RGB"))


def check_encoded(name: str, data: bytes, min_side_px: int = MIN_SIDE_PX) -> None:
    """Raise InvalidImage for what the header of the bytes already tells: no image, or a wrong size."""
    with _opened(name, data, min_side_px):
        pass


@contextlib.contextmanager
def _opened(name: str, data: bytes, min_side_px: int) -> Iterator[PILImage.Image]:
    try:
        # Our own limit below answers for size; Pillow's would only warn.
        with PILImage.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(name, *image.size, min_side_px)
            if image.mode.startswith(("I", "F")):
                raise InvalidImage(f"{name} has {image.mode} pixels; expected 8 bits per channel")
            yield image
    except InvalidImage:
        raise
    except PILImage.DecompressionBombError as error:
        raise InvalidImage(
            f"{name} is too large ({error}); expected at most {MAX_PIXELS / 1e6:.0f} megapixels: "
            "downsize it first"
        ) from error
    except UnidentifiedImageError as error:
        raise InvalidImage(
            f"{name} holds {len(data)} bytes that are no image; expected the whole content of a "
            "JPEG, PNG or WebP file"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidImage(
            f"{name} is a broken image ({error}); expected a whole JPEG, PNG or WebP file: send it again"
        ) from error
