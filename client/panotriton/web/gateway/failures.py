"""What went wrong, as the old services said it: a status and {"error": message}."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from panotriton.errors import (
    ConnectError,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    brief,
)

__all__ = [
    "ForbiddenPath",
    "Reply",
    "answer_failures",
    "describe",
    "failure",
    "retry_later",
    "status_of",
]


_RETRY_AFTER_S = 5


class ForbiddenPath(InvalidInput):
    """A path is outside the roots, or leads out of them through a link."""


class Reply(JSONResponse):
    """JSON in ASCII: file names that are no UTF-8 survive the way there and back as escapes."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


_STATUS = (
    (ForbiddenPath, 403),
    (InvalidInput, 400),
    # All of them mean "not now": the request itself is not at fault.
    ((ConnectError, ModelUnavailable, RequestTimeout, ServerBusy), 503),
)


def status_of(error: PanotritonError) -> int:
    """The HTTP status that fits an error of ours."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 500


def answer_failures(app: FastAPI) -> None:
    """Make every failure of the app a JSON object with `error`."""
    app.exception_handler(PanotritonError)(_ours)
    app.exception_handler(RequestValidationError)(_malformed)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(Exception)(_unforeseen)


async def _ours(request: Request, error: PanotritonError) -> Reply:
    return failure(str(error), status_of(error))


async def _malformed(request: Request, error: RequestValidationError) -> Reply:
    return failure(describe(error.errors()), 400)


async def _http(request: Request, error: HTTPException) -> Reply:
    reply = failure(str(error.detail), error.status_code)
    reply.headers.update(error.headers or {})
    return reply


async def _unforeseen(request: Request, error: Exception) -> Reply:
    return failure(
        f"{type(error).__name__}: {brief(error)} (the gateway's log has the details)", 500
    )


def failure(message: str, status: int) -> Reply:
    """The one shape of every failure."""
    return Reply({"error": message}, status, retry_later(status))


def retry_later(status: int) -> dict[str, str]:
    """The headers of a reply: after a 503, when to ask again."""
    return {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else {}


def describe(errors: Sequence[Any], whole: str = "the body") -> str:
    """One line on the first of pydantic's errors: the field of `whole`, what came, what was expected.

    A field's name and what came may be the caller's, of any length: each is given back in 80 characters.
    """
    error = errors[0]
    where = brief(".".join(str(part) for part in error["loc"] if part != "body")) or whole
    if error["type"] == "missing":
        return f"{where} is missing; expected as the API page (/docs) says"
    if error["type"] == "json_invalid":
        return f"the body is no JSON ({error['ctx']['error']}); expected one JSON object"
    reason = error["msg"].removeprefix("Value error, ")
    came = (
        f"{reprlib.repr(error['input']):.80}"  # reprlib: of a large body not all is written first
    )
    return f"{where} is {came}; {reason[:1].lower()}{reason[1:]}"
