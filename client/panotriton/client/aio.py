"""`AsyncClient`: the methods of `Client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from panotriton.client import calls, wire
from panotriton.client.calls import Call, Plan
from panotriton.client.client import check_kind, check_streams
from panotriton.client.pixels import ImageLike
from panotriton.client.shared_memory import AsyncSharedMemory, Slot, layout
from panotriton.client.wire import Tls
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    ServerBusy,
    SharedMemoryError,
)
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import DEFAULTS, Options
from panotriton.pipeline.events import Event, event_from_tensors
from panotriton.pipeline.results import (
    Cropped,
    Description,
    Group,
    Health,
    Model,
    Score,
    StageTime,
    Timings,
    Upscaled,
)

__all__ = ["AsyncClient"]

T = TypeVar("T")
_STATISTICS_WAIT_S = 0.1


class AsyncClient:
    """`Client` for asyncio: the same arguments, results and errors; use it in an `async with` block.

    Any number of calls may be in flight. Cancelling a task cancels its request: over gRPC the
    server's models can see it, over HTTP only the wait ends. It belongs to the
    event loop in which it is first used.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        protocol: str = "grpc",
        timeout_s: float = 3600.0,
        retries: int = 2,
        timings: bool = False,
        tls: bool | Tls = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._address = wire.address(url, protocol, timeout_s, tls, headers)
        self.url = url
        self.protocol = protocol
        self._retries = retries
        self._wants_timings = timings
        self._wire = wire.import_wire(protocol, asynchronous=True)
        self._failures = wire.failures(protocol)
        self._open: Any = None
        self._reached = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; safe to call twice."""
        if self._open is not None:
            await self._open.close()
            self._open = None

    async def ready(self) -> bool:
        """Whether a server answers there and all its models are ready."""
        return await self._is("is_server_ready")

    async def health(self) -> Health:
        """Whether it lives and is ready, and the server's name and version."""
        metadata = await self._ask("get_server_metadata")
        return wire.health(await self._is("is_server_live"), await self.ready(), metadata)

    async def models(self) -> list[Model]:
        """The models of the server's repository, and which of them are ready."""
        return wire.models(await self._ask("get_model_repository_index"))

    async def statistics(self, model: str = "") -> dict[str, StageTime]:
        """Totals since the server started, by model name: all models, or one."""
        try:
            report = await self._ask("get_inference_statistics", model_name=model)
        except InvalidInput as error:
            raise await self._settled(model, error) from error
        return wire.stage_times(report)

    async def process(
        self,
        panorama_1: ImageLike,
        panorama_2: ImageLike,
        *,
        seed: int | None = None,
        cameras: NDArray[np.float64] | None = None,
        crop_size: int = DEFAULTS.crop_size,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        threshold: float = DEFAULTS.threshold,
        interpolations: int = DEFAULTS.interpolations,
        intermediates: bool = False,
        via: AsyncSharedMemory | None = None,
    ) -> Group:
        """`Client.process`."""
        call = calls.process(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(crop_size, upscale, align, prompt, threshold, interpolations),
            intermediates=intermediates,
            cuda=_is_cuda(via),
        )
        return await self._send(call, via)

    def stream(
        self,
        panorama_1: ImageLike,
        panorama_2: ImageLike,
        *,
        seed: int | None = None,
        cameras: NDArray[np.float64] | None = None,
        crop_size: int = DEFAULTS.crop_size,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        threshold: float = DEFAULTS.threshold,
        interpolations: int = DEFAULTS.interpolations,
    ) -> AsyncIterator[Event]:
        """`Client.stream`; cancelling the task that iterates cancels the request."""
        inputs = calls.stream(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(crop_size, upscale, align, prompt, threshold, interpolations),
        )
        check_streams(self.protocol)
        return self._events(Call("panorama_stream", inputs, {}, lambda tensors, timings: None))

    @overload
    async def upscale(
        self,
        images: ImageLike,
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        via: AsyncSharedMemory | None = None,
    ) -> Upscaled: ...

    @overload
    async def upscale(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: Literal[False] = False,
        via: AsyncSharedMemory | None = None,
    ) -> list[Upscaled]: ...

    @overload
    async def upscale(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: Literal[True],
        via: AsyncSharedMemory | None = None,
    ) -> list[Upscaled | PanotritonError]: ...

    async def upscale(
        self,
        images: Any,
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: bool = False,
        via: AsyncSharedMemory | None = None,
    ) -> Any:
        """`Client.upscale`."""
        plan = calls.upscale(
            images,
            options=Options(upscale=upscale, align=align, prompt=prompt),
            cuda=_is_cuda(via),
            return_exceptions=return_exceptions,
        )
        return await self._send_all(plan, via)

    @overload
    async def score(
        self, images: ImageLike, *, mode: str = "generate", via: AsyncSharedMemory | None = None
    ) -> Score: ...

    @overload
    async def score(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        mode: str = "generate",
        return_exceptions: Literal[False] = False,
        via: AsyncSharedMemory | None = None,
    ) -> list[Score]: ...

    @overload
    async def score(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        mode: str = "generate",
        return_exceptions: Literal[True],
        via: AsyncSharedMemory | None = None,
    ) -> list[Score | PanotritonError]: ...

    async def score(
        self,
        images: Any,
        *,
        mode: str = "generate",
        return_exceptions: bool = False,
        via: AsyncSharedMemory | None = None,
    ) -> Any:
        """`Client.score`."""
        return await self._send_all(
            calls.score(images, mode=mode, cuda=_is_cuda(via), return_exceptions=return_exceptions),
            via,
        )

    @overload
    async def describe(
        self, images: ImageLike, *, via: AsyncSharedMemory | None = None
    ) -> Description: ...

    @overload
    async def describe(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        return_exceptions: Literal[False] = False,
        via: AsyncSharedMemory | None = None,
    ) -> list[Description]: ...

    @overload
    async def describe(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        return_exceptions: Literal[True],
        via: AsyncSharedMemory | None = None,
    ) -> list[Description | PanotritonError]: ...

    async def describe(
        self,
        images: Any,
        *,
        return_exceptions: bool = False,
        via: AsyncSharedMemory | None = None,
    ) -> Any:
        """`Client.describe`."""
        return await self._send_all(
            calls.describe(images, cuda=_is_cuda(via), return_exceptions=return_exceptions), via
        )

    @overload
    async def crop(
        self,
        panorama: ImageLike,
        cameras: Camera,
        *,
        size: int = DEFAULTS.crop_size,
        via: AsyncSharedMemory | None = None,
    ) -> Cropped: ...

    @overload
    async def crop(
        self,
        panorama: ImageLike,
        cameras: Sequence[Camera],
        *,
        size: int = DEFAULTS.crop_size,
        via: AsyncSharedMemory | None = None,
    ) -> list[Cropped]: ...

    async def crop(
        self,
        panorama: ImageLike,
        cameras: Any,
        *,
        size: int = DEFAULTS.crop_size,
        via: AsyncSharedMemory | None = None,
    ) -> Any:
        """`Client.crop`."""
        plan = calls.crop(panorama, cameras, size=size, cuda=_is_cuda(via))
        return await self._send_all(plan, via)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
        *,
        via: AsyncSharedMemory | None = None,
    ) -> dict[str, NDArray[Any]]:
        """`Client.infer`."""
        return await self._send(calls.infer(model, inputs, outputs), via)

    def shared_memory(
        self,
        max_bytes: int,
        kind: Literal["system", "cuda"] = "system",
        *,
        views: bool = False,
        wait_s: float = 60.0,
        device: int = 0,
    ) -> AsyncSharedMemory:
        """`Client.shared_memory`, for an `async with` block."""
        make_slot = check_kind(kind, views, device)
        return AsyncSharedMemory(
            make_slot, max_bytes, views, wait_s, self._register, self._unregister
        )

    @property
    def _connection(self) -> Any:
        if self._open is None:  # not before: it belongs to the running loop
            make = (
                wire.async_http_client
                if self.protocol == "http"
                else self._wire.InferenceServerClient
            )
            self._open = make(self.url, **self._connect_options())
        return self._open

    def _connect_options(self) -> dict[str, Any]:
        where = self._address
        if where.is_grpc:
            return where.grpc_options()
        options: dict[str, Any] = {"conn_timeout": where.timeout_s}
        return options | ({"ssl": True, "ssl_context": where.tls.context()} if where.tls else {})

    async def _send_all(self, plan: Plan[Any], via: AsyncSharedMemory | None) -> Any:
        return plan.merge([await self._part(plan, index, via) for index in range(len(plan.calls))])

    async def _part(self, plan: Plan[Any], index: int, via: AsyncSharedMemory | None) -> Any:
        try:
            return await self._send(plan.calls[index], via)
        except (InvalidInput, InferenceFailed) as error:
            return plan.failed(index, error)

    async def _send(self, call: Call[T], via: AsyncSharedMemory | None) -> T:
        await self._reach()
        return await self._retrying(ServerBusy, lambda: self._once(call, via))

    async def _reach(self) -> None:
        """Find the server before anything is sent that must not be sent twice."""
        if not self._reached:
            await self._retrying(ConnectError, lambda: self._ask("is_server_live"))
            self._reached = True

    async def _retrying(self, kind: type[Exception], work: Callable[[], Awaitable[T]]) -> T:
        for wait_s in wire.waits(self._retries):
            try:
                return await work()
            except kind:
                await asyncio.sleep(wait_s)
        return await work()

    async def _once(self, call: Call[T], via: AsyncSharedMemory | None) -> T:
        before = await self._stage(call.model)
        began = time.perf_counter()
        tensors = await (self._exchange(call) if via is None else self._through(call, via))
        total_ms = (time.perf_counter() - began) * 1e3
        return call.decode(tensors, await self._timings(call.model, total_ms, before))

    async def _through(self, call: Call[Any], pool: AsyncSharedMemory) -> dict[str, Any]:
        places = layout(call)
        if not places.nbytes:
            return await self._exchange(call)
        slot = await pool._take(places.nbytes)
        try:
            tensors = await self._exchange(call, slot, places)
        except BaseException as error:
            pool._done(slot, reusable=wire.finished(error))
            raise
        return pool._results(slot, tensors, places.outputs)

    async def _exchange(
        self, call: Call[Any], slot: Any = None, places: Any = None
    ) -> dict[str, Any]:
        inputs, outputs = wire.encode(self._wire, call, slot, places)
        options = self._address.call_options()
        try:
            result = await self._connection.infer(call.model, inputs, outputs=outputs, **options)
        except self._failures as error:
            raise await self._settled(call.model, await self._mapped(error)) from error
        return wire.decode(result, call, slot, places)

    async def _settled(self, model: str, error: Exception) -> Exception:
        """The server calls a request for a model that it does not serve an invalid argument."""
        if isinstance(error, InvalidInput) and not await self._serves(model):
            return wire.not_served(model)
        return error

    async def _serves(self, model: str) -> bool:
        try:
            return bool(await self._ask("is_model_ready", model_name=model))
        except (
            InvalidInput,
            ModelUnavailable,
        ):  # what it says of a model that it has never heard of
            return False

    async def _events(self, call: Call[Any]) -> AsyncIterator[Event]:
        await self._reach()
        if not await self._serves(call.model):
            raise wire.not_served(call.model)  # a stream's error would carry no status code
        inputs, _ = wire.encode(self._wire, call)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": call.model, "inputs": inputs}

        responses = self._connection.stream_infer(
            requests(),
            stream_timeout=self._address.timeout_s,
            headers=self._address.headers_for_one(),
        )
        try:
            async for event in self._received(responses):
                yield event
        finally:
            responses.cancel()

    async def _received(self, responses: Any) -> AsyncIterator[Event]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                try:
                    result, error = await responses.__anext__()
                except self._failures as failure:
                    raise await self._mapped(failure) from failure
                if error is not None:
                    raise await self._mapped(error) from error
                yield event_from_tensors(wire.event_tensors(result))

    async def _ask(self, question: str, **arguments: Any) -> Any:
        """One of tritonclient's small questions; gRPC's answers as the JSON that HTTP gives."""
        options = self._address.short_options() | arguments
        if self._address.is_grpc and question.startswith("get_"):
            options["as_json"] = True
        try:
            return await getattr(self._connection, question)(**options)
        except self._failures as error:
            raise await self._mapped(error) from error

    async def _is(self, question: str) -> bool:
        try:
            options = self._address.short_options()
            return bool(await getattr(self._connection, question)(**options))
        except self._failures:
            return False

    async def _mapped(self, error: BaseException) -> Exception:
        live = wire.doubtful(error) and await self._is("is_server_live")
        found = wire.mapped(self._address, error, live)
        self._reached = self._reached and not isinstance(found, ConnectError)
        return found

    async def _stage(self, model: str) -> StageTime | None:
        return (await self.statistics(model)).get(model) if self._wants_timings else None

    async def _timings(self, model: str, total_ms: float, before: StageTime | None) -> Timings:
        """The server counts a request a little after it has answered: ask until it has."""
        if before is None:
            return Timings(total_ms)
        deadline = time.monotonic() + _STATISTICS_WAIT_S
        while (after := await self._stage(model)) and after.requests == before.requests:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.001)
        return wire.timings(total_ms, before, after)

    async def _register(self, slot: Slot) -> None:
        await self._reach()
        await self._memory(f"register_{slot.kind}_shared_memory", *slot.registration())

    async def _unregister(self, slot: Slot) -> None:
        await self._memory(f"unregister_{slot.kind}_shared_memory", slot.name)

    async def _memory(self, question: str, *arguments: Any) -> None:
        try:
            options = self._address.short_options()
            await getattr(self._connection, question)(*arguments, **options)
        except self._failures as error:
            raise SharedMemoryError(
                f"{question.replace('_', ' ')} failed at {self.url}: {error}; the server must run on this "
                "machine and allow clients' shared memory"
            ) from error


def _is_cuda(via: AsyncSharedMemory | None) -> bool:
    return via is not None and via.on_gpu
