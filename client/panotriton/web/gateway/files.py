"""Image files: read to RGB uint8 pixels and written from them, below the roots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput, PanotritonError
from panotriton.pipeline.contract import MIN_SIDE_PX
from panotriton.pipeline.images import decode_image
from panotriton.web.gateway.failures import ForbiddenPath
from panotriton.web.gateway.paths import Roots

__all__ = ["check_name", "read_image", "read_portions", "write_images"]

_WEBP_QUALITY = 95
_FORMATS = (".jpg", ".jpeg", ".png", ".webp")

U8 = NDArray[np.uint8]


# Of one portion, unless a single image has more; they are held in memory with what is made of them.
_PORTION_PIXELS = 1 << 26


def read_image(roots: Roots, path: str, min_side_px: int = MIN_SIDE_PX) -> U8:
    """The pixels (H, W, 3); their number is checked before they are decoded."""
    return decode_image(path, roots.read(path), min_side_px)


def read_portions(
    roots: Roots, sources: Sequence[str | InvalidInput], most: int, min_side_px: int
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
        image = _attempt(roots, source, min_side_px)
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


def _attempt(roots: Roots, source: str | InvalidInput, min_side_px: int) -> U8 | InvalidInput:
    if isinstance(source, InvalidInput):
        return source
    try:
        return read_image(roots, source, min_side_px)
    except ForbiddenPath:
        raise
    except InvalidInput as error:
        return error


def check_name(path: Path) -> None:
    """Raise InvalidInput unless the file's name tells a format that can be written."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidInput(f"{path} ends in no known format; expected {', '.join(_FORMATS)}")


def write_images(roots: Roots, images: Iterable[tuple[Path, U8]], jpeg_quality: int) -> None:
    """Write (H, W, 3) images to their paths, each in one step, in the format of its name."""

    def write(item: tuple[Path, U8]) -> None:
        path, image = item
        roots.write(path, _encode(path, image, jpeg_quality))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV encodes without the interpreter lock
        list(pool.map(write, images))


def _encode(path: Path, image: U8, jpeg_quality: int) -> bytes:
    options = (cv2.IMWRITE_JPEG_QUALITY, jpeg_quality, cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(path.suffix.lower(), bgr, options)
    if not ok:
        raise PanotritonError(f"cannot encode {path}")
    return data.tobytes()
