"""The JSON of the path endpoints, field by field as the file-path services had it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WrapValidator,
)

from panotriton.errors import InvalidInput
from panotriton.pipeline.camera import LIMITS
from panotriton.pipeline.contract import ALIGNMENTS, DEFAULTS, INTERVALS, MAX_INTERPOLATIONS
from panotriton.web.gateway.failures import describe

__all__ = [
    "CameraParams",
    "DescribeReply",
    "DescribeRequest",
    "DescribeTensorReply",
    "Error",
    "EvaluateReply",
    "EvaluateRequest",
    "EvaluateTensorReply",
    "Health",
    "InterpolateReply",
    "InterpolateRequest",
    "PairEntry",
    "PreprocessReply",
    "PreprocessRequest",
    "SplitEntry",
    "SuperResolutionReply",
    "SuperResolutionRequest",
]


def _finite(value: JsonValue) -> JsonValue:
    json.dumps(value, allow_nan=False)  # raises ValueError: it could not be sent back
    return value


T = TypeVar("T")

# All images of the largest group, both ends of its sequences included.
_MOST_ENTRIES = 2 * INTERVALS * (MAX_INTERPOLATIONS + 2)


def _each_alone(values: Any, validate: Callable[[Any], list[T]]) -> list[T | InvalidInput]:
    """What is wrong with a malformed entry in its place, so that it fails alone; one at least is good."""
    try:
        return list(validate(values))
    except ValidationError as error:
        wrong: dict[Any, InvalidInput] = {}
        for found in error.errors(include_url=False):
            index, *inner = found["loc"] or (None,)
            wrong.setdefault(index, InvalidInput(describe([found | {"loc": inner}], "the entry")))
        if None in wrong or len(wrong) == len(values):
            raise
    good = iter(validate([value for index, value in enumerate(values) if index not in wrong]))
    return [wrong[index] if index in wrong else next(good) for index in range(len(values))]


Entries = Annotated[
    list[T], Field(min_length=1, max_length=_MOST_ENTRIES), WrapValidator(_each_alone)
]
# What a caller passes along to find again in the reply.
Echo = Annotated[JsonValue, AfterValidator(_finite)]
FilePath = Annotated[
    str,
    Field(min_length=1, description="Below a root; a relative one starts where the gateway does."),
]
GroupId = Annotated[
    int,
    Field(
        ge=0,
        le=999_999_999,
        description='Folder group_0001 is 1. 4, 4.0 and "4" are all 4, in the reply, too.',
    ),
]


class CameraParams(BaseModel):
    """A camera, angles in degrees. What else it holds comes back as it came."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Echo]
    yaw: float = Field(ge=LIMITS["yaw"][0], le=LIMITS["yaw"][1])
    pitch: float = Field(ge=LIMITS["pitch"][0], le=LIMITS["pitch"][1])
    roll: float = Field(ge=LIMITS["roll"][0], le=LIMITS["roll"][1])
    vfov: float = Field(ge=LIMITS["vfov"][0], le=LIMITS["vfov"][1])
    xi: float = Field(ge=LIMITS["xi"][0], le=LIMITS["xi"][1])


class PreprocessRequest(BaseModel):
    image_path: FilePath
    group_id: GroupId
    is_first: bool = Field(
        True,
        description="The first panorama draws the group's cameras, the second takes them over.",
    )


class PairResult(BaseModel):
    pair_image: str
    main_params: CameraParams = Field(description="The left camera.")
    rand_params: CameraParams = Field(description="The right camera, the same for both panoramas.")
    main_params_file: str
    rand_params_file: str
    interval: int = Field(ge=1, le=8)
    yaw_interval: list[int] = Field(min_length=2, max_length=2)
    group_id: int


class PreprocessReply(BaseModel):
    success: bool
    results: list[PairResult]


class SplitEntry(BaseModel):
    """A pair that was split. Its file name tells the panorama, left_image where the views go."""

    pair_image: str = ""
    left_image: str = ""
    main_params: CameraParams
    rand_params: CameraParams
    interval: Echo = None


class InterpolateRequest(BaseModel):
    split_results: Entries[SplitEntry]
    panorama1_path: FilePath
    panorama2_path: FilePath
    group_id: GroupId
    num_interpolations: Annotated[int, AfterValidator(lambda count: max(count, 0))] = Field(
        DEFAULTS.interpolations, le=MAX_INTERPOLATIONS, description="Below 1: no views."
    )


class View(BaseModel):
    path: str
    weight_idx: int = Field(ge=1, description="i of the weight i/(N+1) of the right camera.")
    params: CameraParams


class InterpolateResult(BaseModel):
    panorama: Literal["panorama1", "panorama2"] | None
    interval: JsonValue
    interpolated_images: list[View]
    main_params: CameraParams | None
    rand_params: CameraParams | None
    success: bool
    error: str | None = Field(None, description="Present where success is false.")


class InterpolateReply(BaseModel):
    success: bool
    results: list[InterpolateResult]


class SuperResolutionRequest(BaseModel):
    input_paths: Entries[FilePath]
    output_dir: str | None = Field(
        None, description="Results go to its folder osediff. Left out: the gateway's output folder."
    )
    align_method: JsonValue = Field(
        DEFAULTS.align,
        description=f"{', '.join(ALIGNMENTS)}; anything else is nofix, and the reply has a warning.",
    )


class SuperResolutionResult(BaseModel):
    success: bool
    output_path: str | None
    error: str | None = Field(None, description="Present where success is false.")


class SuperResolutionReply(BaseModel):
    success: bool
    results: list[SuperResolutionResult]
    warning: str | None = Field(None, description="Present where align_method is none of ours.")


class PairEntry(BaseModel):
    pair_image: str | None = None
    super_resolved: str | None = Field(None, description="Taken where pair_image is missing.")
    interval: Echo = None
    main_params: Echo = None
    rand_params: Echo = None
    yaw_interval: Echo = None


class EvaluateRequest(BaseModel):
    pairs_data: Entries[PairEntry]


class EvaluateResult(BaseModel):
    """A scored pair, or {success: false, error, image_path}."""

    pair_image: str | None = None
    final_score: str | None = Field(None, description="0 to 1 as text; null where there is none.")
    interval: JsonValue = None
    main_params: JsonValue = None
    rand_params: JsonValue = None
    yaw_interval: JsonValue = None
    success: bool = True
    error: str | None = None
    image_path: str | None = None


class EvaluateReply(BaseModel):
    success: bool
    results: list[EvaluateResult]


class DescribeRequest(BaseModel):
    image_paths: Entries[FilePath]


class DescribeResult(BaseModel):
    image_path: str
    description: str
    timestamp: float
    error: str | None = Field(None, description="Present where the description failed.")


class DescribeReply(BaseModel):
    success: bool
    results: list[DescribeResult]


class TensorScore(BaseModel):
    """Each 0 to 1, null where the reply has none."""

    correlation: float | None
    balance: float | None
    richness: float | None
    clarity: float | None
    coherence: float | None
    final_score: float | None
    raw_output: str


class EvaluateTensorReply(BaseModel):
    success: bool
    results: list[TensorScore]


class TensorDescription(BaseModel):
    description: str
    error: str | None = Field(None, description="Present where the description failed.")


class DescribeTensorReply(BaseModel):
    success: bool
    results: list[TensorDescription]


class Health(BaseModel):
    status: Literal["healthy"]
    service: str


class Error(BaseModel):
    error: str
