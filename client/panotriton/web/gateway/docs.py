"""What the OpenAPI pages say of the tensor endpoints, whose bodies FastAPI does not parse."""

from __future__ import annotations

from typing import Any

from panotriton.web.gateway.schemas import Error
from panotriton.web.gateway.tensors import (
    LAYOUT_HEADER,
    OCTETS,
    WARNING_HEADER,
    TensorOptions,
    body_model,
)

__all__ = ["FAILURES", "tensor_endpoint", "tensor_reply"]

_FAILED = {
    400: "The request is wrong; `error` says what came, what was expected and how to mend it.",
    403: "A path is outside the roots.",
    413: "The body is too large.",
    500: "A model failed, or a file could not be written.",
    503: "The Triton server is not there or busy: try again after the seconds of Retry-After.",
}
FAILURES: dict[int | str, dict[str, Any]] = {
    **{status: {"model": Error, "description": text} for status, text in _FAILED.items()},
    "default": {"model": Error, "description": "Any other failure."},
}

_BODY = (
    "Images are RGB, uint8 in 0…255 or float32 in 0…1, little-endian, C order, axes as `layout` says. "
    "`application/octet-stream` is the bytes of a .npy file (version 1 to 3), or of a safetensors file "
    "with one tensor called `tensor`; the other fields are then query parameters. The reply has the "
    "encoding, dtype and axes of the request."
)
_BINARY = {"type": "string", "format": "binary"}


def tensor_endpoint(options: type[TensorOptions]) -> dict[str, Any]:
    """The part of an operation that describes a tensor body."""
    schema = options.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "description": _BODY,
            "content": {
                "application/json": {"schema": body_model(options).model_json_schema()},
                OCTETS: {"schema": _BINARY},
            },
        },
        "parameters": [_parameter(name, field) for name, field in schema["properties"].items()],
    }


def _parameter(name: str, field: dict[str, Any]) -> dict[str, Any]:
    about = f"With application/octet-stream. {field.get('description', '')}".strip()
    parameter = {"name": name, "in": "query", "required": False, "description": about}
    if "anyOf" in field:  # nested lists travel as JSON
        return parameter | {"content": {"application/json": {"schema": field}}}
    return parameter | {"schema": field}


def tensor_reply(
    description: str, layout: str, *, cameras: str = "", warning: str = ""
) -> dict[int | str, Any]:
    """The responses of an endpoint that answers with images."""
    fields: dict[str, Any] = {
        "success": {"type": "boolean"},
        "tensor": {"type": "string", "contentEncoding": "base64", "description": description},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "dtype": {"enum": ["uint8", "float32"], "description": "As the request's; RGB."},
        "layout": {"type": "string", "description": layout},
    }
    if cameras:
        fields["cameras"] = {"type": "array", "items": {}, "description": cameras}
    content = {
        "application/json": {"schema": {"type": "object", "properties": fields}},
        OCTETS: {"schema": _BINARY},
    }
    headers = {LAYOUT_HEADER: _header("the axes.")}
    if warning:
        fields["warning"] = {"type": "string", "description": warning}
        headers[WARNING_HEADER] = _header(f"`warning`, in ASCII with Python's escapes. {warning}")
    reply = {"description": description, "content": content, "headers": headers}
    return {200: reply} | FAILURES


def _header(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string"}, "description": f"With {OCTETS}: {description}"}
