"""The report of one group: a single HTML file that asks the network for nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidImage
from panotriton.groups import layout
from panotriton.groups.report.document import render, save, template
from panotriton.groups.report.footprint import Footprint, footprint
from panotriton.groups.report.picture import bicubic, data_uri, most_different, read_picture, within
from panotriton.groups.report.record import PairRecord, Record, Stage, ViewRecord, read_record
from panotriton.groups.report.verdict import outcome

__all__ = ["MAX_BYTES", "SLIDER", "write_report"]

MAX_BYTES = 25_000_000
"""What a report's file stays below, whatever the group's size."""

# How that is shared out, in characters of data URI; the rest is for text and footprints.
_SLIDERS_BYTES = 12_000_000
_SEQUENCES_BYTES = 7_500_000
_CROPS_BYTES = 2_000_000
_THUMBS_BYTES = 500_000
_PANORAMAS_BYTES = 1_500_000

_SLIDER_PX = 2048  # wide: a pair at the default sizes, whole
_VIEW_PX = 512
_CROP_PX = 256
_THUMB_PX = 400
_PANORAMA_PX = 1600

SLIDER = Path(__file__).parent / "vendor" / "img-comparison-slider"

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Crop:
    """The same square of both images, pixel for pixel."""

    side: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """A pair's pictures as data URIs. `before` is None and `crops` empty without the pair's crop."""

    thumb: str
    before: str | None
    after: str
    crops: tuple[Crop, ...]
    width: int
    height: int
    shown_width: int


@dataclass(frozen=True, slots=True)
class Shot:
    """One view of a sequence: its picture, what it is called and where it looks."""

    picture: str
    name: str
    view: ViewRecord
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage, its share of all computing and its length against the longest stage, in percent."""

    stage: Stage
    share: float
    length: float


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a group's folder; returns its path, `folder`/report.html by default.

    The file holds everything it shows and is at most `MAX_BYTES`. Raises InvalidInput where the
    folder is no group's and InvalidImage where one of its images is missing or broken. A panorama
    that cannot be read is no error: its footprints are drawn on a grid.
    """
    record = read_record(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV works without the interpreter lock
        pictures = list(pool.map(partial(_pictures, count=len(record.pairs)), record.pairs))
        shots = _shots(record, pool)
    page = render(
        "page.html",
        scripts=(SLIDER / "index.js", template("slider.js"), template("player.js")),
        styles=(SLIDER / "styles.css", template("page.css")),
        record=record,
        outcome=outcome(record),
        pictures={_key(pair): found for pair, found in zip(record.pairs, pictures, strict=True)},
        shots=shots,
        panoramas=[_panorama(path) for path in record.panoramas],
        worst_first=sorted(record.pairs, key=PairRecord.rank),
        stages=_bars(record.stages),
    )
    return save(page, output or folder / layout.REPORT)


def _key(pair: PairRecord) -> tuple[int, int]:
    return pair.panorama, pair.interval


def _pictures(pair: PairRecord, count: int) -> Pictures:
    after = read_picture(pair.after)
    height, width = after.shape[:2]
    share = _SLIDERS_BYTES // (2 * (count + 1))  # one pair more: the best is shown twice
    before = None if pair.before is None else bicubic(read_picture(pair.before), width, height)
    return Pictures(
        thumb=data_uri(within(after, _THUMB_PX), _THUMBS_BYTES // count),
        before=None if before is None else data_uri(within(before, _SLIDER_PX), share),
        after=data_uri(within(after, _SLIDER_PX), share),
        crops=() if before is None else tuple(_crops(before, after, _CROPS_BYTES // (4 * count))),
        width=width,
        height=height,
        shown_width=min(width, _SLIDER_PX),
    )


def _crops(before: U8, after: U8, max_bytes: int) -> Iterator[Crop]:
    middle = after.shape[1] // 2
    for side, half in (("left", np.s_[:, :middle]), ("right", np.s_[:, middle:])):
        window = most_different(before[half], after[half], _CROP_PX)
        yield Crop(
            side,
            data_uri(before[half][window], max_bytes),
            data_uri(after[half][window], max_bytes),
        )


def _shots(record: Record, pool: ThreadPoolExecutor) -> dict[tuple[int, int], list[Shot]]:
    """The views of every sequence, by panorama and interval."""
    share = _SEQUENCES_BYTES // max(record.image_count, 1)
    sequences = {
        (panorama, interval.number): views
        for interval in record.kept
        for panorama, views in enumerate(interval.sequences, start=1)
    }
    return {
        key: list(pool.map(partial(_shot, last=len(views) - 1, max_bytes=share), *_columns(views)))
        for key, views in sequences.items()
    }


def _columns(views: tuple[ViewRecord, ...]) -> tuple[range, tuple[ViewRecord, ...]]:
    return range(len(views)), views


def _shot(index: int, view: ViewRecord, last: int, max_bytes: int) -> Shot:
    name = {0: "left", last: "right"}.get(index, f"in-between {index}")
    picture = data_uri(within(read_picture(view.path), _VIEW_PX), max_bytes)
    return Shot(picture, name, view, footprint(view.camera))


def _panorama(path: Path) -> str | None:
    """The panorama as a data URI, stretched to 2:1 as its angles are; None if it can't be read."""
    try:
        image = read_picture(path)
    except InvalidImage:
        return None
    return data_uri(within(image, _PANORAMA_PX), _PANORAMAS_BYTES // 2)


def _bars(stages: tuple[Stage, ...]) -> list[Bar]:
    times = [stage.compute_s for stage in stages]
    total = sum(stage.compute_s for stage in stages if not stage.part) or 1.0
    longest = max(times, default=0) or 1.0
    pairs = zip(stages, times, strict=True)
    return [Bar(stage, 100 * time / total, 100 * time / longest) for stage, time in pairs]
