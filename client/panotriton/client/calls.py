"""What each method asks of the server, as values: pure functions from arguments to requests.

`Client` and `AsyncClient` send them; nothing here knows a protocol.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from panotriton.client.pixels import (
    ImageLike,
    Images,
    encoded_panorama,
    is_file,
    pixels,
    same_size,
)
from panotriton.errors import InferenceFailed, InvalidImage, InvalidInput, brief, quoted
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import (
    DESCRIPTION_TOKENS,
    INTERVALS,
    MAX_PIXELS,
    MAX_QWEN_ASPECT,
    MAX_QWEN_IMAGES,
    MAX_SR_PIXELS,
    MIN_QWEN_SIDE_PX,
    MIN_SR_SIDE_PX,
    SCORE_TOKENS,
    SR_OPTIONS,
    Options,
    check_seed,
)
from panotriton.pipeline.group import check_cameras
from panotriton.pipeline.quality import MODES, SUB_SCORES, Quality
from panotriton.pipeline.results import (
    Cropped,
    Description,
    Group,
    Score,
    Timings,
    Upscaled,
    group_from_tensors,
    quality,
    warning,
)
from panotriton.pipeline.sizes import check_group, network_size

__all__ = [
    "Call",
    "Failure",
    "Plan",
    "Stream",
    "Value",
    "crop",
    "describe",
    "infer",
    "naming_file",
    "process",
    "score",
    "stream",
    "upscale",
]

T = TypeVar("T")
R = TypeVar("R")
Tensors = dict[str, Any]
Value = NDArray[Any] | Images
Failure = InvalidInput | InferenceFailed
"""What is wrong with an image, or with what a model makes of it."""

_RESULTS = (
    "CAMERAS",
    "SCORE",
    "SUB_SCORES",
    "RAW_OUTPUT",
    "KEPT",
    "DESCRIPTION",
    "DESCRIPTION_ERROR",
    "INTERPOLATED_CAMERAS",
    "WARNING",
)


# How long a request may take, unless the client is told otherwise. Only who waits on a request that is lost
# inside a living server waits that long: a server that went or froze is noticed within half a minute.
_BASE_S = 300.0  # for the queue before it, and for what is small
_S_PER_MEGAPIXEL = 20.0  # that is made by super-resolution
_S_PER_TOKEN = 0.2
_UNKNOWN_S = 3600.0
_REFUSED_INPUT = re.compile(r"(in ensemble '[^']*', )?(?P<name>\w+) (?P<why>.*)", re.DOTALL)
_MAX_NAME_BYTES = 1024  # of longer ones gRPC and HTTP refuse the answer, which repeats them


def _allowed_s(*, pixels: int = 0, tokens: int = 0) -> float:
    return _BASE_S + _S_PER_MEGAPIXEL * pixels / 1e6 + _S_PER_TOKEN * tokens


def _group_s(options: Options) -> float:
    """For a group that keeps all its intervals."""
    images = 2 * INTERVALS * (2 + options.interpolations)  # in crops
    tokens = INTERVALS * (2 * SCORE_TOKENS + DESCRIPTION_TOKENS)
    return _allowed_s(pixels=images * (options.crop_size * options.upscale) ** 2, tokens=tokens)


@dataclass(frozen=True)
class Stream:
    """One request to `panorama_stream`, and how long it may take to its last event."""

    inputs: Mapping[str, Value]
    timeout_s: float


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request.

    inputs: `Images` may travel through shared memory, arrays never do. outputs: name → the most
    bytes that an image output can have, 0 for outputs that always travel inside the response.
    decode: the response's arrays and its timings → what the caller gets. timeout_s: how long it may
    take, if the client does not say. files: the paths whose content is sent, by input.
    """

    model: str
    inputs: Mapping[str, Value]
    outputs: Mapping[str, int]
    decode: Callable[[Tensors, Timings], T]
    timeout_s: float
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan(Generic[T]):
    """The requests that answer for one image or a list: grouped by size, within the server's limits."""

    calls: tuple[Call[list[T]], ...]
    places: tuple[tuple[int, ...], ...]  # of each call's results in the caller's list
    single: bool
    refused: Mapping[int, Exception] | None = None  # by place, where failures are to be returned

    def failed(self, index: int, error: Exception) -> list[Any]:
        """In place of what call `index` would have answered; raises the error unless it is returned."""
        if self.refused is None:
            raise error
        return [error] * len(self.places[index])

    def merge(self, answers: Sequence[list[T]]) -> Any:
        """The calls' results in the caller's order; for a single image its own."""
        ordered = self._ordered(answers)
        return ordered[0] if self.single else ordered

    def outcomes(self, send: Callable[[Call[list[T]]], list[T]]) -> list[T | Failure]:
        """What `send` makes of each image, or why the request that holds it failed, in order.

        What concerns the server and not the images (it is busy, unreachable) is raised.
        """
        lenient = replace(self, refused=self.refused or {})

        def attempt(index: int, call: Call[list[T]]) -> list[Any]:
            try:
                return send(call)
            except (InvalidInput, InferenceFailed) as error:
                return lenient.failed(index, error)

        return lenient._ordered([attempt(*numbered) for numbered in enumerate(self.calls)])

    def _ordered(self, answers: Sequence[Sequence[Any]]) -> list[Any]:
        found: dict[int, Any] = dict(self.refused or {}) | {
            place: result
            for places, results in zip(self.places, answers, strict=True)
            for place, result in zip(places, results, strict=True)
        }
        return [found[place] for place in sorted(found)]


