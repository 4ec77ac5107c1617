"""What `stream` yields, in the order in which it becomes known.

```
Accepted → Cameras → for each interval, several of them at a time:
    PairReady, Scored of panorama 1, then of panorama 2 unless the first fell below the threshold
    → Dropped | Kept → View × 2N, Described
→ Done
```
`done` of `total` images are super-resolved when an event is sent. `total` starts at the most that can
come and shrinks as intervals are dropped; at `Done` they are equal. Images are RGB uint8 arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InferenceFailed, InvalidInput, PanotritonError, ServerBusy
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.quality import Quality
from panotriton.pipeline.results import quality

__all__ = [
    "Accepted",
    "Cameras",
    "Described",
    "Done",
    "Dropped",
    "Event",
    "Kept",
    "PairReady",
    "Scored",
    "View",
    "event_from_tensors",
]

U8 = NDArray[np.uint8]


@dataclass(frozen=True, eq=False, slots=True)
class _Progress:
    done: int
    total: int


@dataclass(frozen=True, eq=False, slots=True)
class Accepted(_Progress):
    """The request's arguments are valid and work begins."""


@dataclass(frozen=True, eq=False, slots=True)
class Cameras(_Progress):
    """The group's cameras, (2, 8, 2, 5) float64: panorama, interval, left|right, `CAMERA_FIELDS`."""

    cameras: NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class PairReady(_Progress):
    """A super-resolved pair, left | right, (H, 2H, 3)."""

    panorama: int
    interval: int
    sharp: U8


@dataclass(frozen=True, eq=False, slots=True)
class Scored(_Progress):
    """A pair's scores, and `raw`, the reply that they were read from."""

    panorama: int
    interval: int
    quality: Quality
    raw: str


@dataclass(frozen=True, eq=False, slots=True)
class Kept(_Progress):
    """The interval's lowest score reaches the threshold."""

    interval: int


@dataclass(frozen=True, eq=False, slots=True)
class Dropped(_Progress):
    """The interval fails the threshold, for `reason`; panorama 2's pair may never have been made."""

    interval: int
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class View(_Progress):
    """An in-between view (H, H, 3), super-resolved; weight_idx i of 1…N is at i/(N+1) from left to right."""

    panorama: int
    interval: int
    weight_idx: int
    camera: Camera
    image: U8


@dataclass(frozen=True, eq=False, slots=True)
class Described(_Progress):
    """What panorama 2's right view shows; `error` says why `text` is empty, if it is."""

    interval: int
    text: str
    error: str


@dataclass(frozen=True, eq=False, slots=True)
class Done(_Progress):
    """The last event: the intervals that passed, ascending; `warning` as a `Group` has it."""

    kept: tuple[int, ...]
    warning: str = ""


Event = Accepted | Cameras | PairReady | Scored | Kept | Dropped | View | Described | Done

Tensors = Mapping[str, NDArray[Any]]


def event_from_tensors(tensors: Tensors) -> Event:
    """One response of `panorama_stream` as a value.

    Raises ServerBusy where the server is full, InvalidInput where the model refused the request,
    InferenceFailed where it failed.
    """
    content = json.loads(tensors["EVENT"].item())
    kind = content.pop("event")
    if kind in _ERRORS:
        raise _ERRORS[kind](content["message"])
    return _EVENTS[kind](content, tensors)


_ERRORS: dict[str, type[PanotritonError]] = {
    "busy": ServerBusy,
    "refused": InvalidInput,
    "failed": InferenceFailed,
}


def _scored(content: dict[str, Any], tensors: Tensors) -> Event:
    scores = np.array(content.pop("scores"), np.float32)  # NaN where JSON has null
    raw = content.pop("raw_reply")
    return Scored(**content, quality=quality(scores[:5], scores[5]), raw=raw)


def _view(content: dict[str, Any], tensors: Tensors) -> Event:
    camera = Camera.from_array(tensors["CAMERAS"][0])
    return View(**content, camera=camera, image=tensors["IMAGES"][0])


_EVENTS: dict[str, Callable[[dict[str, Any], Tensors], Event]] = {
    "accepted": lambda content, tensors: Accepted(**content),
    "cameras": lambda content, tensors: Cameras(
        **content, cameras=tensors["CAMERAS"].reshape(2, 8, 2, 5)
    ),
    "pair": lambda content, tensors: PairReady(**content, sharp=tensors["IMAGES"][0]),
    "scored": _scored,
    "kept": lambda content, tensors: Kept(**content),
    "dropped": lambda content, tensors: Dropped(**content),
    "view": _view,
    "described": lambda content, tensors: Described(**content),
    "done": lambda content, tensors: Done(
        content["done"], content["total"], tuple(content["kept"]), content.get("warning", "")
    ),
}
