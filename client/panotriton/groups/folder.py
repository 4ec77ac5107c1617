"""Groups as folders: `group_0001/` and one growing `results.json`, each file written atomically."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput, brief
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.results import Group, Interval, Pair

__all__ = [
    "base_name",
    "fill_group",
    "group_folder",
    "next_group_id",
    "process_command",
    "read_result",
    "write_group",
    "write_json",
]

JPEG_QUALITY = 95
_RESULT = ("group_id", "kept", "scores", "intervals")
_FOLDERS = ("pairs", "params", "osediff", "descriptions", "interpolated", "interpolated_sr")

# Of 255, less what the longest name adds: number, view and, while it is written, dot and process.
_MAX_BASE_BYTES = 255 - len("._1_yaw08_pair_left_interp_255.jpg.4194304")

U8 = NDArray[np.uint8]


def group_folder(root: Path, group_id: int) -> Path:
    """The folder of a group under the output root."""
    return root / f"group_{group_id:04d}"


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
    taken = [int(p.name[6:]) for p in root.glob("group_*") if p.name[6:].isdigit()]
    return max(taken, default=0) + 1


def write_group(
    group: Group, root: Path, group_id: int, bases: tuple[str, str], about: dict[str, Any]
) -> Path:
    """Write a group below `root` and add it to `root`/results.json; returns its folder.

    bases: what files of panorama 1 and 2 are named after; made distinct where they are equal.
    about: facts of the run (panoramas, options, versions, weights), kept in group_info.json. Images
    are JPEG. The folder appears when it is complete; one of the same number is replaced.
    """
    folder = group_folder(root, group_id)
    part = root / f".{folder.name}.{os.getpid()}"
    result = fill_group(group, part, group_id, bases, about)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    _add_result(root / "results.json", result)
    return folder


def fill_group(
    group: Group, folder: Path, group_id: int, bases: tuple[str, str], about: dict[str, Any]
) -> dict[str, Any]:
    """Write a group's files to `folder`, emptied first; returns the group's entry of results.json."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True)
    names = bases if bases[0] != bases[1] else (f"{bases[0]}_1", f"{bases[1]}_2")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV encodes without the interpreter lock
        list(pool.map(lambda item: _write_jpeg(folder / item[0], item[1]), _images(group, names)))
    for path, content in _parameters(group, names):
        write_json(folder / path, content)
    result = _result(group, names, group_id)
    write_json(folder / "group_info.json", about | result)
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """A complete group's entry of results.json."""
    content = json.loads((folder / "group_info.json").read_text(encoding="utf-8"))
    return {name: content[name] for name in _RESULT}


def process_command(
    panoramas: Sequence[Path], options: Mapping[str, Any], output: str = "out", *more: str
) -> str:
    """The command line that makes a group again; options as group_info.json holds them."""
    words = ["panotriton", "process", *map(str, panoramas)]
    for name, value in options.items():
        if value != "":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *more, "-o", output])


def _images(group: Group, names: tuple[str, str]) -> Iterator[tuple[str, U8]]:
    for pair in group.pairs:
        stem = _stem(names, pair)
        if pair.image is not None:
            yield f"pairs/{stem}.jpg", pair.image
        yield f"osediff/{stem}.jpg", pair.sharp
    for interval in group.intervals:
        for p, sequence in enumerate(interval.sequences):
            stem = _stem(names, group.pairs[p * 8 + interval.interval - 1])
            yield f"interpolated/{stem}_left.jpg", sequence.images[0]
            yield f"interpolated/{stem}_right.jpg", sequence.images[-1]
            for i, view in enumerate(sequence.images[1:-1], start=1):
                yield f"interpolated_sr/{stem}_left_interp_{i:02d}.jpg", view
            for i, view in enumerate(sequence.crops or (), start=1):
                yield f"interpolated/{stem}_left_interp_{i:02d}.jpg", view


def _parameters(group: Group, names: tuple[str, str]) -> Iterator[tuple[str, Any]]:
    first, second = group.pairs[:8], group.pairs[8:]
    yield "params/shared_right_params.json", [asdict(p.right) for p in first]
    yield "params/panorama1_left_params.json", [asdict(p.left) for p in first]
    for pair in (*first, *second):
        stem = _stem(names, pair).removesuffix("_pair")
        yield f"params/{stem}_left_params.json", asdict(pair.left)
        yield f"params/{stem}_right_params.json", asdict(pair.right)
    for interval in group.intervals:
        stem = _stem(names, second[interval.interval - 1])
        yield (
            f"descriptions/{stem}.json",
            {
                "image_path": f"interpolated/{stem}_right.jpg",
                "description": interval.description,
                "error": interval.description_error or None,
            },
        )


def _stem(names: tuple[str, str], pair: Pair) -> str:
    return f"{names[pair.panorama - 1]}_yaw{pair.interval:02d}_pair"


def _result(group: Group, names: tuple[str, str], group_id: int) -> dict[str, Any]:
    """One group's entry of results.json; paths are relative to its folder, NaN scores are null."""
    content = (
        group_id,
        list(group.kept),
        [_score(pair) for pair in group.pairs],
        [_interval(group, interval, names) for interval in group.intervals],
    )
    return dict(zip(_RESULT, content, strict=True))


def _score(pair: Pair) -> dict[str, Any]:
    scores = {k: v if np.isfinite(v) else None for k, v in asdict(pair.quality).items()}
    return {"panorama": pair.panorama, "interval": pair.interval, **scores, "raw": pair.raw_reply}


def _interval(group: Group, interval: Interval, names: tuple[str, str]) -> dict[str, Any]:
    return {
        "interval": interval.interval,
        "yaw_interval": list(interval.yaw_bounds),
        "description": interval.description,
        "description_error": interval.description_error or None,
        "sequences": [
            _sequence_entry(group, interval, p, names) for p in range(len(interval.sequences))
        ],
    }


def _sequence_entry(
    group: Group, interval: Interval, p: int, names: tuple[str, str]
) -> dict[str, Any]:
    stem = _stem(names, group.pairs[p * 8 + interval.interval - 1])
    cameras = interval.sequences[p].cameras
    middle = [f"interpolated_sr/{stem}_left_interp_{i:02d}.jpg" for i in range(1, len(cameras) - 1)]
    paths = [f"interpolated/{stem}_left.jpg", *middle, f"interpolated/{stem}_right.jpg"]
    views = zip(paths, cameras, strict=True)
    return {"panorama": p + 1, "images": [_view(i, *view) for i, view in enumerate(views)]}


def _view(index: int, path: str, camera: Camera) -> dict[str, Any]:
    return {"path": path, "weight_idx": index, "params": asdict(camera)}


def _add_result(path: Path, result: dict[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.exists() else []
    others = [entry for entry in results if entry["group_id"] != result["group_id"]]
    write_json(path, sorted([*others, result], key=lambda entry: int(entry["group_id"])))


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as JSON, atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # Of a name that is no UTF-8, Python's \udcff for the byte ff is JSON's escape as well.
    _replace(path, text.encode(errors="backslashreplace"))


def _write_jpeg(path: Path, image: U8) -> None:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise OSError(f"cannot encode {path}")
    _replace(path, data.tobytes())


def _replace(path: Path, data: bytes) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
