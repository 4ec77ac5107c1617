"""Tensors in the body of a request or reply: JSON with base64, .npy, or safetensors.

Bytes are little-endian, C order. Images are RGB, uint8 in 0…255 or float32 in 0…1 (which is rounded
to 8 bits: that is what the networks take). The reply has the encoding, dtype and axes of the request.
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import safetensors.numpy
from fastapi import Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, create_model, field_validator
from safetensors import SafetensorError

from panotriton.errors import InvalidImage, InvalidInput
from panotriton.pipeline.camera import CAMERA_FIELDS, Camera
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.contract import INTERVALS
from panotriton.web.gateway.failures import Reply, describe

__all__ = [
    "LAYOUT_HEADER",
    "OCTETS",
    "WARNING_HEADER",
    "CameraOptions",
    "Incoming",
    "TensorFields",
    "TensorOptions",
    "answer",
    "body_model",
    "read",
]

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]

Layout = Literal["HWC", "NHWC", "CHW", "NCHW"]
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
_NPY = b"\x93NUMPY"
_NPY_HEADER_BYTES = 1024
_BAD_HEADER = (
    KeyError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
OCTETS = "application/octet-stream"
LAYOUT_HEADER = "x-tensor-layout"
WARNING_HEADER = "x-tensor-warning"

# (P, 8 or fewer, left|right, 5)
_Row = Annotated[list[float], Field(min_length=5, max_length=5)]
_Ends = Annotated[list[_Row], Field(min_length=2, max_length=2)]
_Intervals = Annotated[list[_Ends], Field(min_length=1, max_length=8)]
Cameras = Annotated[list[_Intervals], Field(min_length=1, max_length=2)]


class TensorOptions(BaseModel):
    """What a tensor endpoint takes beside the tensor: fields of a JSON body, else query parameters."""

    layout: Layout = Field(
        description="Axes of the tensor, never guessed: N images, height, width, channels (3, RGB)."
    )


class CameraOptions(TensorOptions):
    cameras: Cameras | None = Field(
        None,
        description="Panorama, interval, left|right, (yaw, pitch, roll, vfov, xi) in degrees. A "
        "safetensors body may hold them as a float64 tensor `cameras` instead.",
    )

    @field_validator("cameras", mode="before")
    @classmethod
    def _from_query(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    def camera_array(self) -> F64:
        """The cameras (P, K, 2, 5); raises InvalidInput where they are missing or out of range."""
        try:
            cameras = np.array(self.cameras or (), np.float64)
        except ValueError as error:
            raise InvalidInput("cameras: panoramas differ in their number of intervals") from error
        if cameras.ndim != 4:
            raise InvalidInput("cameras are missing; expected (panorama, interval, left|right, 5)")
        for index in np.ndindex(cameras.shape[:3]):
            try:
                Camera.from_array(cameras[index])
            except ValueError as error:
                raise InvalidInput(f"cameras{list(index)}: {error}") from error
        return cameras


class TensorFields(BaseModel):
    """The tensor of a JSON body."""

    tensor: str = Field(
        description="base64 of the bytes, little-endian, C order. RGB; uint8 in 0…255 or float32 "
        "in 0…1.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    shape: list[Annotated[int, Field(ge=0, le=1 << 31)]] = Field(min_length=3, max_length=4)
    dtype: Literal["uint8", "float32"]


O = TypeVar("O", bound=TensorOptions)  # noqa: E741


@dataclass(frozen=True, slots=True)
class Incoming(Generic[O]):
    """A request: its images as (N, H, W, 3) uint8, its options, and how the reply is to be written."""

    images: U8
    options: O
    dtype: str
    wire: Literal["json", "npy", "safetensors"]


def read(
    body: bytes, content_type: str, query: Mapping[str, str], options: type[O], min_side_px: int
) -> Incoming[O]:
    """Read a tensor request; `options` is the model of what comes beside the tensor.

    Raises InvalidInput or InvalidImage that says what came and what was expected.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        wire, array, chosen = "json", *_read_json(body, options)
    elif kind == OCTETS and body.startswith(_NPY):
        wire, array, chosen = "npy", _read_npy(body), _validated(options, dict(query))
    elif kind == OCTETS:
        wire, array, chosen = "safetensors", *_read_safetensors(body, options, dict(query))
    else:
        raise InvalidInput(
            f"the body is {kind or 'of no type'}; expected application/json or {OCTETS}"
        )
    images = _bytes(_images(array, chosen.layout))
    check_images("tensor", images, min_side_px)
    return Incoming(images, chosen, array.dtype.name, wire)  # type: ignore[arg-type]


