"""Groups as folders: `group_0001/` and one growing `results.json`, which appear when they are whole."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput, brief
from panotriton.groups import layout
from panotriton.groups.store import json_bytes
from panotriton.pipeline.contract import INTERVALS, MAX_INTERPOLATIONS
from panotriton.pipeline.quality import finite_or_none
from panotriton.pipeline.results import Group, Interval, Pair, Sequence, warning_field
from panotriton.pipeline.scratch import Scratch, alone, atomic

__all__ = [
    "JPEG_QUALITY",
    "RESULT",
    "base_name",
    "fill_group",
    "jpeg_bytes",
    "next_group_id",
    "process_command",
    "read_result",
    "read_results",
    "result_entry",
    "write_group",
]

JPEG_QUALITY = 95
RESULT = ("group_id", "kept", "scores", "intervals")
"""What an entry of results.json has."""

# Of 255, less what the longest name adds: number and view.
_LONGEST = layout.between_view("_1", INTERVALS, MAX_INTERPOLATIONS, sharp=True).rpartition("/")[2]
_MAX_BASE_BYTES = 255 - len(_LONGEST)

U8 = NDArray[np.uint8]


def base_name(panorama: Path) -> str:
    """What the files of a panorama are named after.

    Raises InvalidInput where they cannot be: a path that is no UTF-8, as which JSON and HTML hold
    it, or a name that leaves no room for what is added.
    """
    try:
        str(panorama).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the name of {brief(panorama)} is no UTF-8, as which the group's files hold it: rename it"
        ) from error
    size = len(panorama.stem.encode())
    if size > _MAX_BASE_BYTES:
        raise InvalidInput(
            f"the name of {brief(panorama)} has {size} bytes; expected at most {_MAX_BASE_BYTES}, since "
            "the group's files add to it: rename it"
        )
    return panorama.stem


def next_group_id(root: Path) -> int:
    """One more than the highest group_NNNN folder under `root`; 1 where there is none."""
    taken = [layout.group_number(path) or 0 for path in root.glob("*")]
    return max(taken, default=0) + 1


def write_group(
    group: Group,
    root: Path,
    bases: tuple[str, str],
    about: dict[str, Any],
    *,
    group_id: int | None = None,
) -> Path:
    """Write a group below `root` and add it to `root`/results.json; returns its folder.

    group_id: by default the next one, also of those that other processes write there.
    bases: what files of panorama 1 and 2 are named after; made distinct where they are equal.
    about: facts of the run (panoramas, options, versions, weights), kept in group_info.json. Images
    are JPEG. The folder appears when it is complete; one of the same number is replaced.
    """
    root.mkdir(parents=True, exist_ok=True)
    with alone(root), Scratch(".group-", root) as scratch:
        group_id = group_id or next_group_id(root)
        folder = layout.group_folder(root, group_id)
        part = scratch / folder.name
        result = fill_group(group, part, group_id, bases, about)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
        _add_result(root, result)
    return folder


def fill_group(
    group: Group, folder: Path, group_id: int, bases: tuple[str, str], about: dict[str, Any]
) -> dict[str, Any]:
    """Write a group's files to `folder`, emptied first; returns the group's entry of results.json."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in layout.FOLDERS:
        (folder / name).mkdir(parents=True)
    names = layout.distinct_bases(*bases)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV encodes without the interpreter lock
        list(
            pool.map(
                lambda item: (folder / item[0]).write_bytes(jpeg_bytes(item[1])),
                _images(group, names),
            )
        )
    for path, content in _parameters(group, names):
        (folder / path).write_bytes(json_bytes(content))
    result = result_entry(group, bases, group_id)
    info = about | warning_field(group.warning) | result
    (folder / layout.INFO).write_bytes(json_bytes(info))
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """A complete group's entry of results.json."""
    content = json.loads((folder / layout.INFO).read_text(encoding="utf-8"))
    return {name: content[name] for name in RESULT}


