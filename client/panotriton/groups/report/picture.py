"""Pictures as data URIs that keep within a given number of bytes.

Images are RGB uint8, (H, W, 3).
"""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import InvalidImage
from panotriton.pipeline.images import decode_image

__all__ = ["bicubic", "data_uri", "most_different", "read_picture", "within"]

_QUALITIES = (82, 70, 55, 40)
_PREFIX = "data:image/webp;base64,"

U8 = NDArray[np.uint8]


def read_picture(path: Path) -> U8:
    """Decode an image file. Raises InvalidImage where it is missing or broken."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidImage(
            f"{path} cannot be read ({error.strerror}); expected an image of the group: run it again"
        ) from error
    return decode_image(str(path), data)


def data_uri(image: U8, max_bytes: int) -> str:
    """WebP as a data URI of at most `max_bytes` characters.

    The best of four qualities that fits; where none does, the image is halved until one fits.
    """
    for quality in _QUALITIES:
        uri = _PREFIX + base64.b64encode(_webp(image, quality)).decode()
        if len(uri) <= max_bytes:
            return uri
    height, width = image.shape[:2]
    if max(height, width) <= 1:
        raise ValueError(f"max_bytes is {max_bytes}; expected room for one pixel, about 100")
    return data_uri(_resized(image, max(width // 2, 1), max(height // 2, 1)), max_bytes)


def _webp(image: U8, quality: int) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, quality])
    if not ok:
        raise InvalidImage(f"OpenCV cannot encode a {image.shape} image as WebP; expected it could")
    return data.tobytes()


def within(image: U8, max_width_px: int) -> U8:
    """The image, downscaled (INTER_AREA) where it is wider than `max_width_px`."""
    height, width = image.shape[:2]
    if width <= max_width_px:
        return image
    return _resized(image, max_width_px, max(round(height * max_width_px / width), 1))


def _resized(image: U8, width: int, height: int) -> U8:
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def bicubic(image: U8, width: int, height: int) -> U8:
    """Enlarge as the usual baseline does: Pillow's bicubic (a = -0.5)."""
    resized = PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BICUBIC)
    return np.asarray(resized)


def most_different(a: U8, b: U8, side_px: int) -> tuple[slice, slice]:
    """The square window (rows, columns) in which two images of one size differ most, on average.

    Its side is `side_px` or the image's shorter side where that is less.
    """
    side = min(side_px, *a.shape[:2])
    difference = cv2.absdiff(a, b).mean(axis=2, dtype=np.float32)
    sums = cv2.integral(difference)
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(int(np.argmax(windows)), windows.shape)
    return slice(int(y), int(y) + side), slice(int(x), int(x) + side)