@cache
def body_model(options: type[TensorOptions]) -> type[TensorOptions]:
    """The model of a JSON body: the tensor's fields and the options'."""
    name = f"{options.__name__.removesuffix('Options')}Body"
    return create_model(name, __base__=(options, TensorFields))  # type: ignore[arg-type]


def _read_json(body: bytes, options: type[O]) -> tuple[NDArray[Any], O]:
    try:
        fields: Any = body_model(options).model_validate_json(body)
    except ValidationError as error:
        raise InvalidInput(describe(error.errors(include_url=False))) from error
    try:
        data = binascii.a2b_base64(fields.tensor)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"tensor is no base64 ({error}); expected the array's bytes") from error
    fields.tensor = ""  # the options outlive the request's body; its largest part need not
    return _array(data, fields.dtype, fields.shape), fields


def _read_npy(body: bytes) -> NDArray[Any]:
    """The array after a .npy header, without a copy; the header claims nothing that is not there."""
    try:
        dtype, shape, start = _npy_header(body)
    except _BAD_HEADER as error:
        raise InvalidInput(
            f"the .npy header cannot be used ({type(error).__name__}: {error}); expected one array "
            "of uint8 or little-endian float32 in C order, as numpy.save writes it"
        ) from error
    return _array(memoryview(body)[start:], dtype, shape)


def _npy_header(body: bytes) -> tuple[str, list[int], int]:
    """dtype, shape and where the data starts; any of `_BAD_HEADER` is raised for another header."""
    start = (
        12 if body[6:7] > b"\x01" else 10
    )  # version 1 gives the length in 2 bytes, later ones in 4
    end = start + int.from_bytes(body[8:start], "little")
    if end > _NPY_HEADER_BYTES:
        raise ValueError(f"it has {end} bytes")
    header = ast.literal_eval(body[start:end].decode("latin-1").strip())
    if header["fortran_order"]:
        raise ValueError("Fortran order: send np.ascontiguousarray(it)")
    dtypes = [name for name, kind in _DTYPES.items() if kind == np.dtype(header["descr"])]
    if not dtypes:
        raise ValueError(f"dtype {header['descr']}")
    return dtypes[0], [int(side) for side in header["shape"]], end


def _read_safetensors(
    body: bytes, options: type[O], query: dict[str, Any]
) -> tuple[NDArray[Any], O]:
    try:
        tensors = safetensors.numpy.load(body)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"the body is neither .npy nor safetensors ({error}); expected the bytes of one of them"
        ) from error
    if "tensor" not in tensors:
        raise InvalidInput(f"the safetensors hold {sorted(tensors)}; expected one called 'tensor'")
    array = tensors["tensor"]
    if array.dtype.name not in _DTYPES:
        raise InvalidImage(f"tensor is {array.dtype}; expected {' or '.join(_DTYPES)}")
    if "cameras" in tensors:
        query["cameras"] = _few(tensors["cameras"])
    return array, _validated(options, query)


def _few(cameras: NDArray[Any]) -> Any:
    if cameras.size > 2 * INTERVALS * 2 * len(CAMERA_FIELDS):  # bounded before it becomes a list
        raise InvalidInput(f"cameras have shape {cameras.shape}; expected at most (2, 8, 2, 5)")
    return cameras.tolist()


def _validated(options: type[O], query: Mapping[str, Any]) -> O:
    try:
        return options.model_validate(query)
    except ValidationError as error:
        raise InvalidInput(describe(error.errors(include_url=False))) from error


