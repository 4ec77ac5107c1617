"""Image files: read to RGB uint8 pixels and written from them, below the roots."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import InvalidInput, PanotritonError, brief
from panotriton.pipeline.images import SUFFIXES, decode_image
from panotriton.web.gateway.failures import ForbiddenPath
from panotriton.web.gateway.paths import Roots

__all__ = ["Decode", "check_name", "read_image", "read_portions", "write_images"]

_WEBP_QUALITY = 95
# What OpenCV does not write, or not as well.
_PILLOW: dict[str, dict[str, Any]] = {
    ".avif": {"format": "AVIF", "quality": _WEBP_QUALITY},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    ".tiff": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
}

U8 = NDArray[np.uint8]
Decode = Callable[[str, bytes], U8]


# Of one portion, unless a single image has more; they are held in memory with what is made of them.
_PORTION_PIXELS = 1 << 26


def read_image(roots: Roots, path: str, decode: Decode = decode_image) -> U8:
    """The pixels (H, W, 3); their number is checked before they are decoded."""
    return decode(path, roots.read(path))


def read_portions(
    roots: Roots, sources: Sequence[str | InvalidInput], most: int, decode: Decode
) -> Iterator[list[U8 | InvalidInput]]:
    """Each file's pixels or what is wrong with it, in order; up to `most` at once, as memory allows.

    sources: paths, or what is known to be wrong. A path outside the roots fails them all, before the first.
    """
    for source in sources:
        if isinstance(source, str):
            _check_allowed(roots, source)
    portion: list[U8 | InvalidInput] = []
    pixels = 0
    for source in sources:
        image = _attempt(roots, source, decode)
        size = 0 if isinstance(image, InvalidInput) else image.shape[0] * image.shape[1]
        if portion and (len(portion) == most or pixels + size > _PORTION_PIXELS):
            yield portion
            portion, pixels = [], 0
        portion.append(image)
        pixels += size
    if portion:
        yield portion


def _check_allowed(roots: Roots, path: str) -> None:
    try:
        roots.check(path)
    except ForbiddenPath:
        raise
    except InvalidInput:
        pass  # what is no path at all fails alone


def _attempt(roots: Roots, source: str | InvalidInput, decode: Decode) -> U8 | InvalidInput:
    if isinstance(source, InvalidInput):
        return source
    try:
        return read_image(roots, source, decode)
    except ForbiddenPath:
        raise
    except InvalidInput as error:
        return error


def check_name(path: Path) -> None:
    """Raise InvalidInput unless the file's name tells a format that can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{brief(path)} ends in no known format; expected {', '.join(SUFFIXES)}")


def write_images(roots: Roots, images: Iterable[tuple[Path, U8]], jpeg_quality: int) -> None:
    """Write (H, W, 3) images to their paths, each in one step, in the format of its name."""

    def write(item: tuple[Path, U8]) -> None:
        path, image = item
        roots.write(path, _encode(path, image, jpeg_quality))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV encodes without the interpreter lock
        list(pool.map(write, images))


def _encode(path: Path, image: U8, jpeg_quality: int) -> bytes:
    suffix = path.suffix.lower()
    if suffix in _PILLOW:
        memory = io.BytesIO()
        PILImage.fromarray(image).save(memory, **_PILLOW[suffix])
        return memory.getvalue()
    options = (cv2.IMWRITE_JPEG_QUALITY, jpeg_quality, cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(path.suffix.lower(), bgr, options)
    if not ok:
        raise PanotritonError(f"cannot encode {path}")
    return data.tobytes()
