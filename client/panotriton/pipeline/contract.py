"""Every limit and every default of the pipeline, once, and a group's options as one value.

Client, models, command line, gateway and live page all read them here. Cameras have their limits in
`pipeline.camera`, scoring its modes in `pipeline.quality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput, brief, quoted

__all__ = [
    "ALIGNMENTS",
    "CROP_SIZES",
    "DEFAULTS",
    "DESCRIPTION_TOKENS",
    "INTERVALS",
    "MAX_CAMERAS",
    "MAX_FILE_BYTES",
    "MAX_INTERPOLATIONS",
    "MAX_NEW_TOKENS",
    "MAX_PIXELS",
    "MAX_PROMPT_CHARACTERS",
    "MAX_QWEN_ASPECT",
    "MAX_QWEN_IMAGES",
    "MAX_SEED",
    "MAX_SPHERE_SIZE",
    "MAX_SR_PIXELS",
    "MAX_UPSCALE",
    "MIN_QWEN_SIDE_PX",
    "MIN_SIDE_PX",
    "MIN_SR_SIDE_PX",
    "SCORE_TOKENS",
    "SR_OPTIONS",
    "TENSORS",
    "Alignment",
    "Options",
    "check_seed",
]

INTERVALS = 8
"""Yaw intervals of a panorama, 45° each."""

Alignment = Literal["adain", "wavelet", "nofix"]
ALIGNMENTS: tuple[str, ...] = get_args(Alignment)
"""What the colours of a super-resolved image are taken from its input by."""

MAX_UPSCALE = 4
CROP_SIZES = (64, 2048)
"""Least and largest side of a crop, in px."""
MAX_SPHERE_SIZE = 8192
"""Largest side that a panorama is resized to before crops are cut from it, in px; the least is a crop's."""
MAX_INTERPOLATIONS = 255
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 4096
"""Of which the text encoder reads the first 77 tokens."""

MAX_PIXELS = 16384 * 8192
"""The largest panorama or batch of images accepted, in pixels."""
MAX_SR_PIXELS = 5 * MAX_PIXELS
"""What super-resolution makes at most for one request, in pixels, before a last reduction.

Room for all the views of a group with the default interpolations, of 512 px by 4 or of 1024 px by 2; their
bytes are what one gRPC message takes.
"""
MAX_FILE_BYTES = 512 << 20

MIN_SIDE_PX = 64
"""Of a panorama."""
MIN_SR_SIDE_PX = 8
"""Of an image to super-resolve: what the VAE makes one latent of."""
MIN_QWEN_SIDE_PX = 28
"""Of an image to score or describe: one merged patch of Qwen2.5-VL."""

MAX_QWEN_ASPECT = 200
"""The longer side of such an image through the shorter one: what its processor takes."""

MAX_QWEN_IMAGES = 64
"""Rows per request to `qwen`: its max_batch_size."""
MAX_CAMERAS = 256
"""Rows per request to `crop`; bounds what a request makes the server allocate."""
SCORE_TOKENS, DESCRIPTION_TOKENS, MAX_NEW_TOKENS = 512, 256, 2048
"""New tokens of a score, of a description, and the most that `qwen` may be asked for."""

TENSORS = {
    "crop_size": "CROP_SIZE",
    "upscale": "UPSCALE",
    "align": "ALIGN",
    "prompt": "PROMPT",
    "threshold": "THRESHOLD",
    "interpolations": "NUM_INTERPOLATIONS",
    "sphere_size": "SPHERE_SIZE",
}
"""Option → the request input that carries it."""
SR_OPTIONS = ("upscale", "align", "prompt")
"""Those that super-resolution alone takes."""

_RANGES: dict[str, tuple[float, float, str]] = {
    "crop_size": (*CROP_SIZES, " px"),
    "upscale": (1, MAX_UPSCALE, ""),
    "threshold": (0, 1, ""),
    "interpolations": (0, MAX_INTERPOLATIONS, ""),
}
_DTYPES = {"int": np.int32, "float": np.float32, "str": np.object_}


