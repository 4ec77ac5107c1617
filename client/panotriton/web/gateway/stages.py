"""The stages as functions over tensors, each one request to one model of the server.

The only module of the gateway that knows the models' names. Images are RGB uint8, cameras float64
with a last axis of 5 in the order of `camera.CAMERA_FIELDS`. Image outputs are asked for with the most
bytes that they can have, so that a `Connection` over shared memory can make room for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.pipeline.camera import Sphere
from panotriton.pipeline.contract import DEFAULTS, INTERVALS, MIN_SIDE_PX
from panotriton.pipeline.quality import Quality
from panotriton.web.gateway.connections import Connection

__all__ = [
    "Description",
    "Score",
    "describe",
    "interpolate",
    "preprocess",
    "score",
    "super_resolve",
]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """A pair's scores, NaN where the reply has none, and the reply itself."""

    quality: Quality
    raw_output: str


@dataclass(frozen=True, slots=True)
class Description:
    """Two or three sentences, or why there are none."""

    text: str
    error: str


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


def super_resolve(
    client: Connection,
    images: U8,
    *,
    align: str = DEFAULTS.align,
    upscale: int = DEFAULTS.upscale,
    prompt: str = "",
) -> U8:
    """Images (N, h, w, 3) → (N, H, W, 3), `upscale` times as large to a multiple of 8."""
    inputs: dict[str, NDArray[Any]] = {
        "IMAGES": images,
        "ALIGN": np.array([align.encode()], np.object_),
        "UPSCALE": np.array([upscale], np.int32),
        "PROMPT": np.array([prompt.encode()], np.object_),
    }
    most = {"IMAGES_SR": images.nbytes * upscale * upscale}
    sharp: U8 = client.infer("osediff", inputs, most)["IMAGES_SR"]
    return sharp


def score(client: Connection, images: U8) -> list[Score]:
    """Scores of pair images (N, H, 2H, 3)."""
    got = client.infer("qwen_scorer", {"IMAGES": images}, ("SCORE", "SUB_SCORES", "RAW_OUTPUT"))
    rows = np.concatenate([got["SUB_SCORES"], got["SCORE"][:, None]], axis=1)  # (N, 6)
    return [
        Score(Quality(*(round(float(value), 6) for value in row)), reply.decode())
        for row, reply in zip(rows, got["RAW_OUTPUT"], strict=True)
    ]


def describe(client: Connection, images: U8) -> list[Description]:
    """Descriptions of images (N, H, W, 3)."""
    outputs = ("DESCRIPTION", "DESCRIPTION_ERROR")
    got = client.infer("qwen_describer", {"IMAGES": images}, outputs)
    pairs = zip(*(got[name] for name in outputs), strict=True)
    return [Description(text.decode(), error.decode()) for text, error in pairs]


def _spheres(panoramas: Sequence[U8], crop_size: int) -> list[U8]:
    # The models begin by resizing to this size; done here, kilobytes cross the hop instead of the
    # whole panorama, and the result is the same to the bit.
    return [Sphere(panorama, crop_size).image for panorama in panoramas]
