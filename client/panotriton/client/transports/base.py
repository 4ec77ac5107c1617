"""What clients need of a wire protocol: to connect, ask, infer and stream, and what its failures mean."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, MutableSet
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

from tritonclient.utils import InferenceServerException

from panotriton.client.tls import Tls
from panotriton.client.twins import resolved
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
    quoted,
)
from panotriton.pipeline.channel import MAX_PORT, in_trouble
from panotriton.pipeline.events import Event

__all__ = [
    "CONNECT_TIMEOUT_S",
    "Awaited",
    "OfOneLoop",
    "Pending",
    "Transport",
    "Watch",
    "Witness",
    "check_url",
]

CONNECT_TIMEOUT_S = 10.0


class Pending(Protocol):
    """A request that is out.

    wait: whether the answer has come within so many seconds; an asynchronous one's is awaited. result:
    the answer, or raises why there is none. cancel: nobody wants it any more. abandon: neither, but it
    goes on, for it may touch memory of ours; `ended` is called from any thread when it does no more.
    """

    def wait(self, seconds: float) -> Any: ...
    def result(self) -> Any: ...
    def cancel(self) -> None: ...
    def abandon(self, ended: Callable[[], None]) -> None: ...


Watch = Callable[[Pending], Awaitable[Any]]
"""Waits for an answer as long as there is hope for one."""


class Awaited:
    """A coroutine that the event loop works on."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def wait(self, seconds: float) -> bool:
        await asyncio.wait({self._task}, timeout=max(seconds, 0.0))
        return self._task.done()

    def result(self) -> Any:
        return self._task.result()

    def cancel(self) -> None:
        self._task.cancel()

    def abandon(self, ended: Callable[[], None]) -> None:
        self._task.add_done_callback(lambda task: ended())


@dataclass(frozen=True)
class Witness:
    """What a client knows when a request fails, beside the failure.

    live, ready: what the server answers, asked afterwards, where the failure leaves doubt. known: whether
    it has answered before. waited_s: how long the request was allowed to take.
    """

    live: bool
    ready: bool
    known: bool
    waited_s: float


