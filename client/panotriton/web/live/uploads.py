"""Two panoramas in one request body: the first file's bytes, then the second's.

No multipart: nothing has to be parsed, named or kept on disk, and the size is known at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request

from panotriton.errors import InvalidInput
from panotriton.pipeline.camera import Sphere
from panotriton.pipeline.images import check_encoded, decode_image

__all__ = ["TYPE", "declared_bytes", "discard", "read_files", "sphere"]

# Browsers send this to other sites than a page's own only after asking, and are never allowed to.
TYPE = "application/octet-stream"


async def read_files(request: Request, first_bytes: int, length: int) -> tuple[bytes, bytes]:
    """The two files of a body of `length` bytes, their headers checked.

    Raises InvalidInput where first_bytes lies outside it or less comes than was declared, and
    InvalidImage for a file that is no image or has a wrong size.
    """
    if not 0 < first_bytes < length:
        raise InvalidInput(
            f"first_bytes is {first_bytes} of {length}; expected the length of the first of two files"
        )
    body = await _read(request.stream(), length)
    files = bytes(body[:first_bytes]), bytes(body[first_bytes:])
    for number, data in enumerate(files, start=1):
        check_encoded(f"panorama {number}", data)
    return files


def declared_bytes(request: Request, max_bytes: int) -> int:
    """The length of a body that is not read yet, which the HTTP server holds it to.

    Raises HTTPException: 411 where it is not declared, 413 over max_bytes, 415 for another type.
    """
    if request.headers.get("content-type") != TYPE:
        raise HTTPException(415, f"the body is of another type; expected {TYPE}")
    declared = request.headers.get("content-length", "")
    if not declared.isdecimal():
        raise HTTPException(411, "the body's length is not declared; expected Content-Length")
    if int(declared) > max_bytes:
        raise HTTPException(
            413,
            f"the two files have {int(declared) / 1e6:.1f} MB; expected at most {max_bytes / 1e6:.1f}: "
            "choose smaller files, or start the page with a larger --max-upload-mb",
        )
    return int(declared)


async def discard(request: Request) -> None:
    """Read a body to its end: a browser that is still sending does not see an answer."""
    async for _ in request.stream():
        pass


async def _read(chunks: AsyncIterator[bytes], length: int) -> memoryview:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
    if len(body) != length:
        raise InvalidInput(f"the body has {len(body)} bytes; expected the {length} declared")
    return memoryview(body)


def sphere(number: int, data: bytes, crop_size: int) -> NDArray[np.uint8]:
    """A panorama as (S, S, 3): all that the pipeline sees of it, which resizes it so before cropping.

    Raises InvalidImage for what only decoding finds out.
    """
    return Sphere(decode_image(f"panorama {number}", data), crop_size).image
