"""HTTP: for what lies behind something that speaks nothing else; no streams, no cancelling."""

from __future__ import annotations

import io
import os
import socket
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import gevent
import tritonclient.http
import tritonclient.http.aio
from aiohttp import ClientConnectorError, ClientError
from gevent.hub import set_hub
from geventhttpclient.response import HTTPParseError

from panotriton.client.transports.base import (
    CONNECT_TIMEOUT_S,
    Awaited,
    OfOneLoop,
    Pending,
    Transport,
)
from panotriton.client.twins import resolved
from panotriton.errors import (
    InvalidInput,
    ModelUnavailable,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
)

__all__ = ["Asynchronous", "Blocking"]

_threads = threading.local()
_IMPORTED_IN = os.getpid()
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # seconds, seconds, tries


class _Loop:
    """gevent's event loop of a thread, whose descriptors are closed with the last that needs it."""

    def __init__(self) -> None:
        self.process, self.thread = os.getpid(), threading.get_ident()
        self.hub = gevent.get_hub()

    def __del__(self) -> None:
        if not self.hub.main_hub and self.process == os.getpid():
            self.hub.destroy(destroy_loop=True)


def _loop() -> _Loop:
    """This thread's. After a fork it is the parent's as well, until it begins anew."""
    loop = getattr(_threads, "loop", None)
    if loop is None or loop.process != os.getpid():
        if os.getpid() != _IMPORTED_IN:
            gevent.reinit()
        loop = _threads.loop = _Loop()
    return loop


class _OfThread:
    """A connection, closed where the thread that has it ends, before its loop is."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._loop = _loop()

    def __del__(self) -> None:
        # At a thread's end gevent has forgotten its loop, and would make another one to close with.
        if self._loop.thread == threading.get_ident():
            set_hub(self._loop.hub)


def keep_alive(sock: Any) -> None:
    """Ask after a server that computes: what stands between drops connections on which nothing passes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
        if hasattr(socket, option):  # Linux's
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _kept_alive(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    keep_alive(sock)
    return sock


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
        work = getattr(self.questions, question)
        pending = self._start(work, *arguments, **self.options(within_s), **named)
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
        return self._start(self.connection.infer, model, inputs, **options)

    def _start(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Pending:
        """Send what this method of a connection sends."""
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
    """A connection for each thread, of each process: tritonclient's belongs to one."""

    def __init__(self, *address: Any) -> None:
        super().__init__(*address)
        self._connections = weakref.WeakSet()
        self._local = threading.local()

    @property
    def connection(self) -> Any:
        self._meet_fork()
        own = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = _OfThread(self.connect())
        return own.connection

    def _after_fork(self) -> None:
        super()._after_fork()
        self._local = threading.local()

    @property
    def questions(self) -> Any:
        """The same, which has a socket for each of two requests."""
        return self.connection

    def _connect(self) -> Any:
        tls = {"ssl": True, "ssl_context_factory": self.tls.gevent_context} if self.tls else {}
        # Two sockets: one to ask whether the server lives while the other waits, for as long as it takes.
        limits = {"connection_timeout": CONNECT_TIMEOUT_S, "network_timeout": None}
        client = self.library.InferenceServerClient(self.url, concurrency=2, **limits, **tls)
        client._client_stub._connection_pool.after_connect = keep_alive
        return client

    def _start(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Pending:
        return _Spawned(partial(work, *arguments, **options), partial(self._drop, self.connection))

    def _drop(self, connection: Any) -> None:
        """A connection with a request that nobody waits for is not used again."""
        own = getattr(self._local, "own", None)
        if own is not None and own.connection is connection:
            self._local.own = None


class Asynchronous(OfOneLoop, _Http):
    """Sessions of one event loop."""

    def _connect(self) -> Any:
        tls = {"ssl": True, "ssl_context": self.tls.context()} if self.tls else {}
        return _InPieces(self.url, conn_timeout=None, **tls)

    def _start(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Pending:
        return Awaited(work(*arguments, **options))


class _InPieces(tritonclient.http.aio.InferenceServerClient):  # type: ignore[misc]
    """Large bodies are sent in pieces: whole, they hold up the event loop."""

    def __init__(self, *address: Any, **options: Any) -> None:
        super().__init__(*address, **options)
        self._conn._socket_factory = _kept_alive

    async def _post(self, *, request_body: Any, **more: Any) -> Any:
        if isinstance(request_body, bytes):
            request_body = io.BytesIO(request_body)
        return await super()._post(request_body=request_body, **more)
