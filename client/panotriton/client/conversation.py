"""What both clients ask of a server and make of its answers, once, as coroutines: see `twins`."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

from panotriton.client import wire
from panotriton.client.calls import Call, Plan, Value
from panotriton.client.cuda import CudaSlot, check_cuda
from panotriton.client.shared_memory import Pool, Slot, SystemSlot, layout
from panotriton.client.tls import Tls
from panotriton.client.transports import transport
from panotriton.client.twins import resolved
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    SharedMemoryError,
    quoted,
)
from panotriton.pipeline.events import Event
from panotriton.pipeline.results import Health, Model, StageTime, Timings

__all__ = ["Conversation", "finished", "waits"]

T = TypeVar("T")
P = TypeVar("P", bound=Pool)

_BACKOFF_S = 0.25
_STATISTICS_WAIT_S = 0.1
_STREAM = "panorama_stream"


class Conversation:
    """The base of `Client` and `AsyncClient`, which differ in how they wait."""

    _asynchronous: ClassVar[bool]

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
        speaks = transport(protocol, asynchronous=self._asynchronous)
        self._transport = speaks(url, timeout_s, tls, headers)
        self.url = url
        self.protocol = protocol
        self._retries = retries
        self._wants_timings = timings
        self._reached = False

    async def _health(self) -> Health:
        metadata = await self._ask("get_server_metadata")
        live, ready = await self._is("is_server_live"), await self._is("is_server_ready")
        return wire.health(live, ready, metadata)

    async def _models(self) -> list[Model]:
        return wire.models(await self._ask("get_model_repository_index"))

    async def _statistics(self, model: str) -> dict[str, StageTime]:
        try:
            report = await self._ask("get_inference_statistics", model_name=model)
        except InvalidInput as error:
            raise await self._settled(model, error) from error
        return wire.stage_times(report)

    async def _send_all(self, plan: Plan[Any], via: Pool | None) -> Any:
        return plan.merge([await self._part(plan, index, via) for index in range(len(plan.calls))])

    async def _part(self, plan: Plan[Any], index: int, via: Pool | None) -> Any:
        try:
            return await self._send(plan.calls[index], via)
        except (InvalidInput, InferenceFailed) as error:
            return plan.failed(index, error)

    async def _send(self, call: Call[T], via: Pool | None) -> T:
        await self._reach()
        return await self._retrying(ServerBusy, lambda: self._once(call, via))

    async def _reach(self) -> None:
        """Find the server before anything is sent that must not be sent twice."""
        if not self._reached:
            await self._retrying(ConnectError, lambda: self._ask("is_server_live"))
            self._reached = True

    async def _retrying(self, kind: type[Exception], work: Callable[[], Awaitable[T]]) -> T:
        """The policy of what is done again: `work`, after a failure of this kind and a pause."""
        for wait_s in waits(self._retries):
            try:
                return await work()
            except kind:
                await resolved(self._transport.sleep(wait_s))
        return await work()

    async def _once(self, call: Call[T], via: Pool | None) -> T:
        before = await self._stage(call.model)
        began = time.perf_counter()
        tensors = await (self._exchange(call) if via is None else self._through(call, via))
        total_ms = (time.perf_counter() - began) * 1e3
        return call.decode(tensors, await self._timings(call.model, total_ms, before))

    async def _through(self, call: Call[Any], pool: Pool) -> dict[str, Any]:
        places = layout(call)
        if not places.nbytes:
            return await self._exchange(call)
        slot = await pool._take(places.nbytes)
        try:
            tensors = await self._exchange(call, slot, places)
        except BaseException as error:
            pool._done(slot, reusable=finished(error))
            raise
        return pool._results(slot, tensors, places.outputs)

    async def _exchange(
        self, call: Call[Any], slot: Any = None, places: Any = None
    ) -> dict[str, Any]:
        inputs = wire.encode(self._transport.library, call.inputs, slot, places)
        outputs = wire.requested(self._transport.library, call.outputs, slot, places)
        try:
            result = await self._transport.infer(call.model, inputs, outputs)
        except self._transport.failures as error:
            raise await self._settled(call.model, await self._mapped(error)) from error
        return wire.decode(result, call.outputs, slot, places)

    async def _settled(self, model: str, error: Exception) -> Exception:
        """The server calls a request for a model that it does not serve an invalid argument."""
        if isinstance(error, InvalidInput) and not await self._serves(model):
            return wire.not_served(model)
        return error

    async def _serves(self, model: str) -> bool:
        try:
            return bool(await self._ask("is_model_ready", model_name=model))
        except (InvalidInput, ModelUnavailable):  # of a model that it has never heard of
            return False

    def _events(self, inputs: Mapping[str, Value]) -> AsyncGenerator[Event, None]:
        """Those of `panorama_stream`; raises InvalidInput at once where there are no streams."""
        encoded = wire.encode(self._transport.library, inputs)
        return self._followed(self._transport.stream(_STREAM, encoded))

    async def _followed(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        await self._reach()
        if not await self._serves(_STREAM):
            raise wire.not_served(_STREAM)  # a stream's error would carry no status code
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        except self._transport.failures as error:
            raise await self._mapped(error) from error

    async def _ask(self, question: str, **arguments: Any) -> Any:
        try:
            return await self._transport.ask(question, **arguments)
        except self._transport.failures as error:
            raise await self._mapped(error) from error

    async def _is(self, question: str) -> bool:
        try:
            return bool(await self._transport.ask(question))
        except self._transport.failures:
            return False

    async def _mapped(self, error: BaseException) -> Exception:
        live = self._transport.doubtful(error) and await self._is("is_server_live")
        found = self._transport.mapped(error, live)
        self._reached = self._reached and not isinstance(found, ConnectError)
        return found

    async def _stage(self, model: str) -> StageTime | None:
        return (await self._statistics(model)).get(model) if self._wants_timings else None

    async def _timings(self, model: str, total_ms: float, before: StageTime | None) -> Timings:
        """The server counts a request a little after it has answered: ask until it has."""
        if before is None:
            return Timings(total_ms)
        deadline = time.monotonic() + _STATISTICS_WAIT_S
        while (after := await self._stage(model)) and after.requests == before.requests:
            if time.monotonic() > deadline:
                break
            await resolved(self._transport.sleep(0.001))
        return wire.timings(total_ms, before, after)

    def _pool(
        self, pool: type[P], max_bytes: int, kind: str, views: bool, wait_s: float, device: int
    ) -> P:
        make_slot = _slot_maker(kind, views, device)
        return pool(make_slot, max_bytes, views, wait_s, self._register, self._unregister)

    async def _register(self, slot: Slot) -> None:
        await self._reach()
        await self._memory(f"register_{slot.kind}_shared_memory", *slot.registration())

    async def _unregister(self, slot: Slot) -> None:
        await self._memory(f"unregister_{slot.kind}_shared_memory", slot.name)

    async def _memory(self, question: str, *arguments: Any) -> None:
        try:
            await self._transport.ask(question, *arguments)
        except self._transport.failures as error:
            raise SharedMemoryError(
                f"{question.replace('_', ' ')} failed at {self.url}: {error}; the server must run on this "
                "machine and allow clients' shared memory"
            ) from error


def waits(retries: int) -> Iterator[float]:
    """Seconds to wait before each retry: 0.25, 0.5, 1 …, each ± half, so that clients spread out."""
    for attempt in range(retries):
        yield _BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


def finished(error: BaseException) -> bool:
    """Whether the server has ended a request that failed so, and touches its memory no more."""
    answered = isinstance(error, PanotritonError)
    return answered and not isinstance(error, (RequestTimeout, ConnectError))


def _slot_maker(kind: str, views: bool, device: int) -> Callable[[int], Slot]:
    """What makes slots of this kind of memory; raises SharedMemoryError where it cannot work."""
    if kind == "system":
        return SystemSlot
    if kind != "cuda":
        raise SharedMemoryError(f"kind is {quoted(kind)}; expected 'system' or 'cuda'")
    if views:
        raise SharedMemoryError("views are for kind='system'; CUDA results are copied, on the GPU")
    check_cuda(device)
    return partial(CudaSlot, device=device)