def infer(
    model: str, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | Mapping[str, int]
) -> Call[Tensors]:
    """Any request: image-like inputs, uint8 of three axes or more, may travel through memory."""
    for name in (model, *inputs, *outputs):
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise InvalidInput(
                f"the name {name[:20]!r}… has {len(name.encode())} bytes; expected {_MAX_NAME_BYTES} at most"
            )
    sizes = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, 0)
    values: dict[str, Value] = {
        name: Images((value,), alone=True) if value.dtype == np.uint8 and value.ndim >= 3 else value
        for name, value in inputs.items()
    }
    return Call(model, values, sizes, lambda tensors, timings: tensors, _UNKNOWN_S)


def process(
    panorama_1: ImageLike,
    panorama_2: ImageLike,
    *,
    seed: int | None,
    cameras: NDArray[np.float64] | None,
    options: Options,
    intermediates: bool,
    cuda: bool = False,
) -> Call[Group]:
    """The whole pipeline; every argument is checked before anything is sent."""
    tensors = check_group(options.check()).tensors() | _camera_tensors(seed, cameras)
    model, images = _panoramas(panorama_1, panorama_2, cuda)
    pairs, views = 2 * INTERVALS, 2 * INTERVALS * options.interpolations
    crop_bytes = 3 * options.crop_size**2
    sharp_bytes = crop_bytes * options.upscale**2
    outputs = dict.fromkeys(_RESULTS, 0)
    outputs["PAIRS_SR"] = pairs * 2 * sharp_bytes
    outputs["INTERPOLATED_SR"] = views * sharp_bytes  # where all eight are kept
    if intermediates:
        outputs |= {"PAIRS": pairs * 2 * crop_bytes, "INTERPOLATED": views * crop_bytes}

    def decode(tensors: Tensors, timings: Timings) -> Group:
        host = {name: _on_host(value) for name, value in tensors.items()}
        return group_from_tensors(host, timings, model)

    files = _files(ENCODED_1=panorama_1, ENCODED_2=panorama_2)
    return Call(model, images | tensors, outputs, decode, _group_s(options), files)


def stream(
    panorama_1: ImageLike,
    panorama_2: ImageLike,
    *,
    seed: int | None,
    cameras: NDArray[np.float64] | None,
    options: Options,
) -> Stream:
    """What `panorama_stream` is asked; `events.event_from_tensors` reads its responses."""
    tensors = options.check().tensors() | _camera_tensors(seed, cameras)
    _, images = _panoramas(panorama_1, panorama_2, cuda=False)
    return Stream(images | tensors, _group_s(options))


