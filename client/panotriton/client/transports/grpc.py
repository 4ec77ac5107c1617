"""gRPC: responses can come one by one, and a stream or a call that is cancelled is so in the server."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, ClassVar

import tritonclient.grpc
import tritonclient.grpc.aio
from grpc import RpcError  # type: ignore[import-untyped]

from panotriton.client.transports.base import (
    Awaited,
    OfOneLoop,
    Pending,
    Transport,
    Watch,
    Witness,
)
from panotriton.client.twins import resolved
from panotriton.errors import (
    ConnectError,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
)
from panotriton.pipeline.channel import NEVER_SENT, channel, release
from panotriton.pipeline.events import Done, Event, event_from_tensors

__all__ = ["Asynchronous", "Blocking"]

# gRPC's own words for a connection that broke, and for a message that is larger than either side takes.
_CUT_OFF = (NEVER_SENT, "Socket closed", "GOAWAY", "onnection reset", "Broken pipe", "keepalive")
_TOO_LARGE = ("exceeds", "larger than max")
_NO_GRPC = "Received http2 header with status"  # a proxy's, or another server's


# Where a cancel, or the end of a call's time, meets its answer on the way, a server before 2.57 (25.04)
# frees the call's state while it is in use: it ends by SIGSEGV, or goes on with bytes that are not its own,
# and keeps memory for each (server pull requests 7840 and 8078). The handler of streams is another.
_CANCELS_SINCE = (2, 57)
_PARTING_S = 10.0  # to close a connection cancels what is out on it


class _Grpc(Transport):
    name = "grpc"
    library = tritonclient.grpc
    failures = (*Transport.failures, RpcError)  # tritonclient leaves those of awaited streams alone
    errors: ClassVar = {
        "StatusCode.INVALID_ARGUMENT": InvalidInput,
        "StatusCode.NOT_FOUND": ModelUnavailable,
        "StatusCode.RESOURCE_EXHAUSTED": ServerBusy,  # a proxy's word: Triton's is UNAVAILABLE
        "StatusCode.DEADLINE_EXCEEDED": RequestTimeout,
        "StatusCode.CANCELLED": ServerUnavailable,  # not by us: whoever cancels waits for no answer
    }
    unavailable = "StatusCode.UNAVAILABLE"
    most_bytes = (1 << 31) - 1  # protobuf's

    def __init__(self, *address: Any) -> None:
        super().__init__(*address)
        self.may_cancel = False
        self._left: set[Pending] = set()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._left = set()  # which the parent waits for

    def meet(self, version: str) -> None:
        self.may_cancel = release(version) >= _CANCELS_SINCE

    def leave(self, pending: Pending) -> None:
        self._left.add(pending)
        pending.abandon(lambda: self._left.discard(pending))

    async def close(self) -> None:
        deadline = time.monotonic() + _PARTING_S
        while self._left and time.monotonic() < deadline:
            await resolved(self.sleep(0.01))
        await super().close()

    def _connect(self) -> Any:
        tls = self.tls.grpc_options() if self.tls else {}
        return self.library.InferenceServerClient(self.url, channel_args=channel(self.url), **tls)

    def options(self, timeout_s: float) -> dict[str, Any]:
        return super().options(timeout_s) | {"client_timeout": timeout_s}

    def infer_options(self, timeout_s: float, lasting: bool) -> dict[str, Any]:
        """For an inference. gRPC cancels what has had its time: told only where that is wanted."""
        options = self.call_options(timeout_s)
        return options | {"client_timeout": None} if lasting or not self.may_cancel else options

    def stream_options(self, timeout_s: float) -> dict[str, Any]:
        """For a stream, however many responses it has."""
        return {"headers": dict(self.headers), "stream_timeout": timeout_s}

    async def ask(self, question: str, *arguments: Any, within_s: float, **named: Any) -> Any:
        if question.startswith("get_"):
            named["as_json"] = True
        return await super().ask(question, *arguments, within_s=within_s, **named)

    def answer(self, error: BaseException) -> tuple[str | None, str | None]:
        if isinstance(error, RpcError):
            return str(error.code()), error.details()
        return super().answer(error)

    def never_sent(self, error: BaseException) -> bool:
        return NEVER_SENT in (self.answer(error)[1] or "")

    def cut_off(self, error: BaseException) -> bool:
        status, text = self.answer(error)
        if status != self.unavailable:
            return super().cut_off(error)
        return any(words in (text or "") for words in _CUT_OFF)

    def mapped(self, error: BaseException, seen: Witness) -> PanotritonError:
        status, text = self.answer(error)
        if status == "StatusCode.RESOURCE_EXHAUSTED" and any(w in (text or "") for w in _TOO_LARGE):
            return InvalidInput(f"a name or message is larger than gRPC lets through: {text}")
        if _NO_GRPC in (text or ""):
            return ConnectError(
                f"{self.url} answers, but not as tritonserver's gRPC does ({text}): name its gRPC port "
                "with --url, or pass --protocol http"
            )
        return super().mapped(error, seen)


class _Queued:
    """What tritonclient answers from a thread of its own. start: given where to put it, sends."""

    def __init__(self, start: Callable[[Callable[[Any, Any], None]], Any]) -> None:
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._answer: tuple[Any, Any] = (None, None)
        self._lock = threading.Lock()
        self._answered_once = False
        self._ended: list[Callable[[], None]] = []
        self._call = start(self._answered)

    def _answered(self, result: Any, error: Any) -> None:
        self._answers.put((result, error))
        with self._lock:
            self._answered_once = True
            waiting, self._ended = self._ended, []
        for ended in waiting:
            ended()

    def wait(self, seconds: float) -> bool:
        try:
            self._answer = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return False
        return True

    def result(self) -> Any:
        result, error = self._answer
        if error is not None:
            raise error
        return result

    def cancel(self) -> None:
        if self._call is not None:  # a stream is stopped as a whole
            self._call.cancel()

    def abandon(self, ended: Callable[[], None]) -> None:
        with self._lock:
            if not self._answered_once:
                self._ended.append(ended)
                return
        ended()


class Blocking(_Grpc):
    """Connections for all threads."""

    def begin(
        self,
        model: str,
        inputs: list[Any],
        outputs: list[Any],
        timeout_s: float,
        *,
        lasting: bool = False,
    ) -> Pending:
        """Asynchronous underneath, so that the wait for it can be interrupted."""
        options = self.infer_options(timeout_s, lasting) | {"outputs": outputs}
        infer = self.connection.async_infer
        return _Queued(lambda answered: infer(model, inputs, answered, **options))

    async def stream(
        self, model: str, inputs: list[Any], timeout_s: float, watch: Watch
    ) -> AsyncGenerator[Event, None]:
        connection = self.connect()  # of its own: tritonclient has one stream a connection
        options = self.stream_options(timeout_s)
        event: Event | None = None
        requests: queue.Queue[Any] = queue.Queue()
        try:
            responses = _Queued(lambda answered: connection.start_stream(answered, **options))
            requests = connection._stream._request_queue
            connection.async_stream_infer(model, inputs)
            while not isinstance(event, Done):
                event = _event(await watch(responses))
                yield event
        finally:
            connection.stop_stream(cancel_requests=not isinstance(event, Done))
            # tritonclient leaves the thread that hands over a cancelled stream's requests waiting for the
            # next, for ever.
            requests.put(None)
            connection.close()
            self._connections.discard(connection)


class Asynchronous(OfOneLoop, _Grpc):
    """Connections of one event loop."""

    library = tritonclient.grpc.aio

    def begin(
        self,
        model: str,
        inputs: list[Any],
        outputs: list[Any],
        timeout_s: float,
        *,
        lasting: bool = False,
    ) -> Pending:
        options = self.infer_options(timeout_s, lasting) | {"outputs": outputs}
        return Awaited(self.connection.infer(model, inputs, **options))

    async def stream(
        self, model: str, inputs: list[Any], timeout_s: float, watch: Watch
    ) -> AsyncGenerator[Event, None]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": inputs}

        async def following() -> Any:
            async for result, error in responses:
                if error is not None:
                    raise error
                return result
            return None

        responses = self.connection.stream_infer(requests(), **self.stream_options(timeout_s))
        try:
            while (result := await watch(Awaited(following()))) is not None:
                yield _event(result)
        finally:
            responses.cancel()


def _event(result: Any) -> Event:
    """Of a stream's response, from only the outputs that it holds."""
    outputs = result.get_response().outputs
    return event_from_tensors({output.name: result.as_numpy(output.name) for output in outputs})
