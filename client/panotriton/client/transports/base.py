"""What clients need of a wire protocol: to connect, ask, infer and stream, and what its failures mean."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from types import ModuleType
from typing import Any, ClassVar

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
    quoted,
)
from panotriton.pipeline.events import Event

__all__ = ["CONNECT_TIMEOUT_S", "Transport"]

CONNECT_TIMEOUT_S = 10.0


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
    # The status of a full queue and of a server that is gone: only asking whether it lives tells.
    unavailable: ClassVar[str]

    def __init__(
        self, url: str, timeout_s: float, tls: bool | Tls, headers: Mapping[str, str] | None
    ) -> None:
        if "://" in url:
            raise InvalidInput(f"url is {quoted(url)}; expected host:port without a scheme")
        self.url = url
        self.timeout_s = timeout_s
        self.tls = tls if isinstance(tls, Tls) else Tls() if tls else None
        self.headers = {name.lower(): value for name, value in (headers or {}).items()}
        self._connections: list[Any] = []

    @property
    def connection(self) -> Any:
        """tritonclient's client, made when it is first used: it may belong to the running loop."""
        return self._connections[0] if self._connections else self.connect()

    def connect(self) -> Any:
        """One more connection, closed with the others."""
        self._connections.append(self._connect())
        return self._connections[-1]

    def _connect(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connections; safe to call twice."""
        while self._connections:
            await resolved(self._connections.pop().close())

    def options(self, timeout_s: float) -> dict[str, Any]:
        """For a request that may take `timeout_s`."""
        return {"headers": dict(self.headers)}  # a copy: tritonclient adds its own

    def call_options(self) -> dict[str, Any]:
        """For an inference: the time that it may take is told to the server too."""
        return self.options(self.timeout_s) | {"timeout": int(self.timeout_s * 1e6)}

    def sleep(self, seconds: float) -> Any:
        """Let the server, or another call, go on."""
        time.sleep(seconds)

    async def ask(self, question: str, *arguments: Any, **named: Any) -> Any:
        """One of tritonclient's small questions, which is answered at once, with JSON."""
        options = self.options(min(CONNECT_TIMEOUT_S, self.timeout_s)) | named
        return await resolved(getattr(self.connection, question)(*arguments, **options))

    async def infer(self, model: str, inputs: list[Any], outputs: list[Any]) -> Any:
        """tritonclient's result of one inference."""
        options = self.call_options()
        return await resolved(self.connection.infer(model, inputs, outputs=outputs, **options))

    def stream(self, model: str, inputs: list[Any]) -> AsyncGenerator[Event, None]:
        """Events as they come, `Done` at last; InvalidInput at once where none can be sent one by one."""
        raise InvalidInput(
            f"stream needs gRPC, this client speaks {self.name.upper()}: use Client('host:8001'), or "
            "process()"
        )

    def doubtful(self, error: BaseException) -> bool:
        """Whether only asking the server if it lives tells a full queue from a server that is gone."""
        return self.answer(error)[0] == self.unavailable

    def mapped(self, error: BaseException, live: bool) -> PanotritonError:
        """Our error for one of `failures`, by its status code. `live` settles the doubtful ones."""
        status, text = self.answer(error)
        message = (text or type(error).__name__).removeprefix("[request id: <id_unknown>] ").strip()
        kind = self.errors.get(status or "", InferenceFailed)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or kind is RequestTimeout:
            return RequestTimeout(f"{self.url} did not answer within {self.timeout_s:g} s")
        if status == self.unavailable and live:
            return ServerBusy(f"{self.url}: {message}")
        answered = status is not None or isinstance(error, InferenceServerException)
        if status == self.unavailable or not answered:
            return ConnectError(
                f"no server answers over {self.name} at {self.url} ({message}); "
                "start one with `panotriton serve`, or name another with --url"
            )
        return kind(message)

    def answer(self, error: BaseException) -> tuple[str | None, str | None]:
        """The server's status code and its words; no code where none came, nor inside a stream."""
        if isinstance(error, InferenceServerException):
            return error.status(), error.message()
        return None, str(error)
