"""gRPC: a cancelled call is cancelled in the server, and responses can come one by one."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, ClassVar

import tritonclient.grpc
import tritonclient.grpc.aio
from grpc import RpcError  # type: ignore[import-untyped]

from panotriton.client.transports.base import Transport
from panotriton.errors import InvalidInput, ModelUnavailable, RequestTimeout, ServerBusy
from panotriton.pipeline.events import Done, Event, event_from_tensors

__all__ = ["Asynchronous", "Blocking"]

# Messages of any size; and a server that was away is looked for every second, not, as by default, after
# up to two minutes: our own retries would find the channel asleep.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Where a server's error is longer than the usual 8 KB, gRPC says that it has no resources left.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class _Grpc(Transport):
    name = "grpc"
    library = tritonclient.grpc
    failures = (*Transport.failures, RpcError)  # tritonclient leaves those of awaited streams alone
    errors: ClassVar = {
        "StatusCode.INVALID_ARGUMENT": InvalidInput,
        "StatusCode.NOT_FOUND": ModelUnavailable,
        "StatusCode.RESOURCE_EXHAUSTED": ServerBusy,
        "StatusCode.DEADLINE_EXCEEDED": RequestTimeout,
    }
    unavailable = "StatusCode.UNAVAILABLE"

    def _connect(self) -> Any:
        tls = self.tls.grpc_options() if self.tls else {}
        return self.library.InferenceServerClient(self.url, channel_args=_CHANNEL, **tls)

    def options(self, timeout_s: float) -> dict[str, Any]:
        return super().options(timeout_s) | {"client_timeout": timeout_s}

    def stream_options(self) -> dict[str, Any]:
        """For a stream, however many responses it has."""
        return {"headers": dict(self.headers), "stream_timeout": self.timeout_s}

    async def ask(self, question: str, *arguments: Any, **named: Any) -> Any:
        if question.startswith("get_"):
            named["as_json"] = True
        return await super().ask(question, *arguments, **named)

    def answer(self, error: BaseException) -> tuple[str | None, str | None]:
        if isinstance(error, RpcError):
            return str(error.code()), error.details()
        return super().answer(error)


class Blocking(_Grpc):
    """One connection for all threads."""

    def __init__(self, *address: Any) -> None:
        super().__init__(*address)
        self._shared = self.connect()

    @property
    def connection(self) -> Any:
        return self._shared

    async def infer(self, model: str, inputs: list[Any], outputs: list[Any]) -> Any:
        """Asynchronous underneath, so that whatever interrupts the wait cancels the request."""
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

        def answered(result: Any, error: Any) -> None:
            answers.put((result, error))

        options = self.call_options()
        call = self.connection.async_infer(model, inputs, answered, outputs=outputs, **options)
        try:
            result, error = answers.get()
        except BaseException:
            call.cancel()
            raise
        if error is not None:
            raise error
        return result

    async def stream(self, model: str, inputs: list[Any]) -> AsyncGenerator[Event, None]:
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        connection = self.connect()  # of its own: tritonclient has one stream a connection
        event: Event | None = None
        try:
            connection.start_stream(
                lambda result, error: answers.put((result, error)), **self.stream_options()
            )
            connection.async_stream_infer(model, inputs)
            while not isinstance(event, Done):
                event = _event(*answers.get())
                yield event
        finally:
            connection.stop_stream(cancel_requests=not isinstance(event, Done))
            connection.close()
            with contextlib.suppress(ValueError):  # the client was closed before its stream
                self._connections.remove(connection)


class Asynchronous(_Grpc):
    """One connection for the loop in which it is first used."""

    library = tritonclient.grpc.aio

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def stream(self, model: str, inputs: list[Any]) -> AsyncGenerator[Event, None]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": inputs}

        responses = self.connection.stream_infer(requests(), **self.stream_options())
        try:
            async for result, error in responses:
                yield _event(result, error)
        finally:
            responses.cancel()


def _event(result: Any, error: Any) -> Event:
    """Of a stream's response, from only the outputs that it holds."""
    if error is not None:
        raise error
    outputs = result.get_response().outputs
    return event_from_tensors({output.name: result.as_numpy(output.name) for output in outputs})
