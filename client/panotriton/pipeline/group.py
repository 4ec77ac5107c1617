"""The stages of a group that are geometry and arithmetic: pairs, the filter and in-between views.

Camera arrays are float64 with a last axis of 5 in the order of `camera.CAMERA_FIELDS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput, quoted
from panotriton.pipeline.camera import CAMERA_FIELDS, Camera, Sphere, lerp_arrays
from panotriton.pipeline.checks import check_panorama
from panotriton.pipeline.contract import (
    CROP_SIZES,
    DEFAULTS,
    INTERVALS,
    MAX_SR_PIXELS,
    TENSORS,
    Options,
)

__all__ = [
    "check_cameras",
    "crop_between",
    "crop_pairs",
    "interpolate_cameras",
    "interpolate_views",
    "make_pairs",
    "make_spheres",
]

CAMERAS_SHAPE = (2, INTERVALS, 2, len(CAMERA_FIELDS))
_THREADS = os.cpu_count() or 1

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]


def check_cameras(name: str, cameras: F64) -> None:
    """Raise InvalidInput unless `cameras` is (2, 8, 2, 5) with every field inside its limits."""
    if cameras.shape != CAMERAS_SHAPE:
        raise InvalidInput(
            f"{name} has shape {cameras.shape}; expected {CAMERAS_SHAPE}: panorama, interval, "
            f"left|right, ({', '.join(CAMERA_FIELDS)})"
        )
    for index in np.ndindex(*CAMERAS_SHAPE[:3]):
        try:
            Camera.from_array(cameras[index])
        except ValueError as error:
            raise InvalidInput(f"{name}{list(index)}: {error}") from error


def make_pairs(
    panoramas: Sequence[U8], cameras: F64, crop_size: int = DEFAULTS.crop_size
) -> tuple[U8, U8]:
    """Crop every pair image of a group.

    panoramas: two (H, W, 3) uint8; cameras: (2, 8, 2, 5).
    Returns the pairs, see `crop_pairs`, and the spheres (2, S, S, 3), the resized panoramas that
    `interpolate_views` samples again.
    """
    spheres = make_spheres(panoramas, Options(crop_size=crop_size))
    return crop_pairs(spheres, cameras), np.stack([sphere.image for sphere in spheres])


def make_spheres(
    panoramas: Sequence[U8], options: Options, names: Sequence[str] = ("PANORAMA_1", "PANORAMA_2")
) -> list[Sphere]:
    """Two panoramas (H, W, 3) uint8, each its own size, as crops of `crop_size` are cut from them.

    A sphere's own image makes the same sphere again. names: what the caller calls them.
    """
    for name, panorama in zip(names, panoramas, strict=True):
        check_panorama(name, panorama)
    options.check(TENSORS)
    return [Sphere(panorama, options.crop_size, options.sphere_size) for panorama in panoramas]


def crop_pairs(spheres: Sequence[Sphere], cameras: F64) -> U8:
    """Pair images (16, S, 2S, 3), left crop | right crop, panorama 1's eight intervals first."""
    size = spheres[0].size
    pairs = np.empty((2 * INTERVALS, size, 2 * size, 3), np.uint8)
    for p, sphere in enumerate(spheres):
        halves = pairs[p * INTERVALS : (p + 1) * INTERVALS].reshape(INTERVALS, size, 2, -1, 3)
        views = [halves[k, :, side] for k in range(INTERVALS) for side in range(2)]
        sphere.crops(_cameras(cameras[p]), views, threads=_THREADS)
    return pairs


def interpolate_cameras(
    cameras: F64, kept: NDArray[np.int32], interpolations: int = DEFAULTS.interpolations
) -> F64:
    """The in-between cameras, (K, 2, N, 5): kept interval, panorama, weight i/(N+1) for i = 1…N."""
    Options(interpolations=interpolations).check(TENSORS)
    if len(kept) > INTERVALS or not {*kept.tolist()} <= {*range(1, INTERVALS + 1)}:
        raise InvalidInput(
            f"KEPT is {quoted(kept[: INTERVALS + 1].tolist())}; expected up to {INTERVALS} interval ids from "
            f"1 to {INTERVALS}"
        )
    ends = cameras[:, kept - 1].transpose(1, 0, 2, 3)[:, :, :, None]  # (K, 2, left|right, 1, 5)
    w = (np.arange(1, interpolations + 1) / (interpolations + 1))[:, None]  # (N, 1)
    return lerp_arrays(ends[:, :, 0], ends[:, :, 1], w)


def interpolate_views(spheres: U8, between: F64) -> U8:
    """Crop the in-between views: spheres (2, S, S, 3), cameras (K, 2, N, 5) → (K·2·N, S, S, 3)."""
    if spheres.ndim != 4 or spheres.shape[0] != 2 or spheres.shape[1] != spheres.shape[2]:
        raise InvalidInput(f"SPHERES has shape {spheres.shape}; expected (2, S, S, 3)")
    size = spheres.shape[1]
    if not CROP_SIZES[0] <= size <= CROP_SIZES[1]:
        raise InvalidInput(
            f"SPHERES has sides of {size} px; expected {CROP_SIZES[0]} to {CROP_SIZES[1]}"
        )
    return crop_between([Sphere(sphere, size) for sphere in spheres], between)


def crop_between(spheres: Sequence[Sphere], between: F64) -> U8:
    """Views (K·2·N, S, S, 3) of two spheres from cameras (K, 2, N, 5), see `interpolate_cameras`."""
    kept, _, count, _ = between.shape
    size = spheres[0].size
    if kept * 2 * count * size * size > MAX_SR_PIXELS:
        raise InvalidInput(
            f"{kept * 2 * count} views of {size} px were asked for; expected at most "
            f"{MAX_SR_PIXELS / 1e6:.0f} megapixels: lower NUM_INTERPOLATIONS or CROP_SIZE"
        )
    views = np.empty((kept, 2, count, size, size, 3), np.uint8)
    for p, sphere in enumerate(spheres):
        flat = [view for interval in views[:, p] for view in interval]
        sphere.crops(_cameras(between[:, p]), flat, threads=_THREADS)
    return views.reshape(kept * 2 * count, size, size, 3)


def _cameras(rows: F64) -> list[Camera]:
    return [Camera.from_array(row) for row in rows.reshape(-1, len(CAMERA_FIELDS))]
