"""How long the body of a request may take to come: one that stops, or trickles, holds up others."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Paced", "paced"]

_SILENT_S = 60.0
_LEAST_BYTES_PER_S = 128 << 10  # on the whole, after as long a silence


class Paced:
    """ASGI middleware that answers 408 to such a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, paced(receive) if scope["type"] == "http" else receive, send)


def paced(receive: Receive) -> Receive:
    """The same, which raises HTTPException 408 where the body does not come."""
    began: float | None = None
    received = 0
    more = True

    async def receive_in_time() -> Message:
        nonlocal began, received, more
        if not more:  # what comes now is the caller's leaving, whenever that is
            return await receive()
        now = time.monotonic()
        began = began or now
        left_s = began + _SILENT_S + received / _LEAST_BYTES_PER_S - now
        try:
            message = await asyncio.wait_for(receive(), min(left_s, _SILENT_S))
        except asyncio.TimeoutError:
            raise HTTPException(
                408, f"the body stopped, or was slow, for {_SILENT_S:g} s; send it again"
            ) from None
        received += len(message.get("body", b""))
        more = message.get("more_body", False)
        return message

    return receive_in_time
