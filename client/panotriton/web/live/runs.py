"""Runs: an upload becomes a stream of the pipeline's events, which ends when its visitor leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from panotriton.client.aio import AsyncClient
from panotriton.errors import PanotritonError, ServerBusy
from panotriton.web.live.messages import Messages
from panotriton.web.live.settings import Settings
from panotriton.web.live.uploads import declared_bytes, discard, read_files, sphere

__all__ = ["EventStream", "Runs"]

T = TypeVar("T")


class Runs:
    """At most `max_visitors` at a time share one client; use it in an `async with` block.

    One panorama is decoded at a time: at 134 megapixels it takes 400 MB.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = AsyncClient(settings.url)
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="live")
        self._decoding = asyncio.Lock()
        self._free = settings.max_visitors

    async def __aenter__(self) -> Runs:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()
        self._pool.shutdown(cancel_futures=True)

    async def start(self, request: Request, first_bytes: int, **options: Any) -> Response:
        """The response that runs the pipeline on the request's two files, with options of `stream`.

        Raises ServerBusy where all places are taken, what `read_files` raises, and what the server
        says before it accepts the run; `declared_bytes` has its own.
        """
        lines = self._lines(request, first_bytes, options)
        return EventStream(await anext(lines), lines)

    async def _lines(
        self, request: Request, first_bytes: int, options: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        length = declared_bytes(request, self._settings.max_upload_bytes)
        if not self._free:
            await discard(request)
        with self._place():
            files = await read_files(request, first_bytes, length)
            spheres = (await self._decode(1, files[0]), await self._decode(2, files[1]))
            del files
            size, upscale = self._settings.crop_size, self._settings.upscale
            messages = Messages(spheres)
            stream = self._client.stream(*spheres, crop_size=size, upscale=upscale, **options)
            # Closed at once, not when collected: that is what cancels at the server.
            async with contextlib.aclosing(stream) as events:  # type: ignore[type-var]
                async for event in events:
                    yield _line(await self._work(messages.message, event))

    async def _decode(self, number: int, data: bytes) -> Any:
        async with self._decoding:
            return await self._work(sphere, number, data, self._settings.crop_size)

    async def _work(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if not self._free:
            raise ServerBusy(
                f"{self._settings.max_visitors} runs are at work, which is all that this page allows; "
                "wait for one to end, or start the page with more --visitors"
            )
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class EventStream(Response):
    """JSON objects, one per line, for as long as somebody reads them: a visitor who leaves cancels.

    An error after the first line is a line of its own, since the status has been sent.
    """

    def __init__(self, first: bytes, lines: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="application/x-ndjson")
        self._first, self._lines = first, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._send(send)), asyncio.create_task(_left(receive))]
        try:
            # Cancelled where the page itself ends: what else could be done is done below.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._lines.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except PanotritonError as error:
            line = _line({"event": "error", "message": str(error)})
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"
