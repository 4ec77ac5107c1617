"""What a camera sees of its panorama, as SVG paths on the equirectangular picture.

One unit is one degree: x from 0 (yaw -180°) to 360, y from 0 (straight up) to 180.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.pipeline.camera import Camera, interval_bounds, rotation

__all__ = ["HEIGHT", "WIDTH", "Footprint", "border", "footprint", "interval_x", "rings"]

WIDTH, HEIGHT = 360.0, 180.0
_PER_SIDE = 128
_TOLERANCE = 0.15  # degrees that a drawn path may stray: under half a pixel at 1000 px per panorama
_FRAME = np.array([[-1, -1], [WIDTH + 1, -1], [WIDTH + 1, HEIGHT + 1], [-1, HEIGHT + 1]], float)

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Two SVG path strings: `area` to fill by the even-odd rule, `outline` to stroke.

    They differ where the outline is no closed curve on the picture: around a pole.
    """

    area: str
    outline: str


def interval_x(interval: int) -> tuple[float, float]:
    """From where to where a yaw interval reaches. Cameras turn west as their yaw grows."""
    low, high = interval_bounds(interval)
    return WIDTH / 2 - high, WIDTH / 2 - low


def footprint(camera: Camera) -> Footprint:
    """The paths of what `camera` sees. Parts may lie outside the picture, for the viewBox to clip."""
    area, outline = rings(camera)
    closed = bool(np.allclose(outline[0][0], outline[0][-1]))
    return Footprint(_path(area, closed=True), _path(outline, closed=closed))


def rings(camera: Camera) -> tuple[list[F64], list[F64]]:
    """(area, outline), each a list of (N, 2) point arrays; the area counts by the even-odd rule.

    The border is walked clockwise as the viewer sees it. What it encloses then follows from the
    walk alone: one turn west goes round the zenith, one turn east round the nadir. No turn and
    clockwise is a plain patch; no turn and anticlockwise is a hole in a view that sees both poles
    (xi near 1 sees past 180°).
    """
    walk = _unwrapped(border(camera))
    turns = round((walk[-1, 0] - walk[0, 0]) / WIDTH)
    if turns:
        return _around_pole(_simplified(walk, closed=False), turns)
    ring = _simplified(walk[:-1], closed=True)
    copies = _copies(np.concatenate([ring, ring[:1]]))
    hole = _signed_area(walk) < 0
    return ([_FRAME, *copies] if hole else copies), copies


def border(camera: Camera, size: int = 512, per_side: int = _PER_SIDE) -> F64:
    """Where the rim of a size × size crop lies, (4 · per_side, 2), clockwise from its top left.

    Float64 twin of the sampling maps in `camera`: X = (u - W/2)/f, Y = -(v - H/2)/f for pixel
    indices from 0 to size - 1, lifted onto the sphere and rotated.
    """
    half = np.sin(np.radians(camera.vfov) / 2)
    focal = 0.5 * (size / 2) * (camera.xi + np.sqrt(1 - half**2)) / half
    x, y = _rim(size, per_side) / focal
    r2 = x**2 + y**2
    scale = (camera.xi + np.sqrt(1 + (1 - camera.xi**2) * r2)) / (r2 + 1)
    points = np.stack([x * scale, y * scale, scale - camera.xi])  # (3, N)
    px, py, pz = rotation(camera) @ points
    longitude = np.degrees(np.arctan2(px, pz))
    latitude = np.degrees(np.arctan2(py, np.hypot(px, pz)))
    return np.stack([longitude + 180, 90 - latitude], axis=1)


def _rim(size: int, per_side: int) -> F64:
    """Grid coordinates (X, Y up) times the focal length along the rim, (2, 4 · per_side)."""
    low, high = -size / 2, size / 2 - 1
    along = np.linspace(low, high, per_side, endpoint=False)
    back = np.linspace(high, low, per_side, endpoint=False)
    u = np.concatenate([along, np.full(per_side, high), back, np.full(per_side, low)])
    v = np.concatenate([np.full(per_side, low), along, np.full(per_side, high), back])
    return np.stack([u, -v])


def _unwrapped(points: F64) -> F64:
    """The closed walk, first point again at the end, x free of jumps at the seam."""
    closed: F64 = np.concatenate([points, points[:1]])
    closed[:, 0] = np.unwrap(closed[:, 0], period=WIDTH)
    return closed


def _simplified(walk: F64, closed: bool) -> F64:
    # Told that a closed ring is open, OpenCV would drop its last point and leave a gap.
    thin = cv2.approxPolyDP(walk.astype(np.float32)[:, None], _TOLERANCE, closed)
    simple: F64 = thin[:, 0].astype(np.float64)
    return simple


def _around_pole(walk: F64, turns: int) -> tuple[list[F64], list[F64]]:
    start = _shifted(walk, -int(walk[0, 0] // WIDTH))
    line = np.concatenate([_shifted(start, turn) for turn in _order(turns)])
    pole = 0.0 if turns < 0 else HEIGHT
    ends = np.array([[line[-1, 0], pole], [line[0, 0], pole]])
    return [np.concatenate([line, ends])], [line]


def _order(turns: int) -> tuple[int, int, int]:
    """Three turns cover the picture wherever the walk begins; laid out in its own direction."""
    return (1, 0, -1) if turns < 0 else (-1, 0, 1)


def _copies(walk: F64) -> list[F64]:
    """The ring at every multiple of 360° at which it meets the picture."""
    low, high = walk[:, 0].min(), walk[:, 0].max()
    first, last = math.ceil(-high / WIDTH), math.floor((WIDTH - low) / WIDTH)
    return [_shifted(walk, k) for k in range(first, last + 1)]


def _shifted(points: F64, turns: int) -> F64:
    return np.column_stack([points[:, 0] + turns * WIDTH, points[:, 1]])


def _signed_area(ring: F64) -> float:
    """Positive where the ring runs clockwise on the picture, whose y points down."""
    x, y = ring.T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2


def _path(lines: Iterable[F64], closed: bool) -> str:
    end = "Z" if closed else ""
    return "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + end for line in lines
    ).replace(".0", "")
