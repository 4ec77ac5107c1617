"""In-between views: `/generate_interpolated_images` by paths, `/interpolate_tensor` by tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import Field

from panotriton.errors import InvalidInput, brief, quoted
from panotriton.groups import layout
from panotriton.pipeline.contract import (
    CROP_SIZES,
    DEFAULTS,
    INTERVALS,
    MAX_INTERPOLATIONS,
    MAX_PIXELS,
    MIN_SIDE_PX,
)
from panotriton.web.gateway import triton
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.context import Context
from panotriton.web.gateway.docs import FAILURES, tensor_endpoint, tensor_reply
from panotriton.web.gateway.failures import ForbiddenPath, Reply
from panotriton.web.gateway.files import read_image, write_images
from panotriton.web.gateway.groups import camera_row, params
from panotriton.web.gateway.preprocess import check_panoramas
from panotriton.web.gateway.schemas import InterpolateReply, InterpolateRequest, SplitEntry
from panotriton.web.gateway.tensors import CameraOptions, Incoming, answer

__all__ = ["InterpolateOptions", "router"]

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


class InterpolateOptions(CameraOptions):
    num_interpolations: int = Field(DEFAULTS.interpolations, ge=0, le=MAX_INTERPOLATIONS)
    crop_size: int | None = Field(None, ge=CROP_SIZES[0], le=CROP_SIZES[1])


def router(context: Context) -> APIRouter:
    """The endpoints of port 5000 that make in-between views."""
    routes = APIRouter()

    @routes.post(
        "/generate_interpolated_images", response_model=InterpolateReply, responses=FAILURES
    )
    async def generate_interpolated_images(request: InterpolateRequest) -> Response:
        """Crop the views between each entry's cameras into the group's interpolated/."""
        return Reply(await context.run(_interpolate_files, request))

    @routes.post(
        "/interpolate_tensor",
        openapi_extra=tensor_endpoint(InterpolateOptions),
        responses=tensor_reply(
            "K·P·num_interpolations views of crop_size: interval by interval, then panorama, then "
            "weight i/(N+1).",
            "NHWC or NCHW.",
            cameras="(K, P, N, 5) of the views. Not in .npy replies.",
        ),
    )
    async def interpolate_tensor(request: Request) -> Response:
        """Views of one panorama or of two of one size, between `cameras` (P, K ≤ 8, left|right, 5)."""
        return await context.run_tensor(
            _interpolate_tensor, request, InterpolateOptions, MIN_SIDE_PX
        )

    return routes


@dataclass(frozen=True, slots=True)
class _Split:
    """A good entry of the request: which panorama it is of (0 or 1), and the left view, no suffix."""

    entry: SplitEntry
    panorama: int
    left: Path


Views = list[dict[str, Any]]


def _interpolate_files(context: Context, client: Connection, request: InterpolateRequest) -> Any:
    paths = (request.panorama1_path, request.panorama2_path)
    bases = [Path(path).stem for path in paths]
    if bases[0] == bases[1]:
        raise InvalidInput(
            f"both panoramas are called {brief(bases[0])}; expected different names, since the entries' file "
            "names tell which one they are of: rename or copy one"
        )
    splits, errors = _splits(context, request, bases)
    panoramas = [read_image(context.roots, path) for path in paths]
    views: dict[int, Views] = {}
    for indices, ends in _requests(context, request, splits):
        count, size = request.num_interpolations, context.settings.crop_size
        crops, cameras = triton.interpolate(client, panoramas, ends, count, size)
        for p, column in enumerate(indices):
            for k, index in enumerate(column):
                views[index] = _write(context, splits[index].left, crops[k, p], cameras[k, p])
    results = [
        _failed(entry, errors[i]) if i in errors else _result(splits[i], views[i])
        for i, entry in enumerate(request.split_results)
    ]
    return {"success": True, "results": results}


def _splits(
    context: Context, request: InterpolateRequest, bases: Sequence[str]
) -> tuple[dict[int, _Split], dict[int, str]]:
    """The good entries by index, and what is wrong with the others."""
    folder = context.groups.folder(request.group_id)
    # An entry that is malformed is what is wrong with it.
    entries: Sequence[SplitEntry | InvalidInput] = request.split_results
    splits, errors = {}, {}
    for index, entry in enumerate(entries):
        try:
            if isinstance(entry, InvalidInput):
                raise entry
            splits[index] = _split(context, entry, bases, folder)
        except ForbiddenPath:
            raise
        except InvalidInput as error:
            errors[index] = str(error)
    return splits, errors


def _split(context: Context, entry: SplitEntry, bases: Sequence[str], folder: Path) -> _Split:
    stem = Path(entry.pair_image or entry.left_image).stem
    holders = [p for p, base in enumerate(bases) if stem.startswith(layout.base_prefix(base))]
    if not holders:
        raise InvalidInput(
            f"pair_image {quoted(entry.pair_image)} is of neither panorama; expected a name that starts with "
            f"{' or '.join(brief(layout.base_prefix(base)) for base in bases)}"
        )
    # As the file-path services found it: in the path of the split image.
    group = layout.enclosing_group(entry.left_image)
    folder = context.roots.absolute(group) if group else folder
    # a and a_yaw_b both begin a_yaw_b_yaw01: the longer name is meant.
    panorama = max(holders, key=lambda p: len(bases[p]))
    left = Path(entry.left_image).stem or layout.end_name(stem, "left")
    return _Split(entry, panorama, folder / layout.INTERPOLATED / left)


def _requests(
    context: Context, request: InterpolateRequest, splits: Mapping[int, _Split]
) -> Iterator[tuple[list[list[int]], F64]]:
    """As many entries at once as fit: their indices by panorama, and their cameras (2, K, 2, 5)."""
    columns = [[i for i, split in splits.items() if split.panorama == p] for p in range(2)]
    step = _most_intervals(request.num_interpolations, context.settings.crop_size)
    for start in range(0, max(map(len, columns)), step):
        indices = [column[start : start + step] for column in columns]
        yield indices, _ends([[splits[i].entry for i in column] for column in indices])


def _most_intervals(count: int, crop_size: int) -> int:
    """How many intervals of two panoramas with `count` views each make one request: 1 to 8."""
    pixels = 2 * max(count, 1) * crop_size * crop_size
    return min(max(MAX_PIXELS // pixels, 1), INTERVALS)


def _ends(columns: Sequence[Sequence[SplitEntry]]) -> F64:
    """The left and right cameras; a panorama with fewer entries borrows the rest from the other."""
    longest = max(columns, key=len)
    rows = [[*column, *longest[len(column) :]] for column in columns]
    return np.array([[_pair(entry) for entry in row] for row in rows])


def _pair(entry: SplitEntry) -> list[F64]:
    return [camera_row(end.model_dump()) for end in (entry.main_params, entry.rand_params)]


def _write(context: Context, left: Path, crops: U8, cameras: F64) -> Views:
    """Write one entry's views (N, S, S, 3); returns what the reply says of them."""
    names = [layout.between_name(left.name, i) for i in range(1, len(crops) + 1)]
    paths = [left.with_name(f"{name}.jpg") for name in names]
    write_images(context.roots, zip(paths, crops, strict=True), context.settings.jpeg_quality)
    return [
        {"path": str(path), "weight_idx": i, "params": params(row)}
        for i, (path, row) in enumerate(zip(paths, cameras, strict=True), start=1)
    ]


