"""A panorama at its own resolution, sampled by the local scale of a view: neither aliased nor blurred.

Levels 1, 2, … are the panorama reduced by 2, 4, …; a view's pixel blends two neighbours. The share of
each is what gives the blend the variance of the ideal filter: a pixel's footprint of s panorama
pixels has s²/12, bilinear interpolation 1/6, level k (a box of 2ᵏ, then bilinear) 4ᵏ/4 - 1/12. So a footprint
of s needs a level of "size" m, m² = 1 + s²/3, and shares are linear in m² between 4ᵏ and 4ᵏ⁺¹.

Towards the poles an equirectangular row is stretched by 1/cos φ, and a footprint with it. Each level's rows
are blurred along the row by just what is missing, so that the same shares are right at every latitude.
The idea is that of mip maps: Williams, "Pyramidal Parametrics", SIGGRAPH 1983.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Mipmap"]

Image = NDArray[np.uint8]
Plane = NDArray[np.float32]
Vector = NDArray[np.float64]

_BLOCK_PX = 128
"""Side of the parts of a view that choose their levels for themselves."""
_LEAST_SHARE = 1 / 128
"""A level's share below which it is not read: no grey level's worth in a photograph."""


class Mipmap:
    """A panorama (H, W, 3) uint8 and its reductions, for footprints of up to `most` radians per pixel."""

    def __init__(self, panorama: Image, most: float) -> None:
        height, width = panorama.shape[:2]
        self.density = min(width / (2 * math.pi), height / math.pi)
        """Panorama pixels per radian, along the axis that has fewer."""
        self._levels = [panorama]
        reduced = panorama
        while 4.0 ** (len(self._levels) - 1) < self._size2(most) and min(height, width / 2) >= 4:
            height = max(2, round(min(height, width / 2) / 2))
            width = 2 * height  # the same density along both axes, whatever the panorama's
            reduced = cv2.resize(reduced, (width, height), interpolation=cv2.INTER_AREA)
            self._levels.append(_widened(reduced, level=len(self._levels)))

    def _size2(self, footprint: float) -> float:
        return 1 + (footprint * self.density) ** 2 / 3

    def sample(self, azimuth: Plane, polar: Plane, footprint2: Plane, out: Image) -> None:
        """Fill out (S, S, 3) uint8 with what is seen in those directions.

        azimuth: 0 to 2π from the left edge; polar: 0 to π from the top; footprint2: the mean square
        of a pixel's two extents, radians²; float32 (S, S) each.
        """
        for top in range(0, len(out), _BLOCK_PX):
            for left in range(0, len(out), _BLOCK_PX):
                part = np.s_[top : top + _BLOCK_PX, left : left + _BLOCK_PX]
                self._sample(azimuth[part], polar[part], footprint2[part], out[part])

    def _sample(self, azimuth: Plane, polar: Plane, footprint2: Plane, out: Image) -> None:
        size2 = _scaled(footprint2, self.density**2 / 3, 1)
        last = len(self._levels) - 1
        first = min(last, int(math.log(size2.min(), 4)))
        highest = size2.max()
        cv2.remap(*self._at(first, azimuth, polar), cv2.INTER_LINEAR, out, cv2.BORDER_WRAP)
        for level in range(first + 1, last + 1):
            below = 4.0 ** (level - 1)
            if highest < below * (1 + 3 * _LEAST_SHARE):
                return
            share = _clipped(_scaled(size2, 1 / (3 * below), -1 / 3), 1)
            finer = out.copy()
            coarser = cv2.remap(
                *self._at(level, azimuth, polar), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
            )
            cv2.blendLinear(finer, coarser, 1 - share, share, dst=out)

    def _at(self, level: int, azimuth: Plane, polar: Plane) -> tuple[Image, Plane, Plane]:
        """The level, and where in it: columns wrap, beyond the last row's middle lies that row."""
        image = self._levels[level]
        height, width = image.shape[:2]
        x = _scaled(azimuth, width / (2 * math.pi), -0.5)
        y = _clipped(_scaled(polar, height / math.pi, -0.5), height - 1)
        return image, x, y


def _scaled(plane: Plane, factor: float, offset: float) -> Plane:
    # One pass, half the time of two of numpy's.
    return np.asarray(cv2.addWeighted(plane, factor, plane, 0, offset), np.float32)


def _clipped(plane: Plane, highest: float) -> Plane:
    # Not by cv2.max, which takes a plane of one pixel for a number.
    return np.clip(plane, np.float32(0), np.float32(highest))


def _widened(image: Image, level: int) -> Image:
    """Each row of level k blurred around the panorama by the footprint's stretch at its latitude."""
    height, width = image.shape[:2]
    latitude = (0.5 - (np.arange(height) + 0.5) / height) * np.pi
    # A level stands for footprints of √(3(4ᵏ-1)) panorama pixels; tan² = 1/cos² - 1 is what is missing.
    variances = (1 - 4.0**-level) / 4 * np.tan(latitude) ** 2  # in the level's pixels
    widened = np.empty_like(image)
    for y, variance in enumerate(variances):
        kernel = _box(min(variance, width**2 / 12))
        reach = len(kernel) // 2
        row = np.take(image[y], np.arange(-reach, width + reach), axis=0, mode="wrap")
        blurred = cv2.filter2D(row[None].astype(np.float32), -1, kernel[None])[0]
        widened[y] = np.rint(blurred[reach : reach + width])
    return widened


def _box(variance: float) -> Vector:
    """A box of whole pixels and a part of one at each end, (2n + 3,), of that variance, sum 1."""
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)  # on each side of the middle
    inside = np.arange(-whole, whole + 1.0)
    end = (variance * len(inside) - (inside**2).sum()) / (2 * ((whole + 1) ** 2 - variance))
    box = np.array([end, *np.ones_like(inside), end])
    return np.asarray(box / box.sum())
