"""What both clients ask of a server and make of its answers, once, as coroutines: see `twins`."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

from panotriton.client import wire
from panotriton.client.calls import Call, Plan, Stream, naming_file
from panotriton.client.cuda import CudaSlot, check_cuda
from panotriton.client.shared_memory import Pool, Slot, SystemSlot, layout
from panotriton.client.tls import Tls
from panotriton.client.transports import transport
from panotriton.client.transports.base import CONNECT_TIMEOUT_S, Pending, Witness
from panotriton.client.twins import resolved
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
    SharedMemoryError,
    quoted,
)
from panotriton.pipeline.channel import (
    DEATHS,
    REFUSES_SINCE,
    SILENT_S,
    WATCH_EVERY_S,
    in_trouble,
    release,
)
from panotriton.pipeline.events import Event
from panotriton.pipeline.files import WEIGHTS
from panotriton.pipeline.networks import NETWORKS, PIPELINE
from panotriton.pipeline.results import Health, Model, StageTime, Timings

__all__ = ["Conversation", "finished", "waits"]

T = TypeVar("T")
P = TypeVar("P", bound=Pool)

_BACKOFF_S = 0.25
_TROUBLE_BACKOFF = 4  # times as long: a process starts, a queue only moves on
_STATISTICS_WAIT_S = 0.1
_STREAM = "panorama_stream"
_WEIGHED = tuple(filter(None, (PIPELINE, NETWORKS[PIPELINE].tagger, "qwen")))


class Conversation:
    """The base of `Client` and `AsyncClient`, which differ in how they wait."""

    _asynchronous: ClassVar[bool]

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        protocol: str = "grpc",
        timeout_s: float | None = None,
        retries: int = 2,
        timings: bool = False,
        tls: bool | Tls = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        speaks = transport(protocol, asynchronous=self._asynchronous)
        self._transport = speaks(url, tls, headers)
        self.url = url
        self.protocol = protocol
        self._timeout_s = timeout_s
        self._retries = retries
        self._wants_timings = timings
        self._reached = False  # it answers, as far as we know
        self._known = False  # it has answered
        self._refuses = False  # to let go of memory that it uses

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that are spawned, and workers of a cluster: one like it, not yet connected."""
        options: dict[str, Any] = {
            "protocol": self.protocol,
            "timeout_s": self._timeout_s,
            "retries": self._retries,
            "timings": self._wants_timings,
            "tls": self._transport.tls or False,
            "headers": self._transport.headers,
        }
        return partial(type(self), self.url, **options), ()

    async def _health(self) -> Health:
        metadata = await self._ask("get_server_metadata")
        live, ready = await self._is("is_server_live"), await self._is("is_server_ready")
        return wire.health(live, ready, metadata)

    async def _models(self) -> list[Model]:
        try:
            return wire.models(await self._ask("get_model_repository_index"))
        except InferenceFailed:  # over HTTP `serve` shows it to the holder of a key alone
            return wire.loaded(await self._ask("get_inference_statistics", model_name=""))

    async def _weights(self) -> dict[str, str]:
        found: dict[str, str | None] = {}
        missing: PanotritonError | None = None
        for model in _WEIGHED:
            try:
                config = await self._ask("get_model_config", model_name=model)
            except (
                InferenceFailed,
                InvalidInput,
                ModelUnavailable,
            ) as error:  # it has not that one
                missing = missing or error
            else:
                found[model] = wire.parameter(config, WEIGHTS)
        if missing and not found:
            raise ModelUnavailable(f"{self.url} serves no model of this pipeline: {missing}")
        return {model: weights for model, weights in found.items() if weights}

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
        return await self._retrying(lambda: self._once(call, via))

    async def _retrying(self, work: Callable[[], Awaitable[T]]) -> T:
        """The policy of what is done again, after a pause: what found no server, one in trouble, or no room.

        A request with which the server went twice may be why it went: it is not sent a third time.
        """
        deaths = 0
        for wait_s in (*waits(self._retries), None):
            try:
                return await self._reaching(work)
            except _Unreached as unreached:
                error: PanotritonError = unreached.why
            except (ServerBusy, ServerUnavailable) as again:
                error = again
            trouble = isinstance(error, ServerUnavailable)
            deaths += isinstance(error, ServerUnavailable) and error.lost
            if wait_s is None or deaths == DEATHS:
                raise error
            await resolved(self._transport.sleep(wait_s * (_TROUBLE_BACKOFF if trouble else 1)))
        raise AssertionError("the last try returns or raises")

    async def _reaching(self, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, of a server that answers: nothing is sent to one that does not."""
        try:
            await self._reach()
        except ConnectError as error:
            raise _Unreached(error) from error
        return await work()

    async def _reach(self) -> None:
        if not self._reached:
            version = (await self._ask("get_server_metadata"))["version"]
            self._transport.meet(version)
            self._refuses = release(version) >= REFUSES_SINCE
            self._reached = self._known = True

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
        late: list[Pending] = []
        try:
            tensors = await self._exchange(call, slot, places, late)
        except BaseException as error:
            if late:
                pool._leave(slot, late[0])
            elif isinstance(error, (InvalidInput, ModelUnavailable)) and slot.name in str(error):
                pool._forget_unknown(slot)
                raise ServerUnavailable(
                    f"another server answers at {self.url}, which has no part in this memory: {error}"
                ) from error
            else:
                pool._done(slot, reusable=finished(error))
            raise
        return pool._results(slot, tensors, places.outputs)

    async def _exchange(
        self,
        call: Call[Any],
        slot: Any = None,
        places: Any = None,
        late: list[Pending] | None = None,
    ) -> dict[str, Any]:
        if slot is None:
            self._check_answer(call)
        inputs = wire.encode(self._transport.library, call.inputs, slot, places)
        outputs = wire.requested(self._transport.library, call.outputs, slot, places)
        timeout_s = self._timeout_s or call.timeout_s
        try:
            pending = self._transport.begin(
                call.model, inputs, outputs, timeout_s, lasting=late is not None
            )
            deadline = time.monotonic() + timeout_s
            result = await self._watched(pending, deadline, partial(self._drop, late))
        except self._transport.failures as error:
            found = await self._mapped(error, timeout_s)
            settled = await self._settled(call.model, found)
            raise naming_file(settled, call.files) from error
        return wire.decode(result, call.outputs, slot, places)

    def _check_answer(self, call: Call[Any]) -> None:
        """Before any work: what is too large for the protocol would be found out when all is computed."""
        nbytes, most = sum(call.outputs.values()), self._transport.most_bytes
        if most is not None and nbytes > most:
            raise InvalidInput(
                f"the answer of {call.model} may have {nbytes / 1e9:.1f} GB, and {self.protocol} passes on "
                f"{most / 1e9:.1f}: pass protocol='http' (--protocol http), or via=client.shared_memory(…), "
                "or ask for less: crop_size, upscale, interpolations"
            )

    async def _watched(
        self, pending: Pending, deadline: float, drop: Callable[[Pending, BaseException], None]
    ) -> Any:
        """The answer. While it does not come, the server is asked whether it lives.

        Pings and TCP know only that the machine does: a server that is stopped answers nobody. drop: what
        is done with a request that is waited for no more, told why.
        """
        ended = False
        try:
            while not ended:
                ended = await resolved(
                    pending.wait(min(WATCH_EVERY_S, deadline - time.monotonic()))
                )
                if not ended and (hopeless := await self._hopeless(deadline)):
                    raise hopeless
            return pending.result()
        except BaseException as why:
            if not ended:
                drop(pending, why)
            raise

    def _drop(self, late: list[Pending] | None, pending: Pending, why: BaseException) -> None:
        """Cancel it, unless it may still write to memory of ours, or the server cannot bear that."""
        goes_on = not self._transport.may_cancel
        had_its_time = isinstance(why, (TimeoutError, ServerUnavailable))
        if late is not None and (had_its_time or goes_on):
            late.append(pending)
        elif not goes_on:
            pending.cancel()
        if goes_on and not isinstance(
            why, KeyboardInterrupt
        ):  # who presses Ctrl-C waits for nothing
            self._transport.leave(pending)

    async def _hopeless(self, deadline: float) -> Exception | None:
        if time.monotonic() >= deadline:
            return TimeoutError()
        if await self._is("is_server_live", SILENT_S):
            return None
        self._reached = False
        return self._frozen()

    def _frozen(self) -> ServerUnavailable:
        return ServerUnavailable(
            f"the server at {self.url} holds the connection, but has not said for {SILENT_S:g} s that it "
            "lives: it is frozen, overloaded or cut off"
        )

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

    def _events(self, stream: Stream) -> AsyncGenerator[Event, None]:
        """Those of `panorama_stream`; raises InvalidInput at once where there are no streams."""
        timeout_s = self._timeout_s or stream.timeout_s
        deadline = time.monotonic() + timeout_s

        async def watch(pending: Pending) -> Any:
            return await self._watched(pending, deadline, lambda pending, _: pending.cancel())

        encoded = wire.encode(self._transport.library, stream.inputs)
        events = self._transport.stream(_STREAM, encoded, timeout_s, watch)
        return self._followed(events, timeout_s)

    async def _followed(
        self, events: AsyncGenerator[Event, None], timeout_s: float
    ) -> AsyncGenerator[Event, None]:
        await self._retrying(self._check_streams)  # a stream's error would carry no status code
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        except self._transport.failures as error:
            raise await self._mapped(error, timeout_s) from error
        except InferenceFailed as error:  # an event
            if in_trouble(str(error)):
                raise ServerUnavailable(f"{self.url}: {error}") from error
            raise

    async def _check_streams(self) -> None:
        if not await self._serves(_STREAM):
            with contextlib.suppress(InvalidInput, ModelUnavailable):
                await self._ask("get_model_metadata", model_name=_STREAM)  # unloaded: says so
            raise wire.not_served(_STREAM)

    async def _ask(self, question: str, **arguments: Any) -> Any:
        within_s = min(CONNECT_TIMEOUT_S, self._timeout_s or CONNECT_TIMEOUT_S)
        try:
            return await self._transport.ask(question, within_s=within_s, **arguments)
        except self._transport.failures as error:
            found = await self._mapped(error, within_s)
            if isinstance(found, RequestTimeout) and within_s == CONNECT_TIMEOUT_S:
                found = ServerUnavailable(f"{found}: it is frozen, overloaded or cut off")
            raise found from error

    async def _is(self, question: str, within_s: float | None = None) -> bool:
        within_s = within_s or CONNECT_TIMEOUT_S
        within_s = min(within_s, self._timeout_s or within_s)
        try:
            return bool(await self._transport.ask(question, within_s=within_s))
        except self._transport.failures:
            return False

    async def _mapped(self, error: BaseException, waited_s: float) -> Exception:
        doubtful = self._transport.doubtful(error) and not self._transport.cut_off(error)
        live = doubtful and await self._is("is_server_live")
        ready = live and await self._is("is_server_ready")
        found = self._transport.mapped(error, Witness(live, ready, self._known, waited_s))
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
        asks = (self._register, self._unregister, self._let_go)
        return pool(make_slot, max_bytes, views, wait_s, *asks)

    async def _register(self, slot: Slot) -> None:
        await self._reach()
        await self._memory(f"register_{slot.kind}_shared_memory", *slot.registration())

    async def _unregister(self, slot: Slot) -> None:
        await self._memory(f"unregister_{slot.kind}_shared_memory", slot.name)

    async def _let_go(self, slot: Slot) -> bool:
        """Whether no request of the server uses the slot any more, which then is unregistered."""
        if not self._refuses:
            return False
        try:
            await self._unregister(slot)
        except SharedMemoryError:
            return False
        return True

    async def _memory(self, question: str, *arguments: Any) -> None:
        try:
            await self._transport.ask(question, *arguments, within_s=CONNECT_TIMEOUT_S)
        except self._transport.failures as error:
            raise SharedMemoryError(
                f"{question.replace('_', ' ')} failed at {self.url}: {error}; the server must run on this "
                "machine and allow clients' shared memory"
            ) from error


class _Unreached(Exception):
    """No server answered before anything was sent. why: what the caller is told."""

    def __init__(self, why: ConnectError) -> None:
        super().__init__()
        self.why = why


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