def _result(split: _Split, views: Views) -> dict[str, Any]:
    facts = {"panorama": f"panorama{split.panorama + 1}", "interpolated_images": views}
    return _echo(split.entry) | facts | {"success": True}


def _failed(entry: SplitEntry | InvalidInput, error: str) -> dict[str, Any]:
    echo = dict.fromkeys(_ECHOED) if isinstance(entry, InvalidInput) else _echo(entry)
    return echo | {"panorama": None, "interpolated_images": [], "success": False, "error": error}


_ECHOED = ("interval", "main_params", "rand_params")


def _echo(entry: SplitEntry) -> dict[str, Any]:
    return entry.model_dump(include=set(_ECHOED))


def _interpolate_tensor(
    context: Context, client: Connection, incoming: Incoming[InterpolateOptions]
) -> Response:
    options = incoming.options
    crop_size = options.crop_size or context.settings.crop_size
    ends = options.camera_array()  # (P, K, 2, 5)
    if len(ends) != check_panoramas(incoming.images):
        raise InvalidInput(
            f"cameras are of {len(ends)} panoramas; expected {len(incoming.images)}, one set each"
        )
    most = _most_intervals(options.num_interpolations, crop_size)
    if ends.shape[1] > most:
        raise InvalidInput(
            f"cameras ask for {ends.shape[1]} intervals; expected at most {most} with "
            f"{options.num_interpolations} views of {crop_size} px: ask for fewer at once"
        )
    views, cameras = triton.interpolate(
        client, list(incoming.images), ends, options.num_interpolations, crop_size
    )
    return answer(incoming, views.reshape(-1, *views.shape[3:]), cameras)
