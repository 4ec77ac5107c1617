"""Events as the page takes them: JSON objects, pictures in them as data URIs.

`event` names the kind; `done` and `total` count images. Camera values are words, ready to be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.groups.report.document import degrees
from panotriton.groups.report.footprint import footprint
from panotriton.groups.report.picture import bicubic, data_uri, within
from panotriton.pipeline import events
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import INTERVALS
from panotriton.pipeline.group import make_pairs
from panotriton.pipeline.quality import finite_or_none

__all__ = ["Messages"]

_SLIDER_PX, _SLIDER_BYTES = 2048, 600_000
_VIEW_PX, _VIEW_BYTES = 512, 100_000

U8 = NDArray[np.uint8]


class Messages:
    """Of one run. Spheres are its panoramas, (S, S, 3) each.

    The events hold no image before super-resolution: the pairs are cropped here once the cameras are
    known, by the same arithmetic.
    """

    def __init__(self, spheres: tuple[U8, U8]) -> None:
        self._spheres = spheres
        self._pairs: U8 | None = None  # (16, S, 2S, 3)
        self._content: dict[type, Callable[[Any], dict[str, Any]]] = {
            events.Accepted: lambda event: {},
            events.Cameras: self._cameras,
            events.PairReady: self._pair,
            events.Scored: _scored,
            events.Kept: lambda event: {"interval": event.interval},
            events.Dropped: lambda event: {"interval": event.interval, "reason": event.reason},
            events.View: _view,
            events.Described: _described,
            events.Done: lambda event: {"kept": list(event.kept)},
        }

    def message(self, event: events.Event) -> dict[str, Any]:
        """One event's; encodes its pictures, which takes a tenth of a second a pair."""
        kind = type(event).__name__.lower().removesuffix("ready")
        content = self._content[type(event)](event)
        return {"event": kind, "done": event.done, "total": event.total, **content}

    def _cameras(self, event: events.Cameras) -> dict[str, Any]:
        size = self._spheres[0].shape[0]
        self._pairs, _ = make_pairs(self._spheres, event.cameras, size)
        return {
            "cameras": [
                {
                    "panorama": p + 1,
                    "interval": k + 1,
                    "left": _camera(left),
                    "right": _camera(right),
                }
                for p, of_panorama in enumerate(event.cameras)
                for k, (left, right) in enumerate(map(_both, of_panorama))
            ]
        }

    def _pair(self, event: events.PairReady) -> dict[str, Any]:
        height, width = event.sharp.shape[:2]
        halves = event.sharp[:, : width // 2], event.sharp[:, width // 2 :]
        assert self._pairs is not None  # noqa: S101 -- cameras come first
        crop = self._pairs[(event.panorama - 1) * INTERVALS + event.interval - 1]
        return {
            "panorama": event.panorama,
            "interval": event.interval,
            "width": width,
            "height": height,
            "before": data_uri(within(bicubic(crop, width, height), _SLIDER_PX), _SLIDER_BYTES),
            "after": data_uri(within(event.sharp, _SLIDER_PX), _SLIDER_BYTES),
            "ends": [_picture(half) for half in halves],
        }


def _both(row: NDArray[np.float64]) -> tuple[Camera, Camera]:
    return Camera.from_array(row[0]), Camera.from_array(row[1])


def _scored(event: events.Scored) -> dict[str, Any]:
    scores = {name: finite_or_none(score) for name, score in asdict(event.quality).items()}
    return {
        "panorama": event.panorama,
        "interval": event.interval,
        "score": scores.pop("final_score"),
        "parts": scores,
        "raw": event.raw,
    }


def _view(event: events.View) -> dict[str, Any]:
    return {
        "panorama": event.panorama,
        "interval": event.interval,
        "index": event.weight_idx,
        "picture": _picture(event.image),
        "camera": _camera(event.camera),
    }


def _described(event: events.Described) -> dict[str, Any]:
    return {"interval": event.interval, "text": event.text, "error": event.error}


def _picture(image: U8) -> str:
    return data_uri(within(image, _VIEW_PX), _VIEW_BYTES)


def _camera(camera: Camera) -> dict[str, str]:
    """Its parameters in words, and what it sees as SVG paths, see `report.footprint`."""
    angles = {name: degrees(getattr(camera, name)) for name in ("yaw", "pitch", "roll", "vfov")}
    return {**angles, "xi": f"{camera.xi:.2f}", **asdict(footprint(camera))}