def read_results(root: Path) -> list[dict[str, Any]]:
    """The entries of `root`/results.json; none where there is no such file."""
    path = root / layout.RESULTS
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def process_command(
    panoramas: Iterable[Path | str],
    options: Mapping[str, Any],
    output: str = "out",
    *more: str,
) -> str:
    """The command line that makes a group again; options as group_info.json holds them."""
    words = ["panotriton", "process", *map(str, panoramas)]
    for name, value in options.items():
        if value != "":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *more, "-o", output])


def _images(group: Group, names: tuple[str, str]) -> Iterator[tuple[str, U8]]:
    for pair in group.pairs:
        place = names[pair.panorama - 1], pair.interval
        if pair.image is not None:
            yield layout.pair(*place), pair.image
        yield layout.sharp_pair(*place), pair.sharp
    for interval in group.intervals:
        for name, sequence in zip(names, interval.sequences, strict=True):
            paths = _sequence_paths(name, interval.interval, len(sequence.images))
            yield from zip(paths, sequence.images, strict=True)
            for i, view in enumerate(sequence.crops or (), start=1):
                yield layout.between_view(name, interval.interval, i, sharp=False), view


def _sequence_paths(name: str, interval: int, count: int) -> list[str]:
    """Where the images of a sequence lie: left, the super-resolved views in between, right."""
    left, right = (layout.end_view(name, interval, side) for side in layout.SIDES)
    between = [layout.between_view(name, interval, i, sharp=True) for i in range(1, count - 1)]
    return [left, *between, right]


def _parameters(group: Group, names: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    first = group.pairs[:INTERVALS]
    yield layout.RIGHT_PARAMS, [asdict(p.right) for p in first]
    yield layout.LEFT_1_PARAMS, [asdict(p.left) for p in first]
    for pair in group.pairs:
        for side, camera in zip(layout.SIDES, (pair.left, pair.right), strict=True):
            yield layout.params(names[pair.panorama - 1], pair.interval, side), asdict(camera)
    for interval in group.intervals:
        place = names[1], interval.interval
        yield (
            layout.description(*place),
            {
                "image_path": layout.end_view(*place, "right"),
                "description": interval.description,
                "error": interval.description_error or None,
            },
        )


def result_entry(group: Group, bases: tuple[str, str], group_id: int) -> dict[str, Any]:
    """A group's entry of results.json; paths are relative to its folder, NaN scores are null."""
    names = layout.distinct_bases(*bases)
    content = (
        group_id,
        list(group.kept),
        [_score(pair) for pair in group.pairs],
        [_interval(interval, names) for interval in group.intervals],
    )
    return dict(zip(RESULT, content, strict=True))


def _score(pair: Pair) -> dict[str, Any]:
    scores = {name: finite_or_none(score) for name, score in asdict(pair.quality).items()}
    return {"panorama": pair.panorama, "interval": pair.interval, **scores, "raw": pair.raw}


def _interval(interval: Interval, names: tuple[str, str]) -> dict[str, Any]:
    return {
        "interval": interval.interval,
        "yaw_interval": list(interval.yaw_bounds),
        "description": interval.description,
        "description_error": interval.description_error or None,
        "sequences": [
            {"panorama": p, "images": _views(name, interval.interval, sequence)}
            for p, (name, sequence) in enumerate(
                zip(names, interval.sequences, strict=True), start=1
            )
        ],
    }


def _views(name: str, interval: int, sequence: Sequence) -> list[dict[str, Any]]:
    views = zip(
        _sequence_paths(name, interval, len(sequence.images)), sequence.cameras, strict=True
    )
    return [
        {"path": path, "weight_idx": index, "params": asdict(camera)}
        for index, (path, camera) in enumerate(views)
    ]


def _add_result(root: Path, result: dict[str, Any]) -> None:
    others = [entry for entry in read_results(root) if entry["group_id"] != result["group_id"]]
    entries = sorted([*others, result], key=lambda entry: int(entry["group_id"]))
    with atomic(root / layout.RESULTS) as part:
        part.write_bytes(json_bytes(entries))


def jpeg_bytes(image: U8) -> bytes:
    """An RGB image (H, W, 3) as the JPEG that groups hold."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise OSError(f"OpenCV cannot encode an image of shape {image.shape}")
    return bytes(data)
