"""What the endpoints ask of the Triton server: the client's plans, and two models that it has no method for.

Images are RGB uint8, cameras float64 with a last axis of 5 in the order of `camera.CAMERA_FIELDS`. Image
outputs are asked for with the most bytes that they can have, so that a `Connection` over shared memory
can make room for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from panotriton.client.calls import Call, Failure, Plan
from panotriton.client.pixels import Images
from panotriton.pipeline.camera import Sphere
from panotriton.pipeline.contract import INTERVALS, MIN_SIDE_PX
from panotriton.pipeline.results import Timings
from panotriton.web.gateway.connections import Connection

__all__ = ["each", "interpolate", "preprocess", "tensors", "together"]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]
T = TypeVar("T")
_UNTIMED = Timings(math.nan)  # replies hold no times


def preprocess(client: Connection, panoramas: Sequence[U8], cameras: F64, crop_size: int) -> U8:
    """Pair images of one or two panoramas: cameras (P, 8, 2, 5) → (P·8, S, 2S, 3), left | right."""
    count = len(panoramas)
    spheres = _spheres(panoramas, crop_size)
    # The model takes two; beside a lone one the smallest possible, whose pairs are dropped.
    filler = np.zeros((MIN_SIDE_PX, MIN_SIDE_PX, 3), np.uint8)
    inputs = {
        "PANORAMA_1": spheres[0],
        "PANORAMA_2": spheres[1] if count == 2 else filler,
        "GIVEN_CAMERAS": np.concatenate([cameras] * (2 // count)),  # (2, 8, 2, 5)
        "CROP_SIZE": np.array([crop_size], np.int32),
    }
    most = {"PAIRS": 2 * INTERVALS * 2 * crop_size * crop_size * 3}
    pairs: U8 = client.infer("preprocess", inputs, most)["PAIRS"]
    return pairs[: count * INTERVALS]


def interpolate(
    client: Connection, panoramas: Sequence[U8], ends: F64, count: int, crop_size: int
) -> tuple[U8, F64]:
    """In-between views of K ≤ 8 left and right cameras of each of one or two panoramas.

    ends: (P, K, left|right, 5). Returns views (K, P, N, S, S, 3) and their cameras (K, P, N, 5).
    """
    panorama_count, kept = ends.shape[:2]
    cameras = np.empty((2, INTERVALS, 2, 5))
    cameras[:] = ends[0, 0]  # slots that no one asked for need valid cameras too
    cameras[:panorama_count, :kept] = ends
    spheres = _spheres(panoramas, crop_size)
    inputs: dict[str, NDArray[Any]] = {
        "SPHERES": np.stack([spheres[0], spheres[-1]]),  # the model takes two: a lone one twice
        "CAMERAS": cameras,
        "KEPT": np.arange(1, kept + 1, dtype=np.int32),
        "NUM_INTERPOLATIONS": np.array([count], np.int32),
    }
    most = {"INTERPOLATED": kept * 2 * count * crop_size * crop_size * 3, "INTERPOLATED_CAMERAS": 0}
    got = client.infer("interpolate", inputs, most)
    views = got["INTERPOLATED"].reshape(kept, 2, count, crop_size, crop_size, 3)
    return views[:, :panorama_count], got["INTERPOLATED_CAMERAS"][:, :panorama_count]


def each(
    client: Connection, images: Sequence[U8 | Failure], plan: Callable[[list[U8]], Plan[T]]
) -> list[T | Failure]:
    """What a plan makes of each image, see `Plan.outcomes`; a failure among them is passed on."""
    good = [image for image in images if not isinstance(image, Failure)]
    outcomes = iter(plan(good).outcomes(partial(_send, client)))
    return [image if isinstance(image, Failure) else next(outcomes) for image in images]


def together(client: Connection, plan: Plan[T]) -> list[T]:
    """What a plan of one request makes of its images."""
    (call,) = plan.calls
    return _send(client, call)


def tensors(client: Connection, plan: Plan[Any]) -> dict[str, NDArray[Any]]:
    """The same as the tensors that the server sent, for a reply that is a tensor, too."""
    (call,) = plan.calls
    return _tensors(client, call)


def _send(client: Connection, call: Call[T]) -> T:
    return call.decode(_tensors(client, call), _UNTIMED)


def _tensors(client: Connection, call: Call[Any]) -> dict[str, NDArray[Any]]:
    inputs = {
        name: value.joined() if isinstance(value, Images) else value
        for name, value in call.inputs.items()
    }
    return client.infer(call.model, inputs, call.outputs)


def _spheres(panoramas: Sequence[U8], crop_size: int) -> list[U8]:
    # The models begin by resizing to this size; done here, kilobytes cross the hop instead of the
    # whole panorama, and the result is the same to the bit.
    return [Sphere(panorama, crop_size).image for panorama in panoramas]
