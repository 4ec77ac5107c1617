"""How large a request's body may be."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from panotriton.web.gateway.failures import failure

__all__ = ["BodyLimit"]


class BodyLimit:
    """ASGI middleware that answers 413 to a body over the limit of its path.

    A length that is declared is refused before anything is read, one that is not while it is read.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[str], int]) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope["path"])
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            await failure(_too_large(declared, limit), 413)(scope, receive, send)
            return
        await self._app(scope, _counting(receive, limit), send)


def _counting(receive: Receive, limit: int) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, _too_large(f"more than {limit}", limit))
        return message

    return counted


def _too_large(got: str, limit: int) -> str:
    return (
        f"the body has {got} bytes; expected at most {limit}: send fewer or smaller images at once, or "
        "start the gateway with a larger --max-body-mb"
    )
