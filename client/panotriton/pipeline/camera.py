"""Unified spherical cameras: sampling, interpolation and crops of equirectangular panoramas.

The projection is the unified camera model of Mei and Rives, "Single View Point Omnidirectional
Camera Calibration from Planar Grids", ICRA 2007: `xi` = 0 is a pinhole, `xi` = 1 is
stereographic. Angles are degrees throughout. Images are RGB uint8, (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.pipeline.contract import DEFAULTS, INTERVALS
from panotriton.pipeline.mipmap import Mipmap

__all__ = [
    "CAMERA_FIELDS",
    "LIMITS",
    "Camera",
    "Maps",
    "Sphere",
    "crop",
    "interval_bounds",
    "lerp",
    "lerp_arrays",
    "rotation",
    "sample_cameras",
]

CAMERA_FIELDS = ("yaw", "pitch", "roll", "vfov", "xi")
LIMITS = {
    "yaw": (-180.0, 180.0),
    "pitch": (-90.0, 90.0),
    "roll": (-90.0, 90.0),
    "vfov": (30.0, 140.0),
    "xi": (0.0, 1.0),
}
_INTERVAL_WIDTH = 360.0 / INTERVALS

# How far panorama 1's left camera may stray from the right camera, and panorama 2's left camera
# from panorama 1's. Fields that are not named keep the yaw or are drawn afresh (see sample_cameras).
_LEFT_1_JITTER = {"pitch": 40.0, "vfov": 40.0}
_LEFT_2_JITTER = {"pitch": 20.0, "roll": 20.0, "vfov": 20.0, "xi": 0.2}

Image = NDArray[np.uint8]
Plane = NDArray[np.float32]
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Camera:
    """One view of a panorama.

    yaw, pitch and roll are in degrees, vfov is the vertical field of view in degrees, xi the
    dimensionless sphere offset. Raises ValueError for a field that is not finite or is outside
    `LIMITS`: nothing is clipped silently.
    """

    yaw: float
    pitch: float
    roll: float
    vfov: float
    xi: float

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also false for NaN
                raise ValueError(
                    f"camera field {name} is {value}; expected a finite number from {low:g} to {high:g}"
                )

    @classmethod
    def from_array(cls, row: Sequence[float] | NDArray[np.float64]) -> Camera:
        """Read one (5,) row in the order of `CAMERA_FIELDS`."""
        return cls(*(float(value) for value in row))

    def to_array(self) -> NDArray[np.float64]:
        """Return the (5,) row in the order of `CAMERA_FIELDS`."""
        return np.array(astuple(self), dtype=np.float64)


def interval_bounds(interval: int) -> tuple[float, float]:
    """Yaw bounds in degrees of interval 1…8: 1 is (-180, -135), 8 is (135, 180)."""
    if not 1 <= interval <= INTERVALS:
        raise ValueError(f"interval is {interval}; expected 1 to {INTERVALS}")
    low = -180.0 + (interval - 1) * _INTERVAL_WIDTH
    return low, low + _INTERVAL_WIDTH


def sample_cameras(seed: int) -> NDArray[np.float64]:
    """Draw a group's cameras, shape (2, 8, 2, 5): panorama, interval, left|right, `CAMERA_FIELDS`.

    The right camera of an interval is the same for both panoramas. The same seed gives the same
    bits everywhere: one numpy PCG64 generator, always drawn in the same order, no other state.
    """
    rng = np.random.default_rng(seed)
    cameras = np.empty((2, INTERVALS, 2, len(CAMERA_FIELDS)))
    for k in range(INTERVALS):
        right = _draw(rng, yaw=rng.uniform(*interval_bounds(k + 1)))
        left_1 = _draw(rng, yaw=right["yaw"]) | _jitter(rng, right, _LEFT_1_JITTER)
        left_2 = left_1 | _jitter(rng, left_1, _LEFT_2_JITTER)
        cameras[0, k] = [_row(left_1), _row(right)]
        cameras[1, k] = [_row(left_2), _row(right)]
    return cameras


def _draw(rng: np.random.Generator, yaw: float) -> dict[str, float]:
    return {"yaw": yaw} | {name: rng.uniform(*LIMITS[name]) for name in CAMERA_FIELDS[1:]}


def _jitter(
    rng: np.random.Generator, around: dict[str, float], spread: dict[str, float]
) -> dict[str, float]:
    moved = {name: around[name] + rng.uniform(-by, by) for name, by in spread.items()}
    return {
        name: min(max(value, LIMITS[name][0]), LIMITS[name][1]) for name, value in moved.items()
    }


def _row(fields: dict[str, float]) -> list[float]:
    return [fields[name] for name in CAMERA_FIELDS]


def lerp(a: Camera, b: Camera, w: float) -> Camera:
    """The camera (1-w)·a + w·b, field by field; w from 0 (a) to 1 (b)."""
    if not 0.0 <= w <= 1.0:
        raise ValueError(f"weight is {w}; expected 0 to 1")
    return Camera.from_array(lerp_arrays(a.to_array(), b.to_array(), w))


def lerp_arrays(a: NDArray[np.float64], b: NDArray[np.float64], w: Any) -> NDArray[np.float64]:
    """(1-w)·a + w·b, kept between a and b: rounding alone must not push a field over its limit."""
    mixed: NDArray[np.float64] = (1.0 - w) * a + w * b
    return mixed.clip(np.minimum(a, b), np.maximum(a, b))


def crop(
    panorama: Image,
    camera: Camera,
    size: int = DEFAULTS.crop_size,
    sphere_size: int | None = DEFAULTS.sphere_size,
) -> Image:
    """Crop a panorama (H, W, 3) uint8 to a size × size view; see `Sphere` for many views of one."""
    return Sphere(panorama, size, sphere_size).crop(camera)


_MOST_PX = 32_000  # a side: OpenCV's remap takes fewer than 32,767, of which a few are its margins


class Sphere:
    """A panorama made ready for any number of size × size crops.

    sphere_size: None, or `size`: the panorama is resized to size × size (INTER_AREA) and sampled
    bilinearly, as the contract has it. Any other: it is resized to sphere_size × sphere_size, or with 0 is
    taken as it is, up to 32,000 px a side, and sampled without aliasing by the local scale of each view, the
    seam and the poles as any other place (`mipmap`). That takes some milliseconds a megapixel, once.
    """

    def __init__(
        self,
        panorama: Image,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
    ) -> None:
        _check_panorama(panorama)
        side = size if sphere_size is None else sphere_size
        if side and panorama.shape[:2] != (side, side):
            panorama = cv2.resize(panorama, (side, side), interpolation=cv2.INTER_AREA)
        elif max(panorama.shape) > _MOST_PX:
            shrink = _MOST_PX / max(panorama.shape)
            panorama = cv2.resize(
                panorama, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA
            )
        self.image: Image = panorama
        self.size = size
        self._mipmap = None if side == size else Mipmap(panorama, _largest_footprint(size))

    def crop(self, camera: Camera) -> Image:
        """Return the (size, size, 3) uint8 view."""
        view = np.empty((self.size, self.size, 3), np.uint8)
        self._sample(camera, Maps(self.size), out=view)
        return view

    def crops(self, cameras: Sequence[Camera], out: Sequence[Image], threads: int = 1) -> None:
        """Fill out[i] (size, size, 3) uint8 with the view of cameras[i].

        Views of a larger array are written in place. Each thread works in its own five planes of
        size² float32, whatever the number of cameras.
        """
        jobs = list(zip(cameras, out, strict=True))
        if threads <= 1 or len(jobs) < 2:
            self._fill(jobs)
            return
        with ThreadPoolExecutor(threads) as pool:  # numpy and OpenCV release the interpreter lock
            list(pool.map(self._fill, [jobs[i::threads] for i in range(threads)]))

    def _fill(self, jobs: Sequence[tuple[Camera, Image]]) -> None:
        maps = Maps(self.size)
        for camera, view in jobs:
            self._sample(camera, maps, out=view)

    def _sample(self, camera: Camera, maps: Maps, out: Image) -> None:
        if self._mipmap:
            self._mipmap.sample(*maps.directions(camera), maps.footprint2(camera), out)
            return
        x, y = maps.at(camera)
        cv2.remap(self.image, x, y, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_WRAP)


def _largest_footprint(size: int) -> float:
    """Radians per pixel in the middle of the widest view, which no other pixel exceeds."""
    return max(
        (1 + xi) / _focal(Camera(0, 0, 0, LIMITS["vfov"][1], xi), size) for xi in LIMITS["xi"]
    )


def _focal(camera: Camera, size: int) -> float:
    half = np.sin(np.radians(camera.vfov) / 2)
    return float(0.5 * (size / 2) * (camera.xi + np.sqrt(1 - half**2)) / half)


def _check_panorama(panorama: Image) -> None:
    if panorama.dtype != np.uint8 or panorama.ndim != 3 or panorama.shape[2] != 3:
        raise ValueError(
            f"panorama is {panorama.dtype} {panorama.shape}; expected uint8 (H, W, 3) RGB"
        )
    if min(panorama.shape[:2]) < 1:
        raise ValueError(f"panorama is {panorama.shape[1]}×{panorama.shape[0]}; it has no pixels")


class Maps:
    """Computes where a size × size crop samples the panorama, in five float32 planes of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.index = np.arange(size, dtype=np.float64) - size / 2
        planes = np.empty((5, size, size), dtype=np.float32)
        self.scale, self.x, self.y, self.z, self.work = planes

    def at(self, camera: Camera) -> tuple[Plane, Plane]:
        """Where each pixel samples a size × size panorama, in its pixels (x, y), float32 (size, size)."""
        azimuth, polar = self.directions(camera)
        azimuth *= np.float32((self.size - 1) / (2 * np.pi))
        polar *= np.float32((self.size - 1) / np.pi)
        return azimuth, polar

    def directions(self, camera: Camera) -> tuple[Plane, Plane]:
        """Azimuth, 0 to 2π from the panorama's left edge, and polar angle, 0 to π from its top."""
        focal = _focal(camera, self.size)
        grid_x = self.index / focal  # (size,) varies along a row
        grid_y = -self.index / focal  # (size,) varies down a column
        self._sphere_scale(grid_x, grid_y, camera.xi)
        matrix = rotation(camera)
        for plane, row in zip((self.x, self.y, self.z), matrix, strict=True):
            self._rotated(plane, row, grid_x, grid_y, camera.xi)
        return self._equirectangular()

    def footprint2(self, camera: Camera) -> Plane:
        """Mean square of a pixel's two extents on the sphere, radians², after `directions` of the camera.

        The grid's r lies at the angle α from the axis, sin α = r·a and cos α = a - xi with `scale` a:
        a step of 1/f on the grid is a/f on the sphere around the axis, and a²/(1 + xi·cos α)/f away from it.
        """
        a, away = self.scale, self.work  # both (size, size)
        xi = np.float32(camera.xi)
        np.multiply(a, xi, out=away)
        away += 1 - xi * xi
        np.divide(a, away, out=away)
        np.multiply(away, away, out=away)
        away += np.float32(1)
        away *= a
        away *= a
        away *= np.float32(0.5 / _focal(camera, self.size) ** 2)
        return np.asarray(away)

    def _sphere_scale(self, grid_x: Vector, grid_y: Vector, xi: float) -> None:
        """scale = (xi + √(1+(1-xi²)r²)) / (r²+1), which lifts a grid point onto the sphere."""
        r2, scale = self.work, self.scale
        np.add(*_outer(grid_y**2, grid_x**2), out=r2)
        np.multiply(r2, np.float32(1 - xi**2), out=scale)
        scale += np.float32(1)
        np.sqrt(scale, out=scale)
        scale += np.float32(xi)
        r2 += np.float32(1)
        scale /= r2

    def _rotated(
        self, plane: Plane, row: Vector, grid_x: Vector, grid_y: Vector, xi: float
    ) -> None:
        """One coordinate of R·(X·s, Y·s, s-xi) = s·(R₀X + R₁Y + R₂) - R₂·xi."""
        np.add(*_outer(row[1] * grid_y + row[2], row[0] * grid_x), out=plane)
        plane *= self.scale
        plane -= np.float32(row[2] * xi)

    def _equirectangular(self) -> tuple[Plane, Plane]:
        # atan2(x, z) + π = atan2(-x, -z) in [0, 2π), and π/2 - atan2(y, ρ) = atan2(ρ, y) in [0, π]:
        # both are cv2.phase with no wrap to mend. Its error (about 0.01°) is a tenth of a pixel's
        # 1/32 that remap resolves.
        rho = cv2.magnitude(self.x, self.z, magnitude=self.work)
        polar = cv2.phase(self.y, rho, angle=self.y)
        np.negative(self.x, out=self.x)
        np.negative(self.z, out=self.z)
        azimuth = cv2.phase(self.z, self.x, angle=self.x)
        return azimuth, polar


def _outer(column: Vector, row: Vector) -> tuple[Plane, Plane]:
    return column.astype(np.float32)[:, None], row.astype(np.float32)[None, :]


def rotation(camera: Camera) -> Vector:
    """R_az(yaw) · R_el(-pitch) · R_roll(roll)ᵀ, (3, 3): from the camera's axes to the panorama's.

    Both are x right, y up, z forward; a panorama's forward is its middle column. Positive pitch looks
    up, positive yaw to the left.
    """
    yaw, pitch, roll = np.radians([camera.yaw, -camera.pitch, camera.roll])
    cos, sin = np.cos, np.sin
    azimuth = np.array([[cos(yaw), 0, -sin(yaw)], [0, 1, 0], [sin(yaw), 0, cos(yaw)]])
    elevation = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
    spin = np.array([[cos(roll), sin(roll), 0], [-sin(roll), cos(roll), 0], [0, 0, 1]])
    return np.asarray(azimuth @ elevation @ spin.T)
