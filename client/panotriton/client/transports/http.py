"""HTTP: for what lies behind something that speaks nothing else; no streams, no cancelling."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import gevent
import tritonclient.http
import tritonclient.http.aio
from aiohttp import ClientConnectorError, ClientError
from geventhttpclient.response import HTTPParseError

from panotriton.client.transports.base import CONNECT_TIMEOUT_S, Awaited, Pending, Transport
from panotriton.client.twins import resolved
from panotriton.errors import (
    InvalidInput,
    ModelUnavailable,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
)

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
        "502": ServerUnavailable,  # a proxy's word
        "504": RequestTimeout,
    }
    unavailable = "503"

    def never_sent(self, error: BaseException) -> bool:
        return super().never_sent(error) or isinstance(error, ClientConnectorError)

    async def ask(self, question: str, *arguments: Any, within_s: float, **named: Any) -> Any:
        pending = self._start(question, *arguments, **self.options(within_s), **named)
        try:
            if await resolved(pending.wait(within_s)):
                return pending.result()
            raise TimeoutError(f"no answer within {within_s:g} s")
        except BaseException:
            pending.cancel()
            raise

    def begin(
        self,
        model: str,
        inputs: list[Any],
        outputs: list[Any],
        timeout_s: float,
        *,
        lasting: bool = False,
    ) -> Pending:
        options = self.call_options(timeout_s) | {"outputs": outputs}
        return self._start("infer", model, inputs, **options)

    def _start(self, question: str, *arguments: Any, **options: Any) -> Pending:
        """Send what tritonclient's method of that name sends."""
        raise NotImplementedError


class _Spawned:
    """A call in a greenlet beside the thread's own, which may meanwhile ask something else."""

    def __init__(self, work: Callable[[], Any], discard: Callable[[], None]) -> None:
        self._greenlet = gevent.spawn(self._run, work)
        self._discard = discard
        self._result: Any = None
        self._error: Exception | None = None

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._result = work()
        except Exception as error:  # raised where it is waited for
            self._error = error

    def wait(self, seconds: float) -> bool:
        self._greenlet.join(max(seconds, 0.0))
        return bool(self._greenlet.ready())

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> None:
        if not self._greenlet.ready():
            self._discard()
            self._greenlet.kill()

    def abandon(self, ended: Callable[[], None]) -> None:
        """It goes on whenever this thread waits for another answer."""
        self._discard()
        self._greenlet.link(lambda greenlet: ended())


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
        # Two sockets: one to ask whether the server lives while the other waits, for as long as it takes.
        limits = {"connection_timeout": CONNECT_TIMEOUT_S, "network_timeout": None}
        return self.library.InferenceServerClient(self.url, concurrency=2, **limits, **tls)

    def _start(self, question: str, *arguments: Any, **options: Any) -> Pending:
        connection = self.connection
        work = partial(getattr(connection, question), *arguments, **options)
        return _Spawned(work, partial(self._drop, connection))

    def _drop(self, connection: Any) -> None:
        """A connection with a request that nobody waits for is not used again."""
        if getattr(self._local, "connection", None) is connection:
            del self._local.connection


class Asynchronous(_Http):
    """One session for the loop in which it is first used."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _connect(self) -> Any:
        tls = {"ssl": True, "ssl_context": self.tls.context()} if self.tls else {}
        return _InPieces(self.url, conn_timeout=None, **tls)

    def _start(self, question: str, *arguments: Any, **options: Any) -> Pending:
        return Awaited(getattr(self.connection, question)(*arguments, **options))


class _InPieces(tritonclient.http.aio.InferenceServerClient):  # type: ignore[misc]
    """Large bodies are sent in pieces: whole, they hold up the event loop."""

    async def _post(self, *, request_body: Any, **more: Any) -> Any:
        if isinstance(request_body, bytes):
            request_body = io.BytesIO(request_body)
        return await super()._post(request_body=request_body, **more)
