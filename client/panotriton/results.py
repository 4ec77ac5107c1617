"""What a group's request returns, as frozen values. Images are RGB uint8 arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.camera import INTERVALS, Camera, interval_bounds
from panotriton.quality import Quality

__all__ = ["Group", "Interval", "Pair", "Sequence", "StageTime", "group_from_tensors"]

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pair:
    """One left|right pair of one panorama.

    image: (S, 2S, 3) before super-resolution, None unless intermediates were asked for;
    sharp: (H, 2H, 3) after it.
    """

    panorama: int
    interval: int
    left: Camera
    right: Camera
    quality: Quality
    raw_reply: str
    image: U8 | None
    sharp: U8


@dataclass(frozen=True, slots=True)
class Sequence:
    """left, in-between 1…N, right: `images[i]` (H, H, 3) is what `cameras[i]` sees, super-resolved.

    `crops` are the N in-between views before super-resolution, None unless asked for.
    """

    images: tuple[U8, ...]
    cameras: tuple[Camera, ...]
    crops: tuple[U8, ...] | None


@dataclass(frozen=True, slots=True)
class Interval:
    """A yaw interval that passed the filter: one sequence a panorama, and what the last view shows.

    yaw_bounds is in degrees. `description_error` says why `description` is empty, if it is.
    """

    interval: int
    yaw_bounds: tuple[float, float]
    sequences: tuple[Sequence, Sequence]
    description: str
    description_error: str


@dataclass(frozen=True, slots=True)
class StageTime:
    """A model's work between two readings of the server's statistics.

    On a shared server it includes what others asked meanwhile. `inferences` counts batch rows.
    """

    model: str
    executions: int
    inferences: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class Group:
    """All that came of one group. `intervals` is empty where none reached the threshold."""

    pairs: tuple[Pair, ...]
    intervals: tuple[Interval, ...]
    seconds: float
    stages: tuple[StageTime, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Interval ids that passed."""
        return tuple(interval.interval for interval in self.intervals)

    @property
    def image_count(self) -> int:
        """Images in all sequences."""
        return sum(len(s.images) for interval in self.intervals for s in interval.sequences)


def group_from_tensors(tensors: Mapping[str, NDArray[Any]], seconds: float) -> Group:
    """Assemble the ensemble's outputs; PAIRS and INTERPOLATED may be absent. Images are views."""
    pairs = tuple(_pair(tensors, index) for index in range(2 * INTERVALS))
    intervals = tuple(_interval(tensors, pairs, k) for k in range(len(tensors["KEPT"])))
    return Group(pairs, intervals, seconds)


def _pair(tensors: Mapping[str, NDArray[Any]], index: int) -> Pair:
    panorama, interval = divmod(index, INTERVALS)
    left, right = tensors["CAMERAS"][panorama, interval]
    scores = (*tensors["SUB_SCORES"][index], tensors["SCORE"][index])
    return Pair(
        panorama=panorama + 1,
        interval=interval + 1,
        left=Camera.from_array(left),
        right=Camera.from_array(right),
        quality=Quality(*(round(float(score), 6) for score in scores)),
        raw_reply=tensors["RAW_OUTPUT"][index].decode(),
        image=tensors["PAIRS"][index] if "PAIRS" in tensors else None,
        sharp=tensors["PAIRS_SR"][index],
    )


def _interval(tensors: Mapping[str, NDArray[Any]], pairs: tuple[Pair, ...], k: int) -> Interval:
    interval = int(tensors["KEPT"][k])
    ends = (pairs[interval - 1], pairs[INTERVALS + interval - 1])
    return Interval(
        interval=interval,
        yaw_bounds=interval_bounds(interval),
        sequences=(_sequence(tensors, ends[0], k), _sequence(tensors, ends[1], k)),
        description=tensors["DESCRIPTION"][k].decode(),
        description_error=tensors["DESCRIPTION_ERROR"][k].decode(),
    )


def _sequence(tensors: Mapping[str, NDArray[Any]], pair: Pair, k: int) -> Sequence:
    cameras = tensors["INTERPOLATED_CAMERAS"]  # (K, 2, N, 5)
    p, count = pair.panorama - 1, cameras.shape[2]
    first = (2 * k + p) * count
    middle = pair.sharp.shape[1] // 2
    between = tensors["INTERPOLATED_SR"][first : first + count]
    crops = tensors.get("INTERPOLATED")
    return Sequence(
        images=(pair.sharp[:, :middle], *between, pair.sharp[:, middle:]),
        cameras=(pair.left, *map(Camera.from_array, cameras[k, p]), pair.right),
        crops=None if crops is None else tuple(crops[first : first + count]),
    )