@dataclass(frozen=True, slots=True)
class Options:
    """How a group is made, all but its panoramas and cameras; the defaults are BEHAVIOUR's.

    crop_size: of a view, px. upscale: factor of super-resolution. align: one of `ALIGNMENTS`. prompt:
    for super-resolution, behind the tags. threshold: what both scores of an interval have to reach.
    interpolations: in-between views per sequence. sphere_size: side in px that a panorama is resized to
    before crops are cut from it, 0 for its own resolution; None: the crop's, see `camera.Sphere`.
    """

    crop_size: int = 512
    upscale: int = 2
    align: str = "adain"
    prompt: str = ""
    threshold: float = 0.7
    interpolations: int = 9
    sphere_size: int | None = None

    def check(self, names: Mapping[str, str] | None = None) -> Options:
        """Itself; raises InvalidInput for an option of the wrong type or out of range.

        names: option → what the caller calls it, where that is something else (`TENSORS`).
        """
        for field in fields(self):
            value = getattr(self, field.name)
            name = (names or {}).get(field.name, field.name)
            if value is None and field.default is None:
                continue
            _check_type(name, value, _kind(field))
            if field.name in _RANGES:
                _check_range(name, value, *_RANGES[field.name])
        if self.sphere_size and not CROP_SIZES[0] <= self.sphere_size <= MAX_SPHERE_SIZE:
            name = (names or {}).get("sphere_size", "sphere_size")
            raise InvalidInput(
                f"{name} is {brief(self.sphere_size)}; expected {CROP_SIZES[0]} to {MAX_SPHERE_SIZE} px, "
                "or 0 for the panorama's own resolution"
            )
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            name = (names or {}).get("prompt", "prompt")
            raise InvalidInput(
                f"{name} has {len(self.prompt)} characters; expected at most {MAX_PROMPT_CHARACTERS}"
            )
        if self.align not in ALIGNMENTS:
            name = (names or {}).get("align", "align")
            raise InvalidInput(
                f"{name} is {quoted(self.align)}; expected one of {', '.join(ALIGNMENTS)}"
            )
        return self

    def chosen(self) -> dict[str, Any]:
        """By name, all but what is left to be completed."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def completed(self) -> Options:
        """The same with a sphere of the crop's size where none was chosen."""
        return self if self.sphere_size is not None else replace(self, sphere_size=self.crop_size)

    def tensors(self, *only: str) -> dict[str, NDArray[Any]]:
        """As the models take them, (1,) each: int32, float32 or bytes; all chosen, or the named ones."""
        kinds = {field.name: _kind(field) for field in fields(self)}
        return {
            TENSORS[name]: np.array(
                [value.encode() if isinstance(value, str) else value], _DTYPES[kinds[name]]
            )
            for name, value in self.chosen().items()
            if name in (only or kinds)
        }


DEFAULTS = Options()


def check_seed(name: str, seed: int) -> None:
    """Raise InvalidInput unless 0 ≤ seed < 2⁶³."""
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput(f"{name} is {brief(seed)}; expected 0 or more, below 2⁶³")


def _kind(field: Field[Any]) -> str:
    return str(field.type).removesuffix(" | None")


def _check_type(name: str, value: Any, kind: str) -> None:
    fits = {
        "int": isinstance(value, Integral),
        "float": isinstance(value, (int, float, np.floating)),
        "str": isinstance(value, str),
    }
    if not fits[kind]:
        wanted = {"int": "a whole number", "float": "a number", "str": "text"}[kind]
        raise InvalidInput(f"{name} is {quoted(value)}; expected {wanted}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"{name} is {quoted(value)}; expected text that UTF-8 can write: character {error.start} "
                "is half of one, or a byte that was no UTF-8"
            ) from error


def _check_range(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:  # also for NaN
        raise InvalidInput(f"{name} is {brief(value)}; expected {low:g} to {high:g}{unit}")
