"""Scores and descriptions: `/evaluate_pairs` and `/generate_descriptions`, by paths and by tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from panotriton.client import calls
from panotriton.client.calls import Failure
from panotriton.client.pixels import Images
from panotriton.errors import InvalidInput
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import MAX_QWEN_ASPECT, MAX_QWEN_IMAGES, MIN_QWEN_SIDE_PX
from panotriton.pipeline.images import decode_image
from panotriton.pipeline.quality import SUB_SCORES, finite_or_none
from panotriton.pipeline.results import Description, Score
from panotriton.web.gateway import triton
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.context import Context
from panotriton.web.gateway.docs import FAILURES, tensor_endpoint
from panotriton.web.gateway.failures import Reply
from panotriton.web.gateway.portions import Portions
from panotriton.web.gateway.schemas import (
    DescribeReply,
    DescribeRequest,
    DescribeTensorReply,
    EvaluateReply,
    EvaluateRequest,
    EvaluateTensorReply,
    PairEntry,
)
from panotriton.web.gateway.tensors import Incoming, TensorOptions

__all__ = ["router"]

_DECODE = partial(decode_image, min_side_px=MIN_QWEN_SIDE_PX, max_aspect=MAX_QWEN_ASPECT)


class ScoreOptions(TensorOptions):
    pass


def router(context: Context) -> APIRouter:
    """The endpoints of port 5002."""
    routes = APIRouter()

    @routes.post("/evaluate_pairs", response_model=EvaluateReply, responses=FAILURES)
    async def evaluate_pairs(request: EvaluateRequest) -> Response:
        """Score pair images. A bad one fails alone and says so in its entry."""
        portions = context.portions("evaluate_pairs")
        return Reply(await context.run(partial(_score_files, portions), request))

    @routes.post("/generate_descriptions", response_model=DescribeReply, responses=FAILURES)
    async def generate_descriptions(request: DescribeRequest) -> Response:
        """Describe images in two or three sentences. A bad one fails alone."""
        portions = context.portions("generate_descriptions")
        return Reply(await context.run(partial(_describe_files, portions), request))

    @routes.post(
        "/evaluate_pairs_tensor",
        openapi_extra=tensor_endpoint(ScoreOptions),
        response_model=EvaluateTensorReply,
        responses=FAILURES,
    )
    async def evaluate_pairs_tensor(request: Request) -> Response:
        """Score pairs (left | right) of one size, at least 28 px a side. The reply is always JSON."""
        return await context.run_tensor(_score_tensor, request, ScoreOptions, MIN_QWEN_SIDE_PX)

    @routes.post(
        "/generate_descriptions_tensor",
        openapi_extra=tensor_endpoint(ScoreOptions),
        response_model=DescribeTensorReply,
        responses=FAILURES,
    )
    async def generate_descriptions_tensor(request: Request) -> Response:
        """Describe images of one size, at least 28 px a side. The reply is always JSON."""
        return await context.run_tensor(_describe_tensor, request, ScoreOptions, MIN_QWEN_SIDE_PX)

    return routes


def _score_files(
    portions: Portions, context: Context, client: Connection, request: EvaluateRequest
) -> Any:
    # An entry that is malformed is what is wrong with it.
    pairs: Sequence[PairEntry | InvalidInput] = request.pairs_data
    paths = [_pair_path(pair) for pair in pairs]
    scores: list[Score | Failure] = portions.outcomes(
        *(context.roots, paths, MAX_QWEN_IMAGES, _DECODE),
        lambda images: triton.each(client, images, calls.score),
    )
    entries = zip(pairs, map(_shown, paths), scores, strict=True)
    return {"success": True, "results": [_scored(*entry) for entry in entries]}


def _pair_path(pair: PairEntry | InvalidInput) -> str | InvalidInput:
    if isinstance(pair, InvalidInput):
        return pair
    missing = InvalidInput("pair_image is missing; expected the path of a pair image")
    return pair.pair_image or pair.super_resolved or missing


def _shown(path: str | InvalidInput) -> str:
    return path if isinstance(path, str) else ""


def _scored(pair: PairEntry | InvalidInput, path: str, score: Score | Failure) -> dict[str, Any]:
    if isinstance(score, Failure) or isinstance(pair, InvalidInput):
        # Without its interval: a caller's filter then leaves it out instead of keeping it unscored.
        return {"success": False, "error": str(score), "image_path": path}
    echo = pair.model_dump(include={"interval", "main_params", "rand_params", "yaw_interval"})
    final = finite_or_none(score.final)
    return {"pair_image": path, "final_score": None if final is None else str(final)} | echo


def _describe_files(
    portions: Portions, context: Context, client: Connection, request: DescribeRequest
) -> Any:
    paths: Sequence[str | InvalidInput] = request.image_paths
    descriptions: list[Description | Failure] = portions.outcomes(
        *(context.roots, paths, MAX_QWEN_IMAGES, _DECODE),
        lambda images: triton.each(client, images, calls.describe),
    )
    now = time.time()
    pairs = zip(map(_shown, paths), descriptions, strict=True)
    return {
        "success": True,
        "results": [
            {"image_path": path, "timestamp": now} | _described(description)
            for path, description in pairs
        ],
    }


def _described(description: Description | Failure) -> dict[str, str]:
    if isinstance(description, Failure):
        return {"description": "", "error": str(description)}
    error = {"error": description.error} if description.error else {}
    return {"description": description.text} | error


def _score_tensor(
    context: Context, client: Connection, incoming: Incoming[ScoreOptions]
) -> Response:
    check_images("tensor", incoming.images, MIN_QWEN_SIDE_PX, MAX_QWEN_ASPECT)
    scores = triton.together(client, calls.score(Images((incoming.images,), alone=True)))
    return Reply({"success": True, "results": [_numbers(score) for score in scores]})


def _numbers(score: Score) -> dict[str, Any]:
    numbers = {name: getattr(score, name) for name in SUB_SCORES} | {"final_score": score.final}
    finite = {name: finite_or_none(number) for name, number in numbers.items()}
    return finite | {"raw_output": score.raw}


def _describe_tensor(
    context: Context, client: Connection, incoming: Incoming[ScoreOptions]
) -> Response:
    check_images("tensor", incoming.images, MIN_QWEN_SIDE_PX, MAX_QWEN_ASPECT)
    found = triton.together(client, calls.describe(Images((incoming.images,), alone=True)))
    return Reply({"success": True, "results": [_described(description) for description in found]})
