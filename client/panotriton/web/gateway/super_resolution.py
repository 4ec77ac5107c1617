"""Super-resolution: `/super_resolution_batch` by paths, `/super_resolution_tensor` by tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from panotriton.client import calls
from panotriton.client.calls import Failure
from panotriton.client.pixels import Images
from panotriton.errors import InvalidInput
from panotriton.groups import layout
from panotriton.pipeline.contract import DEFAULTS, MAX_UPSCALE, MIN_SR_SIDE_PX, Alignment, Options
from panotriton.pipeline.results import Upscaled
from panotriton.web.gateway import triton
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.context import Context
from panotriton.web.gateway.docs import FAILURES, tensor_endpoint, tensor_reply
from panotriton.web.gateway.failures import Reply
from panotriton.web.gateway.files import check_name, read_images, write_images
from panotriton.web.gateway.schemas import SuperResolutionReply, SuperResolutionRequest
from panotriton.web.gateway.tensors import Incoming, TensorOptions, answer

__all__ = ["router"]


class SuperResolutionOptions(TensorOptions):
    align_method: Alignment = "adain"
    upscale: Annotated[int, Field(ge=1, le=MAX_UPSCALE)] = DEFAULTS.upscale
    prompt: str = Field("", max_length=4096)


def router(context: Context) -> APIRouter:
    """The endpoints of port 5001."""
    routes = APIRouter()

    @routes.post("/super_resolution_batch", response_model=SuperResolutionReply, responses=FAILURES)
    async def super_resolution_batch(request: SuperResolutionRequest) -> Response:
        """Sharpen images; images of one size go to the model together. A bad one fails alone."""
        return Reply(await context.run(_sharpen_files, request))

    @routes.post(
        "/super_resolution_tensor",
        openapi_extra=tensor_endpoint(SuperResolutionOptions),
        responses=tensor_reply(
            "`upscale` times the size, sides a multiple of 8.", "As the request's."
        ),
    )
    async def super_resolution_tensor(request: Request) -> Response:
        """Sharpen one image or a batch of one size, at least 8 px a side."""
        return await context.run_tensor(
            _sharpen_tensor, request, SuperResolutionOptions, MIN_SR_SIDE_PX
        )

    return routes


def _sharpen_files(context: Context, client: Connection, request: SuperResolutionRequest) -> Any:
    targets = _targets(context, request)
    loaded = read_images(context.roots, request.input_paths)
    images = [
        image if isinstance(target, Path) else target
        for image, target in zip(loaded, targets, strict=True)
    ]
    options = Options(upscale=context.settings.upscale, align=request.align_method)
    plan = partial(calls.upscale, options=options)
    results: list[Upscaled | Failure] = triton.each(client, images, plan)
    outcomes = list(zip(targets, results, strict=True))
    good = [(t, s.numpy()) for t, s in outcomes if isinstance(t, Path) and isinstance(s, Upscaled)]
    write_images(context.roots, good)
    return {"success": True, "results": [_result(*outcome) for outcome in outcomes]}


def _targets(context: Context, request: SuperResolutionRequest) -> list[Path | InvalidInput]:
    """Where each result goes, or why it cannot: `output_dir`/osediff/`the same name`."""
    output = request.output_dir or str(context.settings.output)
    folder = context.roots.absolute(output) / layout.SHARP
    taken: set[Path] = set()
    return [_target(folder / Path(path).name, taken) for path in request.input_paths]


def _target(target: Path, taken: set[Path]) -> Path | InvalidInput:
    try:
        check_name(target)
    except InvalidInput as error:
        return error
    if target in taken:
        return InvalidInput(
            f"{target.name} is the name of another image of this request; expected distinct names, "
            "since results keep them: send it in a request of its own, with another output_dir"
        )
    taken.add(target)
    return target


def _result(target: Path | InvalidInput, outcome: object) -> dict[str, Any]:
    if isinstance(outcome, Failure):
        return {"success": False, "output_path": None, "error": str(outcome)}
    return {"success": True, "output_path": str(target)}


def _sharpen_tensor(
    context: Context, client: Connection, incoming: Incoming[SuperResolutionOptions]
) -> Response:
    asked = incoming.options
    options = Options(upscale=asked.upscale, align=asked.align_method, prompt=asked.prompt)
    plan = calls.upscale(Images((incoming.images,), alone=True), options=options)
    return answer(incoming, triton.tensor(client, plan, "IMAGES_SR"), batch=False)
