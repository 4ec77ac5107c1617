"""How large a request's body may be, and how large all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from panotriton.web.bodies import paced
from panotriton.web.gateway.failures import failure

__all__ = ["BodyBudget", "BodyLimit"]

_SMALL_BYTES = 256 << 10  # paths, which no tensor on its way to another service may hold up


class BodyBudget:
    """Bytes that the bodies of requests in work may take together.

    Others are not read meanwhile: TCP holds their senders back. One that is larger than all comes alone.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = self._left = nbytes
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, nbytes: int) -> AsyncIterator[None]:
        """Wait for room, and hold it inside the block."""
        taken = min(nbytes, self._nbytes)
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            async with self._changed:
                self._left += taken
                self._changed.notify_all()


class BodyLimit:
    """ASGI middleware that answers 413 to a body over the limit of its path, 408 to one that does not come.

    A length that is declared is refused before anything is read, one that is not while it is read.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[str], int], budget: BodyBudget) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope["path"])
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            await failure(_too_large(declared, limit), 413)(scope, receive, send)
            return
        chunked = "transfer-encoding" in headers
        expected = int(declared) if declared.isdecimal() else limit if chunked else 0
        async with self._budget.reserve(expected if expected > _SMALL_BYTES else 0):
            await self._app(scope, _counting(paced(receive), limit), send)


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
