"""Super-resolution: `/super_resolution_batch` by paths, `/super_resolution_tensor` by tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from panotriton.client import calls
from panotriton.client.calls import Failure
from panotriton.client.pixels import Images
from panotriton.errors import InvalidInput, quoted
from panotriton.groups import layout
from panotriton.pipeline.contract import (
    ALIGNMENTS,
    DEFAULTS,
    MAX_PROMPT_CHARACTERS,
    MAX_UPSCALE,
    MIN_SR_SIDE_PX,
    Alignment,
    Options,
)
from panotriton.pipeline.images import decode_image
from panotriton.pipeline.results import Upscaled, warning
from panotriton.web.gateway import triton
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.context import Context
from panotriton.web.gateway.docs import FAILURES, tensor_endpoint, tensor_reply
from panotriton.web.gateway.failures import ForbiddenPath, Reply
from panotriton.web.gateway.files import check_name, write_images
from panotriton.web.gateway.portions import Image, Portions
from panotriton.web.gateway.schemas import SuperResolutionReply, SuperResolutionRequest
from panotriton.web.gateway.tensors import Incoming, TensorOptions, answer

__all__ = ["router"]

_LOG = logging.getLogger(__name__)
_DECODE = partial(decode_image, min_side_px=MIN_SR_SIDE_PX)

_MOST_AT_ONCE = 16  # as many as a group has pairs: full batches of tiles, and results soon on disk


class SuperResolutionOptions(TensorOptions):
    align_method: Alignment = "adain"
    upscale: Annotated[int, Field(ge=1, le=MAX_UPSCALE)] = DEFAULTS.upscale
    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)


def router(context: Context) -> APIRouter:
    """The endpoints of port 5001."""
    routes = APIRouter()

    @routes.post("/super_resolution_batch", response_model=SuperResolutionReply, responses=FAILURES)
    async def super_resolution_batch(request: SuperResolutionRequest) -> Response:
        """Sharpen images; images of one size go to the model together. A bad one fails alone."""
        portions = context.portions("super_resolution_batch")
        return Reply(await context.run(partial(_sharpen_files, portions), request))

    @routes.post(
        "/super_resolution_tensor",
        openapi_extra=tensor_endpoint(SuperResolutionOptions),
        responses=tensor_reply(
            "`upscale` times the size, sides a multiple of 8.",
            "As the request's.",
            warning="Present where the prompt is longer than the network reads: what it left out.",
        ),
    )
    async def super_resolution_tensor(request: Request) -> Response:
        """Sharpen one image or a batch of one size, at least 8 px a side."""
        return await context.run_tensor(
            _sharpen_tensor, request, SuperResolutionOptions, MIN_SR_SIDE_PX
        )

    return routes


def _sharpen_files(
    portions: Portions, context: Context, client: Connection, request: SuperResolutionRequest
) -> Any:
    align, told = _alignment(request.align_method)
    folder = _folder(context, request)
    targets = _targets(context, folder, request)
    entries = zip(targets, request.input_paths, strict=True)
    paths = {target: path for target, path in entries if isinstance(target, Path)}
    if paths:
        context.roots.make(folder)  # before any work: there may be a file in its place
    plan = partial(calls.upscale, options=Options(upscale=context.settings.upscale, align=align))
    waiting = iter(paths)

    def sharpen(images: list[Image]) -> list[Path | Failure]:
        made: list[Upscaled | Failure] = triton.each(client, images, plan)
        outcomes = list(zip(islice(waiting, len(made)), made, strict=True))
        good = [(path, sharp.numpy()) for path, sharp in outcomes if isinstance(sharp, Upscaled)]
        write_images(context.roots, good, context.settings.jpeg_quality)
        return [path if isinstance(sharp, Upscaled) else sharp for path, sharp in outcomes]

    sources = list(paths.values())
    made = portions.outcomes(context.roots, sources, _MOST_AT_ONCE, _DECODE, sharpen)
    found = dict(zip(paths, made, strict=True))
    results = [_result(found[t] if isinstance(t, Path) else t) for t in targets]
    return {"success": True, "results": results} | told


def _alignment(asked: object) -> tuple[str, dict[str, str]]:
    """The alignment, and for the reply what was asked in vain."""
    if isinstance(asked, str) and asked in ALIGNMENTS:
        return asked, {}
    names = ", ".join(ALIGNMENTS)
    return "nofix", {
        "warning": f"align_method is {quoted(asked)}; expected one of {names}: took nofix"
    }


def _folder(context: Context, request: SuperResolutionRequest) -> Path:
    output = request.output_dir or str(context.settings.output)
    return context.roots.absolute(output) / layout.SHARP


def _targets(
    context: Context, folder: Path, request: SuperResolutionRequest
) -> list[Path | InvalidInput]:
    """Where each result goes, or why it cannot: `output_dir`/osediff/`the same name`."""
    # An entry that is malformed is what is wrong with it.
    entries: Sequence[str | InvalidInput] = request.input_paths
    taken: dict[Path, Path] = {}  # result → the image that it is of
    return [
        entry if isinstance(entry, InvalidInput) else _target(context, folder, entry, taken)
        for entry in entries
    ]


def _target(
    context: Context, folder: Path, path: str, taken: dict[Path, Path]
) -> Path | InvalidInput:
    target = folder / Path(path).name
    try:
        image = context.roots.check(path)
        check_name(target)
    except ForbiddenPath:
        raise
    except InvalidInput as error:
        return error
    if taken.setdefault(target, image) != image:
        return InvalidInput(
            f"{target.name} is the name of another image of this request; expected distinct names, "
            "since results keep them: send it in a request of its own, with another output_dir"
        )
    return target


def _result(outcome: Path | Failure) -> dict[str, Any]:
    if isinstance(outcome, Failure):
        return {"success": False, "output_path": None, "error": str(outcome)}
    return {"success": True, "output_path": str(outcome)}


def _sharpen_tensor(
    context: Context, client: Connection, incoming: Incoming[SuperResolutionOptions]
) -> Response:
    asked = incoming.options
    options = Options(upscale=asked.upscale, align=asked.align_method, prompt=asked.prompt)
    plan = calls.upscale(Images((incoming.images,), alone=True), options=options)
    made = triton.tensors(client, plan)
    if told := warning(made):
        _LOG.warning("super_resolution_tensor: %s", told)
    return answer(incoming, made["IMAGES_SR"], warning=told, batch=False)
