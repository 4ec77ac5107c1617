"""Image files: read to RGB uint8 pixels and written from them, below the roots."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import InvalidInput, PanotritonError, brief
from panotriton.groups.folder import JPEG_QUALITY
from panotriton.pipeline.contract import MAX_SR_PIXELS
from panotriton.pipeline.images import SUFFIXES, decode_image
from panotriton.web.gateway.failures import ForbiddenPath
from panotriton.web.gateway.paths import Roots

__all__ = ["check_name", "read_image", "read_images", "write_images"]

# What OpenCV writes, faster, and how; Pillow the rest of `SUFFIXES`.
_OPTIONS = {
    ".jpg": (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY),
    ".jpeg": (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY),
    ".png": (),
    ".webp": (cv2.IMWRITE_WEBP_QUALITY, JPEG_QUALITY),
}
_PILLOW: dict[str, dict[str, Any]] = {
    ".avif": {"format": "AVIF", "quality": JPEG_QUALITY},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    ".tiff": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
}

U8 = NDArray[np.uint8]


def read_image(roots: Roots, path: str, max_aspect: float = math.inf) -> U8:
    """The pixels (H, W, 3); their number is checked before they are decoded."""
    return decode_image(path, roots.read(path), max_aspect=max_aspect)


def read_images(
    roots: Roots, paths: Sequence[str], max_aspect: float = math.inf
) -> list[U8 | InvalidInput]:
    """Each file's pixels or what is wrong with it. A path outside the roots fails them all."""
    for path in paths:
        roots.check(path)
    images: list[U8 | InvalidInput] = []
    pixels = 0
    for path in paths:
        image = _attempt(roots, path, max_aspect)
        pixels += 0 if isinstance(image, InvalidInput) else image.shape[0] * image.shape[1]
        if pixels > MAX_SR_PIXELS:
            raise InvalidInput(
                f"the files up to {brief(path)} have {pixels / 1e6:.0f} megapixels; expected at most "
                f"{MAX_SR_PIXELS / 1e6:.0f} a request: send fewer at once"
            )
        images.append(image)
    return images


def _attempt(roots: Roots, path: str, max_aspect: float) -> U8 | InvalidInput:
    try:
        return read_image(roots, path, max_aspect)
    except ForbiddenPath:
        raise
    except InvalidInput as error:
        return error


def check_name(path: Path) -> None:
    """Raise InvalidInput unless the file's name tells a format that can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{brief(path)} ends in no known format; expected {', '.join(SUFFIXES)}")


def write_images(roots: Roots, images: Iterable[tuple[Path, U8]]) -> None:
    """Write (H, W, 3) images to their paths, each in one step, in the format of its name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV encodes without the interpreter lock
        list(pool.map(lambda item: roots.write(item[0], _encode(*item)), images))


def _encode(path: Path, image: U8) -> bytes:
    suffix = path.suffix.lower()
    if suffix in _PILLOW:
        memory = io.BytesIO()
        PILImage.fromarray(image).save(memory, **_PILLOW[suffix])
        return memory.getvalue()
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(suffix, bgr, _OPTIONS[suffix])
    if not ok:
        raise PanotritonError(f"cannot encode {path}")
    return data.tobytes()