def upscale(
    images: Any, *, options: Options, cuda: bool = False, return_exceptions: bool = False
) -> Plan[Upscaled]:
    """Super-resolution of one image, a list, or `Images` that make one request as they are."""
    tensors = options.check().tensors(*SR_OPTIONS)

    def call(batch: Images) -> Call[list[Upscaled]]:
        sharp_bytes = batch.nbytes * options.upscale**2
        timeout_s = _allowed_s(pixels=sharp_bytes // 3)
        outputs = {"IMAGES_SR": sharp_bytes, "WARNING": 0}
        return Call("osediff", {"IMAGES": batch, **tensors}, outputs, decode, timeout_s)

    def decode(tensors: Tensors, timings: Timings) -> list[Upscaled]:
        told = warning(tensors)
        return [Upscaled(image, timings, "osediff", told) for image in tensors["IMAGES_SR"]]

    def read(name: str, image: Any) -> Any:
        array = pixels(name, image, min_side_px=MIN_SR_SIDE_PX, cuda=cuda)
        height, width = network_size(array.shape[0], array.shape[1], options.upscale)
        if height * width > MAX_PIXELS:
            raise InvalidImage(
                f"{name} would be super-resolved at {width}×{height} px; expected at most "
                f"{MAX_PIXELS / 1e6:.0f} megapixels: send a smaller or less elongated image"
            )
        return array

    def most(height: int, width: int) -> int:
        return MAX_SR_PIXELS // math.prod(network_size(height, width, options.upscale))

    return _plan(images, read, call, most, return_exceptions)


def score(
    images: Any, *, mode: str = "generate", cuda: bool = False, return_exceptions: bool = False
) -> Plan[Score]:
    """Quality of one pair image, a list, or `Images`, see `upscale`."""
    if mode not in MODES:
        raise InvalidInput(f"mode is {quoted(mode)}; expected one of {', '.join(MODES)}")
    options: dict[str, Value] = {"MODE": np.array([mode.encode()], np.object_)}

    def call(batch: Images) -> Call[list[Score]]:
        outputs = dict.fromkeys(("SCORE", "SUB_SCORES", "RAW_OUTPUT"), 0)
        timeout_s = _allowed_s(tokens=batch.shape[0] * SCORE_TOKENS)
        return Call("qwen_scorer", {"IMAGES": batch, **options}, outputs, _scores, timeout_s)

    return _plan(images, _qwen_reader(cuda), call, _qwen_most, return_exceptions)


def describe(
    images: Any, *, cuda: bool = False, return_exceptions: bool = False
) -> Plan[Description]:
    """Descriptions of one image, a list, or `Images`, see `upscale`."""

    def call(batch: Images) -> Call[list[Description]]:
        outputs = dict.fromkeys(("DESCRIPTION", "DESCRIPTION_ERROR"), 0)
        timeout_s = _allowed_s(tokens=batch.shape[0] * DESCRIPTION_TOKENS)
        return Call("qwen_describer", {"IMAGES": batch}, outputs, _descriptions, timeout_s)

    return _plan(images, _qwen_reader(cuda), call, _qwen_most, return_exceptions)


def _qwen_most(height: int, width: int) -> int:
    return min(MAX_QWEN_IMAGES, MAX_SR_PIXELS // (height * width))  # rows, and bytes of a message


def _qwen_reader(cuda: bool) -> Callable[[str, Any], Any]:
    return partial(pixels, min_side_px=MIN_QWEN_SIDE_PX, max_aspect=MAX_QWEN_ASPECT, cuda=cuda)


def crop(
    panorama: ImageLike,
    cameras: Any,
    *,
    size: int,
    sphere_size: int | None = None,
    cuda: bool = False,
) -> Plan[Cropped]:
    """Views of a panorama from one camera or a list."""
    wanted = [cameras] if isinstance(cameras, Camera) else list(cameras)
    for camera in wanted:
        if not isinstance(camera, Camera):
            raise InvalidInput(
                f"cameras holds a {type(camera).__name__}; expected panotriton.Camera"
            )
    options = Options(crop_size=size, sphere_size=sphere_size).check({"crop_size": "size"})
    image: dict[str, Value] = (
        {"ENCODED": encoded_panorama(panorama)}
        if is_file(panorama)
        else {"PANORAMA": Images((pixels("panorama", panorama, cuda=cuda),), alone=True)}
    )
    rows = np.array([camera.to_array() for camera in wanted]).reshape(-1, 5)
    inputs = image | {"CAMERAS": rows} | options.tensors("crop_size", "sphere_size")

    def decode(tensors: Tensors, timings: Timings) -> list[Cropped]:
        views = zip(tensors["CROPS"], wanted, strict=True)
        return [Cropped(view, timings, "crop", camera) for view, camera in views]

    outputs = {"CROPS": len(wanted) * 3 * size**2}
    call = Call("crop", inputs, outputs, decode, _allowed_s(), _files(ENCODED=panorama))
    return Plan((call,), (tuple(range(len(wanted))),), single=isinstance(cameras, Camera))


def _plan(
    images: Any,
    read: Callable[[str, Any], Any],
    call: Callable[[Images], Call[list[T]]],
    most: Callable[[int, int], int],
    return_exceptions: bool,
) -> Plan[T]:
    """One request per group of same-sized images, split where `most(height, width)` says."""
    if isinstance(images, Images):
        return Plan((call(images),), (tuple(range(images.shape[0])),), single=False)
    if not isinstance(images, (list, tuple)):
        one = Images((read("image", images),))
        return Plan((call(one),), ((0,),), single=True)
    arrays: dict[int, Any] = {}
    refused: dict[int, Exception] = {}
    for index, image in enumerate(images):
        try:
            arrays[index] = read(f"images[{index}]", image)
        except InvalidInput as error:
            if not return_exceptions:
                raise
            refused[index] = error
    places: list[tuple[int, ...]] = []
    read_ones = list(arrays)
    for group in same_size(list(arrays.values())):
        size = max(1, most(*arrays[read_ones[group[0]]].shape[:2]))
        members = [read_ones[i] for i in group]
        places += [tuple(members[i : i + size]) for i in range(0, len(members), size)]
    calls = tuple(call(Images(tuple(arrays[i] for i in part))) for part in places)
    return Plan(calls, tuple(places), False, refused if return_exceptions else None)


def _scores(tensors: Tensors, timings: Timings) -> list[Score]:
    rows = zip(tensors["SUB_SCORES"], tensors["SCORE"], tensors["RAW_OUTPUT"], strict=True)
    return [_score(quality(subs, final), raw.decode(), timings) for subs, final, raw in rows]


def _score(scores: Quality, raw: str, timings: Timings) -> Score:
    return Score(
        final=scores.final_score,
        **{name: getattr(scores, name) for name in SUB_SCORES},
        raw=raw,
        timings=timings,
        model="qwen_scorer",
    )


def _descriptions(tensors: Tensors, timings: Timings) -> list[Description]:
    rows = zip(tensors["DESCRIPTION"], tensors["DESCRIPTION_ERROR"], strict=True)
    return [Description(t.decode(), e.decode(), timings, "qwen_describer") for t, e in rows]


def _camera_tensors(seed: int | None, cameras: NDArray[np.float64] | None) -> dict[str, Value]:
    if cameras is None:
        seed = 0 if seed is None else seed
        check_seed("seed", seed)
        return {"SEED": np.array([seed], np.int64)}
    if seed is not None:
        raise InvalidInput("seed and cameras are both given; give one of them")
    cameras = np.asarray(cameras, np.float64)
    check_cameras("cameras", cameras)
    return {"GIVEN_CAMERAS": cameras}


def _panoramas(one: ImageLike, two: ImageLike, cuda: bool) -> tuple[str, dict[str, Value]]:
    """The ensemble that takes these two, and its image inputs: files go as they are."""
    if is_file(one) and is_file(two):
        files = {"ENCODED_1": encoded_panorama(one), "ENCODED_2": encoded_panorama(two)}
        return "panorama_encoded", dict(files)
    images = {
        f"PANORAMA_{i}": Images((pixels(f"panorama_{i}", image, cuda=cuda),), alone=True)
        for i, image in enumerate((one, two), start=1)
    }
    return "panorama", dict(images)


def _files(**images: ImageLike) -> dict[str, str]:
    return {name: brief(image) for name, image in images.items() if is_file(image)}


def naming_file(error: Exception, files: Mapping[str, str]) -> Exception:
    """InvalidImage with the file's name where the server refuses the input that holds its content."""
    found = _REFUSED_INPUT.match(str(error))
    if isinstance(error, InvalidInput) and found and found["name"] in files:
        return InvalidImage(f"{files[found['name']]} {found['why']}")
    return error


def _on_host(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.cpu().numpy()