def check_url(url: str) -> None:
    """Raise InvalidInput unless `url` is host:port, as both protocols take it."""
    if "://" in url:
        raise InvalidInput(f"url is {quoted(url)}; expected host:port without a scheme")
    host, _, port = url.partition("/")[0].rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) <= MAX_PORT):
        raise InvalidInput(f"url is {quoted(url)}; expected host:port as localhost:8001")


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise InvalidInput for a name or a value that no request can carry."""
    for text in (*headers, *headers.values()):
        if not (text.isascii() and text.isprintable()):
            raise InvalidInput(
                f"a header has {text[:20]!a}; expected printable ASCII: encode it first"
            )


class Transport:
    """A protocol's way to one server, checked when made, not contacted.

    A module of this package has two of them, `Blocking` and `Asynchronous`; coroutines of the
    blocking one never wait for an event loop, see `twins`.
    """

    name: ClassVar[str]
    library: ClassVar[ModuleType]  # tritonclient's
    failures: ClassVar[tuple[type[BaseException], ...]] = (
        InferenceServerException,
        OSError,
        asyncio.TimeoutError,  # not OSError's before Python 3.11
    )
    # Status codes → our errors; any other is InferenceFailed.
    errors: ClassVar[Mapping[str, type[PanotritonError]]]
    most_bytes: ClassVar[int | None] = None  # that an answer can have
    # The status of a full queue and of a server that is gone: only asking whether it lives tells.
    unavailable: ClassVar[str]

    def __init__(self, url: str, tls: bool | Tls, headers: Mapping[str, str] | None) -> None:
        check_url(url)
        check_headers(headers or {})
        self.url = url
        self.tls = tls if isinstance(tls, Tls) else Tls() if tls else None
        self.headers = {name.lower(): value for name, value in (headers or {}).items()}
        self._connections: MutableSet[Any] = set()
        self._kept: dict[str, Any] = {}
        self._keeping = threading.Lock()
        self._process = os.getpid()
        self._inherited: list[Any] = []

    @property
    def connection(self) -> Any:
        """tritonclient's client, made when it is first used: it may belong to the running loop."""
        return self._keep("tensors")

    @property
    def questions(self) -> Any:
        """Another one, for what is answered at once.

        Behind tensors on a slow link, or where as many requests are out as a proxy lets through at once, the
        question whether the server lives would wait with what it asks about.
        """
        return self._keep("questions")

    def _keep(self, purpose: str) -> Any:
        self._meet_fork()
        with self._keeping:
            self._settle()
            if purpose not in self._kept:
                self._kept[purpose] = self.connect()
            return self._kept[purpose]

    def _meet_fork(self) -> None:
        if self._process != os.getpid():
            self._after_fork()

    def _after_fork(self) -> None:
        """Leave the parent's connections alone: what both processes read or send there, neither gets whole.

        Nor are they closed here, which gRPC does not bear.
        """
        self._inherited += self._connections
        self._connections = type(self._connections)()
        self._kept = {}
        self._keeping = threading.Lock()  # a thread of the parent's may have held the other
        self._process = os.getpid()

    def _settle(self) -> None:
        """Let go of connections that cannot be used where this is called."""

    def connect(self) -> Any:
        """One more connection, closed with the others."""
        connection = self._connect()
        self._connections.add(connection)
        return connection

    def _connect(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._meet_fork()
        self._kept.clear()
        while self._connections:
            await resolved(self._connections.pop().close())

    def options(self, timeout_s: float) -> dict[str, Any]:
        """For a request that may take `timeout_s`."""
        return {"headers": dict(self.headers)}  # a copy: tritonclient adds its own

    def call_options(self, timeout_s: float) -> dict[str, Any]:
        """For an inference: the time that it may take is told to the server too."""
        return self.options(timeout_s) | {"timeout": int(timeout_s * 1e6)}

    may_cancel = True
    """Whether a request that nobody waits for any more is cancelled, or left to end unheard."""

    def meet(self, version: str) -> None:
        """Learn which release of the server answers."""

    def leave(self, pending: Pending) -> None:
        """Let a request end that nobody waits for."""
        raise NotImplementedError

    def sleep(self, seconds: float) -> Any:
        """Let the server, or another call, go on."""
        time.sleep(seconds)

    async def ask(self, question: str, *arguments: Any, within_s: float, **named: Any) -> Any:
        """One of tritonclient's small questions, which is answered at once, with JSON."""
        options = self.options(within_s) | named
        return await resolved(getattr(self.questions, question)(*arguments, **options))

    def begin(
        self,
        model: str,
        inputs: list[Any],
        outputs: list[Any],
        timeout_s: float,
        *,
        lasting: bool = False,
    ) -> Pending:
        """Send one inference, whose answer is tritonclient's result. lasting: it may be abandoned."""
        raise NotImplementedError

    def stream(
        self, model: str, inputs: list[Any], timeout_s: float, watch: Watch
    ) -> AsyncGenerator[Event, None]:
        """Events as they come, `Done` at last; InvalidInput at once where none can be sent one by one."""
        raise InvalidInput(
            f"stream needs gRPC, this client speaks {self.name.upper()}: use Client('host:8001'), or "
            "process()"
        )

    def doubtful(self, error: BaseException) -> bool:
        """Whether only asking the server tells what happened: to a full queue, a silence, its end."""
        return self._is_late(error) or self.answer(error)[0] == self.unavailable

    def never_sent(self, error: BaseException) -> bool:
        """Whether nobody was there to send the request to."""
        return isinstance(error, ConnectionRefusedError)

    def cut_off(self, error: BaseException) -> bool:
        """Whether the connection failed, in place of any word from the server."""
        return self.answer(error)[0] is None and not isinstance(error, InferenceServerException)

    def mapped(self, error: BaseException, seen: Witness) -> PanotritonError:
        """Our error for one of `failures`: by what the server did, then by its status code."""
        status, text = self.answer(error)
        message = (text or type(error).__name__).removeprefix("[request id: <id_unknown>] ").strip()
        if self._is_late(error):
            return self._late(seen)
        if in_trouble(message):
            return ServerUnavailable(f"{self.url}: {message}")
        if self.cut_off(error) or (status == self.unavailable and not seen.live):
            return self._gone(message, seen, lost=not self.never_sent(error))
        if status == self.unavailable and not seen.ready:
            return ServerUnavailable(f"{self.url} starts or stops: {message}")
        if status == self.unavailable:
            return ServerBusy(f"{self.url}: {message}")
        return self.errors.get(status or "", InferenceFailed)(message)

    def _is_late(self, error: BaseException) -> bool:
        kind = self.errors.get(self.answer(error)[0] or "")
        return isinstance(error, (TimeoutError, asyncio.TimeoutError)) or kind is RequestTimeout

    def _late(self, seen: Witness) -> RequestTimeout:
        state = (
            "it is alive: the request still waits or is computed there, give it longer (timeout_s)"
            if seen.live
            else "nor does it say that it is alive"
        )
        return RequestTimeout(f"{self.url} did not answer within {seen.waited_s:g} s; {state}")

    def _gone(self, message: str, seen: Witness, *, lost: bool) -> ConnectError:
        if seen.known:
            return ServerUnavailable(
                f"the server at {self.url} went before it answered ({message})", lost=lost
            )
        return ConnectError(
            f"no server answers over {self.name} at {self.url} ({message}); "
            "start one with `panotriton serve`, or name another with --url"
        )

    def answer(self, error: BaseException) -> tuple[str | None, str | None]:
        """The server's status code and its words; no code where none came, nor inside a stream."""
        if isinstance(error, InferenceServerException):
            return error.status(), error.message()
        return None, str(error)


class OfOneLoop(Transport):
    """Whose connections belong to the event loop in which they are first used, until that is closed."""

    _loop: asyncio.AbstractEventLoop | None = None

    def _after_fork(self) -> None:
        super()._after_fork()
        self._loop = None

    def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            if not self._loop.is_closed():
                raise InvalidInput(
                    "this AsyncClient is used in another event loop, which is still open: make one for each"
                )
            self._kept.clear()
            self._connections.clear()
        self._loop = loop

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
