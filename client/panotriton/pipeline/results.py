"""What the client's methods return, as frozen values. Images are RGB uint8, (H, W, 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.pipeline.camera import Camera, interval_bounds
from panotriton.pipeline.contract import INTERVALS
from panotriton.pipeline.quality import Quality

__all__ = [
    "Cropped",
    "Description",
    "Group",
    "Health",
    "Interval",
    "Model",
    "Pair",
    "Score",
    "Sequence",
    "StageTime",
    "Timings",
    "Upscaled",
    "group_from_tensors",
    "quality",
    "warning",
    "warning_field",
]

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of the request that a result came with went, in ms.

    total_ms is measured by the client, from sending to the last byte. The others come from the
    server's statistics: queue_ms in queues, compute_ms in the model and what it calls, network_ms
    everything else. They are exact or None: None unless the client was made with `timings=True`
    and the server finished no other request to that model meanwhile.
    """

    total_ms: float
    queue_ms: float | None = None
    compute_ms: float | None = None
    network_ms: float | None = None


@dataclass(frozen=True, eq=False)
class _Picture:
    """pixels: uint8 (H, W, 3), an array; through a CUDA pool a CUDA tensor, which never was on the host."""

    pixels: Any
    timings: Timings
    model: str

    @property
    def image(self) -> PILImage.Image:
        """A PIL image of mode RGB."""
        return PILImage.fromarray(self.numpy())

    def numpy(self) -> U8:
        """The pixels, (H, W, 3) uint8; no copy unless they are on a GPU."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels.cpu().numpy()

    def torch(self, device: str | None = None) -> Any:
        """A torch tensor (3, H, W), float32 in [0, 1], as the client's methods take it.

        On `device`; where that is None, where the pixels are. Raises ImportError without torch.
        """
        import torch  # noqa: PLC0415  # only for those who ask

        pixels = self.pixels if isinstance(self.pixels, torch.Tensor) else torch.tensor(self.pixels)
        return pixels.to(device or pixels.device).permute(2, 0, 1).float() / 255


@dataclass(frozen=True, eq=False)
class Upscaled(_Picture):
    """A super-resolved image. `warning` says what of the prompt was too long to be read, if any was."""

    warning: str = ""


@dataclass(frozen=True, eq=False)
class Cropped(_Picture):
    """What `camera` sees of a panorama, (S, S, 3)."""

    camera: Camera


@dataclass(frozen=True, slots=True)
class Score:
    """A pair image's quality; each score is 0 to 1, NaN where the reply has none. `raw` is the reply."""

    final: float
    correlation: float
    balance: float
    richness: float
    clarity: float
    coherence: float
    raw: str
    timings: Timings
    model: str


@dataclass(frozen=True, slots=True)
class Description:
    """Two or three sentences about an image; `error` says why `text` is empty, if it is."""

    text: str
    error: str
    timings: Timings
    model: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the server's repository. `reason` says why one is not ready, where the server does."""

    name: str
    version: str
    ready: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """live: the server answers; ready: so do all its models. Name and version are the server's own."""

    live: bool
    ready: bool
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One left|right pair of one panorama.

    image: (S, 2S, 3) before super-resolution, None unless intermediates were asked for;
    sharp: (H, 2H, 3) after it. raw: the scorer's reply.
    """

    panorama: int
    interval: int
    left: Camera
    right: Camera
    quality: Quality
    raw: str
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
    """A yaw interval that passed the filter: one sequence per panorama, and what the last view shows.

    yaw_bounds is in degrees. `description_error` says why `description` is empty, if it is.
    """

    interval: int
    yaw_bounds: tuple[float, float]
    sequences: tuple[Sequence, Sequence]
    description: str
    description_error: str


@dataclass(frozen=True, slots=True)
class StageTime:
    """A model's work since the server started, or between two readings of the server's statistics.

    On a shared server it includes what others asked meanwhile. `inferences` counts batch rows,
    `requests` what was answered without an error, in `request_ms` altogether. `compute_ms` counts a batch for
    each of its requests, `busy_ms` once.
    """

    model: str
    executions: int
    inferences: int
    queue_ms: float
    compute_ms: float
    requests: int = 0
    request_ms: float = 0.0
    busy_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """All that came of one group. `intervals` is empty where none reached the threshold.

    `warning` says what of the prompt was too long to be read, if any was.
    """

    pairs: tuple[Pair, ...]
    intervals: tuple[Interval, ...]
    timings: Timings
    model: str
    warning: str = ""

    @property
    def seconds(self) -> float:
        """How long the request took."""
        return self.timings.total_ms / 1e3

    @property
    def kept(self) -> tuple[int, ...]:
        """Interval ids that passed."""
        return tuple(interval.interval for interval in self.intervals)

    @property
    def image_count(self) -> int:
        """Images in all sequences."""
        return sum(len(s.images) for interval in self.intervals for s in interval.sequences)


def group_from_tensors(
    tensors: Mapping[str, NDArray[Any]], timings: Timings, model: str = "panorama"
) -> Group:
    """Assemble the ensemble's outputs; PAIRS and INTERPOLATED may be absent. Images are views."""
    pairs = tuple(_pair(tensors, index) for index in range(2 * INTERVALS))
    intervals = tuple(_interval(tensors, pairs, k) for k in range(len(tensors["KEPT"])))
    return Group(pairs, intervals, timings, model, warning(tensors))


def warning(tensors: Mapping[str, NDArray[Any]]) -> str:
    """What WARNING (1,) says, empty where it is absent."""
    return str(tensors["WARNING"].item().decode()) if "WARNING" in tensors else ""


def warning_field(warning: str) -> dict[str, str]:
    """What JSON has of a warning: `warning`, only where there is one."""
    return {"warning": warning} if warning else {}


def _pair(tensors: Mapping[str, NDArray[Any]], index: int) -> Pair:
    panorama, interval = divmod(index, INTERVALS)
    left, right = tensors["CAMERAS"][panorama, interval]
    return Pair(
        panorama=panorama + 1,
        interval=interval + 1,
        left=Camera.from_array(left),
        right=Camera.from_array(right),
        quality=quality(tensors["SUB_SCORES"][index], tensors["SCORE"][index]),
        raw=tensors["RAW_OUTPUT"][index].decode(),
        image=tensors["PAIRS"][index] if "PAIRS" in tensors else None,
        sharp=tensors["PAIRS_SR"][index],
    )


def quality(sub_scores: NDArray[np.float32], final: np.float32) -> Quality:
    """Scores (5,) and the final one as they were written, without float32's tail of digits."""
    return Quality(*(round(float(score), 6) for score in (*sub_scores, final)))


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
