"""Pairs of views: `/preprocess_for_group` by paths, `/preprocess_tensor` by tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import Field

from panotriton.errors import InvalidInput
from panotriton.groups import layout
from panotriton.pipeline.camera import interval_bounds, sample_cameras
from panotriton.pipeline.contract import CROP_SIZES, INTERVALS, MIN_SIDE_PX
from panotriton.web.gateway import triton
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.context import Context
from panotriton.web.gateway.docs import FAILURES, tensor_endpoint, tensor_reply
from panotriton.web.gateway.failures import Reply
from panotriton.web.gateway.files import read_image, write_images
from panotriton.web.gateway.groups import params
from panotriton.web.gateway.schemas import PreprocessReply, PreprocessRequest
from panotriton.web.gateway.tensors import CameraOptions, Incoming, answer

__all__ = ["PreprocessOptions", "check_panoramas", "router"]

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


class PreprocessOptions(CameraOptions):
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Draws the cameras; 0 by default.")
    is_first: bool = Field(
        True, description="Whether a lone panorama gets the first or the second one's cameras."
    )
    crop_size: int | None = Field(None, ge=CROP_SIZES[0], le=CROP_SIZES[1])


def router(context: Context) -> APIRouter:
    """The endpoints of port 5000 that make pairs."""
    routes = APIRouter()

    @routes.post("/preprocess_for_group", response_model=PreprocessReply, responses=FAILURES)
    async def preprocess_for_group(request: PreprocessRequest) -> Response:
        """Crop a panorama's eight pair images into the group's folder, pairs/ and params/."""
        return Reply(await context.run(_crop_file, request))

    @routes.post(
        "/preprocess_tensor",
        openapi_extra=tensor_endpoint(PreprocessOptions),
        responses=tensor_reply(
            "8 pairs per panorama, left view | right view: crop_size × 2·crop_size.",
            "NHWC or NCHW.",
            cameras="(P, 8, left|right, 5), as given or drawn. Not in .npy replies.",
        ),
    )
    async def preprocess_tensor(request: Request) -> Response:
        """Crop the pair images of one panorama or of two of one size, at least 64 px a side."""
        return await context.run_tensor(_crop_tensor, request, PreprocessOptions, MIN_SIDE_PX)

    return routes


def _crop_file(context: Context, client: Connection, request: PreprocessRequest) -> Any:
    groups, group_id = context.groups, request.group_id
    context.roots.check(request.image_path)
    groups.make_folder(
        group_id
    )  # first: where the panorama is no good, the client says so in there
    panorama = read_image(context.roots, request.image_path)
    base = Path(request.image_path).stem
    cameras = (
        groups.first_cameras(group_id)
        if request.is_first
        else groups.second_cameras(group_id, base)
    )
    pairs = triton.preprocess(client, [panorama], cameras[None], context.settings.crop_size)
    if request.is_first:  # not before: the second would take a first that failed for done
        groups.keep_cameras(group_id, cameras)
    folder = groups.folder(group_id)
    paths = [folder / layout.pair(base, interval) for interval in range(1, INTERVALS + 1)]
    write_images(context.roots, zip(paths, pairs, strict=True), context.settings.jpeg_quality)
    files = groups.write_params(group_id, base, cameras)
    return {"success": True, "results": _pairs(group_id, cameras, paths, files)}


def _pairs(
    group_id: int, cameras: F64, paths: Sequence[Path], files: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    return [
        {
            "pair_image": str(paths[k]),
            "main_params": params(cameras[k, 0]),
            "rand_params": params(cameras[k, 1]),
            "main_params_file": files[k][0],
            "rand_params_file": files[k][1],
            "interval": k + 1,
            "yaw_interval": [int(bound) for bound in interval_bounds(k + 1)],
            "group_id": group_id,
        }
        for k in range(INTERVALS)
    ]


def _crop_tensor(
    context: Context, client: Connection, incoming: Incoming[PreprocessOptions]
) -> Response:
    options = incoming.options
    cameras = _cameras(options, check_panoramas(incoming.images))
    crop_size = options.crop_size or context.settings.crop_size
    pairs = triton.preprocess(client, list(incoming.images), cameras, crop_size)
    return answer(incoming, pairs, cameras)


def check_panoramas(images: U8) -> int:
    """How many panoramas there are; raises InvalidInput unless one or two."""
    if len(images) not in (1, 2):
        raise InvalidInput(f"tensor holds {len(images)} panoramas; expected 1 or 2")
    return len(images)


def _cameras(options: PreprocessOptions, count: int) -> F64:
    """The cameras (count, 8, 2, 5) that were given or, from the seed, drawn."""
    if options.cameras is None:
        first = 0 if options.is_first or count == 2 else 1
        return sample_cameras(options.seed or 0)[first : first + count]
    if options.seed is not None:
        raise InvalidInput("seed and cameras are both given; expected one of them")
    cameras = options.camera_array()
    if cameras.shape[:2] != (count, INTERVALS):
        raise InvalidInput(
            f"cameras have shape {cameras.shape}; expected ({count}, {INTERVALS}, 2, 5): panorama, "
            "interval, left|right, (yaw, pitch, roll, vfov, xi)"
        )
    return cameras
