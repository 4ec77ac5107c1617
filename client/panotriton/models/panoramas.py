"""What a request says of panoramas and cameras: pixels or a file's bytes, cameras or a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput
from panotriton.models.requests import optional
from panotriton.pipeline.camera import sample_cameras
from panotriton.pipeline.checks import check_panorama
from panotriton.pipeline.contract import check_seed
from panotriton.pipeline.group import check_cameras
from panotriton.pipeline.images import decode_image

__all__ = ["read_cameras", "read_panorama"]


def read_cameras(request: Any) -> NDArray[np.float64]:
    """The cameras (2, 8, 2, 5) that the caller gave or, from a seed, drew."""
    given = optional(request, "GIVEN_CAMERAS")
    seed = optional(request, "SEED")
    _exactly_one("SEED", seed, "GIVEN_CAMERAS", given)
    if given is not None:
        check_cameras("GIVEN_CAMERAS", given)
        return given
    value = np.asarray(seed).item()
    check_seed("SEED", value)
    return sample_cameras(value)


def read_panorama(request: Any, suffix: str = "") -> NDArray[np.uint8]:
    """The panorama (H, W, 3) that the caller sent: pixels as PANORAMA, or a file's bytes as ENCODED.

    suffix: of both names. Raises InvalidInput where both or neither came, InvalidImage for a bad one.
    """
    names = f"PANORAMA{suffix}", f"ENCODED{suffix}"
    pixels, encoded = (optional(request, name) for name in names)
    _exactly_one(names[0], pixels, names[1], encoded)
    if encoded is not None:
        return decode_image(names[1], encoded.item())
    image = np.asarray(pixels)
    check_panorama(names[0], image)
    return image


def _exactly_one(name: str, value: Any, other: str, other_value: Any) -> None:
    """Raise InvalidInput unless one of two optional tensors was sent, and one alone."""
    if (value is None) == (other_value is None):
        both = "neither is" if value is None else "both are"
        raise InvalidInput(f"{name} or {other}: {both} given; send exactly one of them")
