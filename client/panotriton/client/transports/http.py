"""HTTP: for what lies behind something that speaks nothing else; no streams, no cancelling."""

from __future__ import annotations

import asyncio
import io
import threading
from typing import Any, ClassVar

import tritonclient.http
import tritonclient.http.aio
from aiohttp import ClientError
from geventhttpclient.response import HTTPParseError

from panotriton.client.transports.base import CONNECT_TIMEOUT_S, Transport
from panotriton.errors import InvalidInput, ModelUnavailable, RequestTimeout, ServerBusy

__all__ = ["Asynchronous", "Blocking"]


class _Http(Transport):
    name = "http"
    library = tritonclient.http
    failures = (*Transport.failures, ClientError, HTTPParseError)
    errors: ClassVar = {
        "400": InvalidInput,
        "404": ModelUnavailable,
        "429": ServerBusy,
        "499": RequestTimeout,
        "504": RequestTimeout,
    }
    unavailable = "503"


class Blocking(_Http):
    """A connection for each thread: tritonclient's belongs to one."""

    def __init__(self, *address: Any) -> None:
        super().__init__(*address)
        self._local = threading.local()

    @property
    def connection(self) -> Any:
        if not hasattr(self._local, "connection"):
            self._local.connection = self.connect()
        return self._local.connection

    def _connect(self) -> Any:
        tls = {"ssl": True, "ssl_context_factory": self.tls.gevent_context} if self.tls else {}
        limits = {"connection_timeout": CONNECT_TIMEOUT_S, "network_timeout": self.timeout_s}
        return self.library.InferenceServerClient(self.url, **limits, **tls)


class Asynchronous(_Http):
    """One session for the loop in which it is first used."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _connect(self) -> Any:
        tls = {"ssl": True, "ssl_context": self.tls.context()} if self.tls else {}
        return _InPieces(self.url, conn_timeout=self.timeout_s, **tls)


class _InPieces(tritonclient.http.aio.InferenceServerClient):  # type: ignore[misc]
    """Large bodies are sent in pieces: whole, they hold up the event loop."""

    async def _post(self, *, request_body: Any, **more: Any) -> Any:
        if isinstance(request_body, bytes):
            request_body = io.BytesIO(request_body)
        return await super()._post(request_body=request_body, **more)
