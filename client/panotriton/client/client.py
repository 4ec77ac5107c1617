"""The client of the panorama pipeline over gRPC or HTTP. `aio.AsyncClient` mirrors it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from panotriton.client import calls, wire
from panotriton.client.calls import Call, Plan
from panotriton.client.cuda import CudaSlot, check_cuda
from panotriton.client.pixels import ImageLike
from panotriton.client.shared_memory import Pool, SharedMemory, Slot, SystemSlot, layout
from panotriton.client.wire import Tls
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    ServerBusy,
    SharedMemoryError,
    quoted,
)
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import DEFAULTS, Options
from panotriton.pipeline.events import Done, Event, event_from_tensors
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

__all__ = ["Client", "ImageLike", "Tls"]

T = TypeVar("T")
_STATISTICS_WAIT_S = 0.1


class Client:
    """A connection to a server that serves this repository's models.

    url is "host:port" without a scheme; protocol is "grpc" (port 8001 by custom) or "http" (8000).
    Nothing is sent before the first call. Threads may share a client; over HTTP each has a
    connection of its own. Use it in a `with` block.

    timeout_s bounds each request; the server is told. retries: how often a call is sent again that
    found no server or a full queue, after 0.25, 0.5, 1 … s ± half; nothing is repeated that may
    have begun. timings: ask the server what part of each request was queue, compute and network
    (two small requests more). tls: True, or a `Tls` with certificate files. headers go with every
    request, for authentication.

    Every method raises InvalidInput or InvalidImage for its arguments before anything is sent, and
    ConnectError, RequestTimeout, ServerBusy, ModelUnavailable, InvalidInput or InferenceFailed for
    what the server says. `via` sends a call's images through shared memory, see `shared_memory`.
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
        self._wire = wire.import_wire(protocol)
        self._failures = wire.failures(protocol)
        self._local = threading.local()
        self._connections: list[Any] = []
        self._shared = self._connect() if protocol == "grpc" else None
        self._reached = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        while self._connections:
            self._connections.pop().close()

    def ready(self) -> bool:
        """Whether a server answers there and all its models are ready."""
        try:
            return bool(self._connection.is_server_ready(**self._address.short_options()))
        except self._failures:
            return False

    def health(self) -> Health:
        """Whether it lives and is ready, and the server's name and version."""
        metadata = self._ask("get_server_metadata")
        return wire.health(self._live(), self.ready(), metadata)

    def models(self) -> list[Model]:
        """The models of the server's repository, and which of them are ready."""
        return wire.models(self._ask("get_model_repository_index"))

    def statistics(self, model: str = "") -> dict[str, StageTime]:
        """Totals since the server started, by model name: all models, or one."""
        try:
            return wire.stage_times(self._ask("get_inference_statistics", model_name=model))
        except InvalidInput as error:
            raise self._settled(model, error) from error

    def process(
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
        via: SharedMemory | None = None,
    ) -> Group:
        """Run the whole pipeline on two panoramas as one request.

        A panorama is the path of an image file (two paths are sent as they are and decoded
        by the server), a PIL image, a (H, W, 3) uint8 RGB array, or a (3, H, W) float torch tensor
        in [0, 1]; 64 px a side to 134 megapixels. Give `seed` (≥ 0) or `cameras` (2, 8, 2, 5), see
        `sample_cameras`; with neither, the seed is 0. crop_size: 64 to 2048 px. upscale: 1 to 4.
        align: adain, wavelet or nofix. threshold: 0 to 1. interpolations: 0 to 255 a sequence.
        `intermediates` also fetches the images before super-resolution.
        """
        call = calls.process(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(crop_size, upscale, align, prompt, threshold, interpolations),
            intermediates=intermediates,
            cuda=_is_cuda(via),
        )
        return self._send(call, via)

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
    ) -> Iterator[Event]:
        """The pipeline of `process`, each part as soon as it is done: see `panotriton.events`.

        An interval whose first pair fails the threshold is dropped without making the second.
        Leaving the loop, or closing the iterator, cancels: the server ends after the images that it
        is super-resolving. gRPC only: over HTTP raises InvalidInput.
        """
        inputs = calls.stream(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(crop_size, upscale, align, prompt, threshold, interpolations),
        )
        check_streams(self.protocol)
        return self._events(Call("panorama_stream", inputs, {}, _ignore))

    @overload
    def upscale(
        self,
        images: ImageLike,
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        via: SharedMemory | None = None,
    ) -> Upscaled: ...

    @overload
    def upscale(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: Literal[False] = False,
        via: SharedMemory | None = None,
    ) -> list[Upscaled]: ...

    @overload
    def upscale(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: Literal[True],
        via: SharedMemory | None = None,
    ) -> list[Upscaled | PanotritonError]: ...

    def upscale(
        self,
        images: Any,
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
        return_exceptions: bool = False,
        via: SharedMemory | None = None,
    ) -> Any:
        """Super-resolve one image (h, w, 3) to (upscale·h, upscale·w, 3), or a list of any sizes.

        With return_exceptions, as asyncio.gather has it, an image of a list that fails has its error
        in its place and the others their results; without, the first error is raised, for a bad image
        before anything is sent. `score` and `describe` do the same.

        Sides are rounded down to multiples of 8 px; 8 px a side at least. upscale: 1 to 4. align,
        what the colours are taken from the input by: adain, wavelet or nofix.
        """
        plan = calls.upscale(
            images,
            options=Options(upscale=upscale, align=align, prompt=prompt),
            cuda=_is_cuda(via),
            return_exceptions=return_exceptions,
        )
        return self._send_all(plan, via)

    @overload
    def score(
        self, images: ImageLike, *, mode: str = "generate", via: SharedMemory | None = None
    ) -> Score: ...

    @overload
    def score(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        mode: str = "generate",
        return_exceptions: Literal[False] = False,
        via: SharedMemory | None = None,
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        mode: str = "generate",
        return_exceptions: Literal[True],
        via: SharedMemory | None = None,
    ) -> list[Score | PanotritonError]: ...

    def score(
        self,
        images: Any,
        *,
        mode: str = "generate",
        return_exceptions: bool = False,
        via: SharedMemory | None = None,
    ) -> Any:
        """Score one pair image (H, 2H, 3), left | right, or a list; 28 px a side at least,
        and one side at most 200 times the other.

        mode: "generate" has the model write its reply; "expected" and "levels" read the final score in
        one pass, many times faster, with no sub-scores and no reply. They are other scores: a
        threshold has to be chosen anew, see SCORING.md.
        """
        return self._send_all(
            calls.score(images, mode=mode, cuda=_is_cuda(via), return_exceptions=return_exceptions),
            via,
        )

    @overload
    def describe(self, images: ImageLike, *, via: SharedMemory | None = None) -> Description: ...

    @overload
    def describe(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        return_exceptions: Literal[False] = False,
        via: SharedMemory | None = None,
    ) -> list[Description]: ...

    @overload
    def describe(
        self,
        images: list[Any] | tuple[Any, ...],
        *,
        return_exceptions: Literal[True],
        via: SharedMemory | None = None,
    ) -> list[Description | PanotritonError]: ...

    def describe(
        self,
        images: Any,
        *,
        return_exceptions: bool = False,
        via: SharedMemory | None = None,
    ) -> Any:
        """Describe one image (H, W, 3) in two or three sentences, or a list; 28 px a side at least."""
        return self._send_all(
            calls.describe(images, cuda=_is_cuda(via), return_exceptions=return_exceptions), via
        )

    @overload
    def crop(
        self,
        panorama: ImageLike,
        cameras: Camera,
        *,
        size: int = DEFAULTS.crop_size,
        via: SharedMemory | None = None,
    ) -> Cropped: ...

    @overload
    def crop(
        self,
        panorama: ImageLike,
        cameras: Sequence[Camera],
        *,
        size: int = DEFAULTS.crop_size,
        via: SharedMemory | None = None,
    ) -> list[Cropped]: ...

    def crop(
        self,
        panorama: ImageLike,
        cameras: Any,
        *,
        size: int = DEFAULTS.crop_size,
        via: SharedMemory | None = None,
    ) -> Any:
        """What one camera, or each of a list, sees of a panorama: (size, size, 3), 64 to 2048 px.

        `panotriton.crop` does the same on this machine. A path is sent as it is.
        """
        return self._send_all(calls.crop(panorama, cameras, size=size, cuda=_is_cuda(via)), via)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
        *,
        via: SharedMemory | None = None,
    ) -> dict[str, NDArray[Any]]:
        """One request to any model of the server: named arrays in, the named outputs out.

        With `via`, uint8 inputs of three axes or more travel through shared memory, and so do
        outputs that are given with the most bytes that they can have: {"IMAGES_SR": 1 << 20}.
        """
        return self._send(calls.infer(model, inputs, outputs), via)

    def shared_memory(
        self,
        max_bytes: int,
        kind: Literal["system", "cuda"] = "system",
        *,
        views: bool = False,
        wait_s: float = 60.0,
        device: int = 0,
    ) -> SharedMemory:
        """A pool of shared memory for `via=`: of this machine ("system") or of a GPU ("cuda").

        The server must run on this machine, for "cuda" on the same GPU (`device`). Slots are made on
        demand, up to max_bytes altogether, and used again; a call that finds the pool full waits
        wait_s and then raises SharedMemoryError. Results are copied out, unless `views`: then
        their pixels are the region itself, which goes back to the pool when nothing refers to them
        any more. With "cuda", results are CUDA tensors. Several threads may use one pool.
        """
        make_slot = check_kind(kind, views, device)
        return SharedMemory(make_slot, max_bytes, views, wait_s, self._register, self._unregister)

    def regions(self) -> list[str]:
        """Names of the shared-memory regions that clients have registered at the server."""
        return [
            name
            for kind in ("system", "cuda")
            for name in wire.region_names(self._ask(f"get_{kind}_shared_memory_status"))
        ]

    def unregister(self, name: str) -> None:
        """Make the server let go of a region, of either kind. For regions of clients that are gone:

        a pool unregisters its own, and unregistering another client's breaks its calls.
        """
        for kind in ("system", "cuda"):
            self._memory(f"unregister_{kind}_shared_memory", name)

    @property
    def _connection(self) -> Any:
        if self._shared is not None:
            return self._shared
        if not hasattr(self._local, "connection"):  # HTTP: tritonclient's belongs to one thread
            self._local.connection = self._connect()
        return self._local.connection

    def _connect(self) -> Any:
        where = self._address
        if where.is_grpc:
            options = where.grpc_options()
        else:
            options = {"connection_timeout": wire.CONNECT_TIMEOUT_S}
            options["network_timeout"] = where.timeout_s
            if where.tls:
                options |= {"ssl": True, "ssl_context_factory": where.tls.gevent_context}
        self._connections.append(self._wire.InferenceServerClient(where.url, **options))
        return self._connections[-1]

    def _send_all(self, plan: Plan[Any], via: SharedMemory | None) -> Any:
        return plan.merge([self._part(plan, index, via) for index in range(len(plan.calls))])

    def _part(self, plan: Plan[Any], index: int, via: SharedMemory | None) -> Any:
        try:
            return self._send(plan.calls[index], via)
        except (InvalidInput, InferenceFailed) as error:
            return plan.failed(index, error)

    def _send(self, call: Call[T], via: SharedMemory | None) -> T:
        self._reach()
        return self._retrying(ServerBusy, lambda: self._once(call, via))

    def _reach(self) -> None:
        """Find the server before anything is sent that must not be sent twice."""
        if not self._reached:
            self._retrying(ConnectError, lambda: self._ask("is_server_live"))
            self._reached = True

    def _retrying(self, kind: type[Exception], work: Callable[[], T]) -> T:
        for wait_s in wire.waits(self._retries):
            try:
                return work()
            except kind:
                time.sleep(wait_s)
        return work()

    def _once(self, call: Call[T], via: SharedMemory | None) -> T:
        before = self._stage(call.model)
        began = time.perf_counter()
        tensors = self._exchange(call) if via is None else self._through(call, via)
        total_ms = (time.perf_counter() - began) * 1e3
        return call.decode(tensors, self._timings(call.model, total_ms, before))

    def _through(self, call: Call[Any], pool: SharedMemory) -> dict[str, Any]:
        places = layout(call)
        if not places.nbytes:
            return self._exchange(call)
        slot = pool._take(places.nbytes)
        try:
            tensors = self._exchange(call, slot, places)
        except BaseException as error:
            pool._done(slot, reusable=wire.finished(error))
            raise
        return pool._results(slot, tensors, places.outputs)

    def _exchange(self, call: Call[Any], slot: Any = None, places: Any = None) -> dict[str, Any]:
        inputs, outputs = wire.encode(self._wire, call, slot, places)
        infer = self._infer_grpc if self._address.is_grpc else self._infer_http
        try:
            result = infer(call.model, inputs, outputs)
        except self._failures as error:
            raise self._settled(call.model, self._mapped(error)) from error
        return wire.decode(result, call, slot, places)

    def _settled(self, model: str, error: Exception) -> Exception:
        """The server calls a request for a model that it does not serve an invalid argument."""
        if isinstance(error, InvalidInput) and not self._serves(model):
            return wire.not_served(model)
        return error

    def _serves(self, model: str) -> bool:
        try:
            return bool(self._ask("is_model_ready", model_name=model))
        except (
            InvalidInput,
            ModelUnavailable,
        ):  # what it says of a model that it has never heard of
            return False

    def _infer_http(self, model: str, inputs: list[Any], outputs: list[Any]) -> Any:
        return self._connection.infer(
            model, inputs, outputs=outputs, **self._address.call_options()
        )

    def _infer_grpc(self, model: str, inputs: list[Any], outputs: list[Any]) -> Any:
        """Asynchronous underneath, so that whatever interrupts the wait cancels the request."""
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

        def answered(result: Any, error: Any) -> None:
            answers.put((result, error))

        options = self._address.call_options()
        call = self._connection.async_infer(model, inputs, answered, outputs=outputs, **options)
        try:
            result, error = answers.get()
        except BaseException:
            call.cancel()
            raise
        if error is not None:
            raise error
        return result

    def _events(self, call: Call[Any]) -> Iterator[Event]:
        self._reach()
        if not self._serves(call.model):
            raise wire.not_served(call.model)  # a stream's error would carry no status code
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        # A connection of its own: tritonclient has one stream a connection.
        connection = self._connect()
        finished = False
        try:
            connection.start_stream(
                lambda result, error: answers.put((result, error)),
                stream_timeout=self._address.timeout_s,
                headers=self._address.headers_for_one(),
            )
            inputs, _ = wire.encode(self._wire, call)
            connection.async_stream_infer(call.model, inputs)
            while not finished:
                event = self._received(*answers.get())
                finished = isinstance(event, Done)
                yield event
        finally:
            connection.stop_stream(cancel_requests=not finished)
            connection.close()
            self._connections.remove(connection)

    def _received(self, result: Any, error: Any) -> Event:
        if error is not None:
            raise self._mapped(error) from error
        return event_from_tensors(wire.event_tensors(result))

    def _ask(self, question: str, **arguments: Any) -> Any:
        """One of tritonclient's small questions; gRPC's answers as the JSON that HTTP gives."""
        options = self._address.short_options() | arguments
        if self._address.is_grpc and question.startswith("get_"):
            options["as_json"] = True
        try:
            return getattr(self._connection, question)(**options)
        except self._failures as error:
            raise self._mapped(error) from error

    def _mapped(self, error: BaseException) -> Exception:
        found = wire.mapped(self._address, error, wire.doubtful(error) and self._live())
        self._reached = self._reached and not isinstance(found, ConnectError)
        return found

    def _live(self) -> bool:
        try:
            return bool(self._connection.is_server_live(**self._address.short_options()))
        except self._failures:
            return False

    def _stage(self, model: str) -> StageTime | None:
        return self.statistics(model).get(model) if self._wants_timings else None

    def _timings(self, model: str, total_ms: float, before: StageTime | None) -> Timings:
        """The server counts a request a little after it has answered: ask until it has."""
        if before is None:
            return Timings(total_ms)
        deadline = time.monotonic() + _STATISTICS_WAIT_S
        while (after := self._stage(model)) and after.requests == before.requests:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        return wire.timings(total_ms, before, after)

    def _register(self, slot: Slot) -> None:
        self._reach()
        self._memory(f"register_{slot.kind}_shared_memory", *slot.registration())

    def _unregister(self, slot: Slot) -> None:
        self._memory(f"unregister_{slot.kind}_shared_memory", slot.name)

    def _memory(self, question: str, *arguments: Any) -> None:
        ask = partial(getattr(self._connection, question), *arguments)
        try:
            ask(**self._address.short_options())
        except self._failures as error:
            raise SharedMemoryError(
                f"{question.replace('_', ' ')} failed at {self.url}: {error}; the server must run on this "
                "machine and allow clients' shared memory"
            ) from error


def check_streams(protocol: str) -> None:
    """Raise InvalidInput where events cannot be sent one by one."""
    if protocol != "grpc":
        raise InvalidInput(
            "stream needs gRPC, this client speaks HTTP: use Client('host:8001'), or process()"
        )


def check_kind(kind: str, views: bool, device: int) -> Callable[[int], Slot]:
    """What makes slots of this kind of memory; raises SharedMemoryError where it cannot work."""
    if kind == "system":
        return SystemSlot
    if kind != "cuda":
        raise SharedMemoryError(f"kind is {quoted(kind)}; expected 'system' or 'cuda'")
    if views:
        raise SharedMemoryError("views are for kind='system'; CUDA results are copied, on the GPU")
    check_cuda(device)
    return partial(CudaSlot, device=device)


def _is_cuda(via: Pool | None) -> bool:
    return via is not None and via.on_gpu


def _ignore(tensors: dict[str, Any], timings: Timings) -> None:
    return None
