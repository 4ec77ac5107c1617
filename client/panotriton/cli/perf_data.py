"""`panotriton perf-data`: input data for perf_analyzer from real images."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from panotriton.cli.connection import add_option, command
from panotriton.cli.places import check_file
from panotriton.client import calls
from panotriton.client.pixels import Images, file_bytes, pixels
from panotriton.errors import InvalidInput
from panotriton.pipeline.camera import Camera, sample_cameras
from panotriton.pipeline.contract import DEFAULTS, Options

Inputs = Mapping[str, Any]


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = command(
        commands,
        "perf-data",
        "write input data for perf_analyzer",
        "Write real, distinct requests as the JSON that perf_analyzer takes. Its own random data is one "
        "tensor sent over and over: always a hit where a cache is on.",
        "  panotriton perf-data osediff photo.jpg other.jpg -o osediff.json\n"
        "  perf_analyzer -m osediff -i grpc --input-data osediff.json --shape IMAGES:1,512,512,3\n"
        "  panotriton perf-data panorama_encoded a.jpg b.jpg c.jpg -o panorama.json --count 8\n",
    )
    parser.add_argument(
        "model", choices=sorted(_REQUESTS), metavar="MODEL", help="any of %(choices)s"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="used in turn")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="JSON file"
    )
    parser.add_argument(
        "--count", type=int, default=0, metavar="N", help="requests (one per image)"
    )
    add_option(parser, "crop_size", "side in px")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the file."""
    count = options.count or len(options.images)
    if count < 1:
        raise InvalidInput(f"--count is {count}; expected 1 or more")
    check_file(options.output, makes_folder=True)
    make = _REQUESTS[options.model]
    data = [_entry(make(options.images, i, options.crop_size)) for i in range(count)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"data": data}))
    size = options.output.stat().st_size
    print(f"{count} requests to {options.model} → {options.output}, {size / 1e6:.1f} MB")
    return 0


def _entry(inputs: Inputs) -> dict[str, Any]:
    return {name: {"content": c, "shape": shape} for name, c, shape in _tensors(inputs)}


def _tensors(inputs: Inputs) -> Iterator[tuple[str, Any, list[int]]]:
    for name, value in inputs.items():
        array = value.joined() if isinstance(value, Images) else value
        yield name, {"b64": base64.b64encode(_raw(array)).decode()}, list(array.shape)


def _raw(array: np.ndarray[Any, Any]) -> bytes:
    """A tensor's bytes as the protocol has them: strings with their length before them, 4 bytes."""
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in array.flat)


def _two(paths: list[Path], i: int) -> tuple[Path, Path]:
    return paths[i % len(paths)], paths[(i + 1) % len(paths)]


def _panorama(paths: list[Path], i: int, size: int) -> Inputs:
    images = [pixels(str(path), path) for path in _two(paths, i)]
    return _group(*images, seed=i, size=size)


def _panorama_encoded(paths: list[Path], i: int, size: int) -> Inputs:
    return _group(*_two(paths, i), seed=i, size=size)


def _group(one: Any, two: Any, *, seed: int, size: int) -> Inputs:
    options = Options(crop_size=size)
    call = calls.process(one, two, seed=seed, cameras=None, options=options, intermediates=False)
    return call.inputs


def _preprocess(paths: list[Path], i: int, size: int) -> Inputs:
    return {
        name: value
        for name, value in _panorama(paths, i, size).items()
        if name in ("PANORAMA_1", "PANORAMA_2", "SEED", "CROP_SIZE")
    }


def _crop(paths: list[Path], i: int, size: int) -> Inputs:
    rows = sample_cameras(i)[0].reshape(-1, 5)
    cameras = [Camera.from_array(row) for row in rows]
    (call,) = calls.crop(paths[i % len(paths)], cameras, size=size).calls
    return call.inputs


def _osediff(paths: list[Path], i: int, size: int) -> Inputs:
    image = [paths[i % len(paths)]]
    (call,) = calls.upscale(image, options=DEFAULTS).calls
    return call.inputs


def _qwen(paths: list[Path], i: int, size: int) -> Inputs:
    (call,) = calls.score([paths[i % len(paths)]]).calls
    return call.inputs


_REQUESTS: dict[str, Callable[[list[Path], int, int], Inputs]] = {
    "crop": _crop,
    "decode": lambda paths, i, size: {"ENCODED": file_bytes(paths[i % len(paths)])},
    "osediff": _osediff,
    "panorama": _panorama,
    "panorama_encoded": _panorama_encoded,
    "panorama_stream": _panorama_encoded,
    "preprocess": _preprocess,
    "qwen_describer": _qwen,
    "qwen_scorer": _qwen,
}