def _array(data: bytes | memoryview, dtype: str, shape: list[int]) -> NDArray[Any]:
    kind = _DTYPES[dtype]
    if min(shape, default=0) < 1:  # beside 0, NumPy takes no side that is very large
        raise InvalidInput(f"tensor has shape {tuple(shape)}; expected sides of 1 or more")
    expected = math.prod(shape) * kind.itemsize
    if len(data) != expected:
        raise InvalidInput(
            f"tensor has {len(data)} bytes; expected {expected} for {dtype} {tuple(shape)}"
        )
    return np.ndarray(shape, kind, data)


def _images(array: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """A view of the array as (N, H, W, 3)."""
    if array.ndim != len(layout) or array.shape[layout.index("C")] != 3:
        raise InvalidImage(
            f"tensor has shape {array.shape}; expected {' × '.join(layout)} with C = 3, RGB: name "
            "the axes that it has as layout, or drop alpha"
        )
    if "N" not in layout:
        array = array[None]
    return array.transpose(0, 2, 3, 1) if "CHW" in layout else array


def _bytes(images: NDArray[Any]) -> U8:
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):  # also true for NaN
        raise InvalidImage(
            f"tensor goes from {images.min():g} to {images.max():g}; expected float32 from 0 to 1"
        )
    rounded: U8 = np.rint(images * np.float32(255)).astype(np.uint8, order="C")
    return rounded


def answer(
    incoming: Incoming[Any],
    images: U8,
    cameras: F64 | None = None,
    *,
    warning: str = "",
    batch: bool = True,
) -> Response:
    """Send images (N, H, W, 3) as they came: same encoding, dtype and axes.

    batch: whether the reply has the axis N although the request may not. cameras go along where
    the encoding has room for them, which .npy has not. warning: a field of JSON, else a header.
    """
    layout = incoming.options.layout
    layout = f"N{layout.removeprefix('N')}" if batch else layout
    array: NDArray[Any] = images.transpose(0, 3, 1, 2) if "CHW" in layout else images
    array = array if "N" in layout else array[0]
    if incoming.dtype == "float32":
        array = array.astype(np.float32) / np.float32(255)
    write = {"json": _write_json, "npy": _write_npy, "safetensors": _write_safetensors}
    return write[incoming.wire](np.ascontiguousarray(array), layout, cameras, warning)


def _write_json(array: NDArray[Any], layout: str, cameras: F64 | None, warning: str) -> Response:
    fields = {"success": True, "shape": array.shape, "dtype": array.dtype.name, "layout": layout}
    if warning:
        fields["warning"] = warning
    if cameras is not None:
        fields["cameras"] = cameras.tolist()
    head = Reply(fields).body
    # Not through the JSON encoder: it would look at every one of these bytes again.
    body = b'%b,"tensor":"%b"}' % (bytes(head)[:-1], base64.b64encode(array.data))
    return Response(body, media_type="application/json")


def _write_npy(array: NDArray[Any], layout: str, cameras: F64 | None, warning: str) -> Response:
    head = io.BytesIO()
    facts = np.lib.format.header_data_from_array_1_0(array)  # type: ignore[no-untyped-call]
    np.lib.format.write_array_header_1_0(head, facts)  # type: ignore[no-untyped-call]
    return _octets(b"".join((head.getvalue(), array.data)), layout, warning)


def _write_safetensors(
    array: NDArray[Any], layout: str, cameras: F64 | None, warning: str
) -> Response:
    tensors = {"tensor": array}
    if cameras is not None:
        tensors["cameras"] = np.ascontiguousarray(cameras)
    return _octets(safetensors.numpy.save(tensors, {"layout": layout}), layout, warning)


def _octets(body: bytes, layout: str, warning: str) -> Response:
    headers = {LAYOUT_HEADER: layout}
    if warning:  # it quotes the prompt, and a header holds no more than ASCII
        headers[WARNING_HEADER] = warning.encode("ascii", "backslashreplace").decode()
    return Response(body, media_type=OCTETS, headers=headers)
