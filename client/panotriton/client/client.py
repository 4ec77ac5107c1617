"""The client of the panorama pipeline over gRPC or HTTP. `aio.AsyncClient` mirrors it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from panotriton.client import calls, wire
from panotriton.client.conversation import Conversation
from panotriton.client.pixels import ImageLike
from panotriton.client.shared_memory import SharedMemory, on_gpu
from panotriton.client.tls import Tls
from panotriton.client.twins import iterate, run
from panotriton.errors import PanotritonError
from panotriton.pipeline.camera import Camera
from panotriton.pipeline.contract import DEFAULTS, Options
from panotriton.pipeline.events import Event
from panotriton.pipeline.results import (
    Cropped,
    Description,
    Group,
    Health,
    Model,
    Score,
    StageTime,
    Upscaled,
)

__all__ = ["Client", "ImageLike", "Tls"]


class Client(Conversation):
    """A connection to a server that serves this repository's models.

    url is "host:port" without a scheme; protocol is "grpc" (port 8001 by custom) or "http" (8000).
    Nothing is sent before the first call. Threads may share a client; over HTTP each has a
    connection of its own. So may processes that are forked. Use it in a `with` block.

    timeout_s bounds each request; the server is told. By default it follows the work: 300 s, 20 s for
    each megapixel that super-resolution makes and 0.2 s for each token that Qwen may write, which is
    100 minutes for a group as `process` makes it; an hour for `infer`. A server that goes is noticed at
    once whatever the time allowed. One that holds the connection and says nothing is asked every 10 s
    whether it lives, and given up after 20 s of silence. The server goes on with a request that is given
    up, unless it is 2.57 (25.04) or later, spoken to over gRPC, and can be told; `close` waits 10 s for it.

    retries: how often a call is sent again, after 0.25, 0.5, 1 … s ± half, that found no server or a full
    queue, and after four times as long, that found the server in trouble: starting, stopping, gone or
    frozen in between, without one of its models' processes. A request with which the server went twice is
    not sent a third time; a stream that has begun is not sent again. timings: ask the server what
    part of each request was queue, compute and network (two small requests more). tls: True, or
    a `Tls` with certificate files. headers go with every request, for authentication.

    Every method raises InvalidInput or InvalidImage for its arguments before anything is sent, and
    ConnectError (ServerUnavailable, where a server has answered before), RequestTimeout, ServerBusy,
    ModelUnavailable, InvalidInput or InferenceFailed for what the server says or does. `via` sends
    a call's images through shared memory, see `shared_memory`.
    """

    _asynchronous = False

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
        run(self._transport.close())

    def ready(self) -> bool:
        """Whether a server answers there and all its models are ready."""
        return run(self._is("is_server_ready"))

    def health(self) -> Health:
        """Whether it lives and is ready, and the server's name and version."""
        return run(self._health())

    def models(self) -> list[Model]:
        """The models of the server's repository, and which of them are ready.

        Those that are loaded alone where the server keeps its repository to itself.
        """
        return run(self._models())

    def weights(self) -> dict[str, str]:
        """Checksums of what the networks were exported from, by model; of older exports there are none.

        Raises ModelUnavailable where the server has none of those models.
        """
        return run(self._weights())

    def statistics(self, model: str = "") -> dict[str, StageTime]:
        """Totals since the server started, by model name: all models, or one."""
        return run(self._statistics(model))

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
        sphere_size: int | None = DEFAULTS.sphere_size,
        intermediates: bool = False,
        via: SharedMemory | None = None,
    ) -> Group:
        """Run the whole pipeline on two panoramas as one request.

        A panorama is the path of an image file (two paths are sent as they are and decoded
        by the server), a PIL image, a (H, W, 3) uint8 RGB array, or a (3, H, W) float torch tensor
        in [0, 1]; 64 px a side to 134 megapixels. Give `seed` (≥ 0) or `cameras` (2, 8, 2, 5), see
        `sample_cameras`; with neither, the seed is 0. crop_size: 64 to 2048 px. upscale: 1 to 4.
        align: adain, wavelet or nofix. threshold: 0 to 1. interpolations: 0 to 255 per sequence.
        sphere_size: what views are cut from, None for the panorama resized to crop_size × crop_size, 0 for
        the panorama at its own resolution, without aliasing: sharper; or 64 to 8192 px, see `Sphere`.
        `intermediates` also fetches the images before super-resolution.
        """
        call = calls.process(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(
                crop_size, upscale, align, prompt, threshold, interpolations, sphere_size
            ),
            intermediates=intermediates,
            cuda=on_gpu(via),
        )
        return run(self._send(call, via))

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
        sphere_size: int | None = DEFAULTS.sphere_size,
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
            options=Options(
                crop_size, upscale, align, prompt, threshold, interpolations, sphere_size
            ),
        )
        return iterate(self._events(inputs))

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
            cuda=on_gpu(via),
            return_exceptions=return_exceptions,
        )
        return run(self._send_all(plan, via))

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
        plan = calls.score(images, mode=mode, cuda=on_gpu(via), return_exceptions=return_exceptions)
        return run(self._send_all(plan, via))

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
        plan = calls.describe(images, cuda=on_gpu(via), return_exceptions=return_exceptions)
        return run(self._send_all(plan, via))

    @overload
    def crop(
        self,
        panorama: ImageLike,
        cameras: Camera,
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: SharedMemory | None = None,
    ) -> Cropped: ...

    @overload
    def crop(
        self,
        panorama: ImageLike,
        cameras: Sequence[Camera],
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: SharedMemory | None = None,
    ) -> list[Cropped]: ...

    def crop(
        self,
        panorama: ImageLike,
        cameras: Any,
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: SharedMemory | None = None,
    ) -> Any:
        """What one camera, or each of a list, sees of a panorama: (size, size, 3), 64 to 2048 px.

        sphere_size: as for `process`. `panotriton.crop` does the same on this machine. A path is sent as
        it is.
        """
        plan = calls.crop(panorama, cameras, size=size, sphere_size=sphere_size, cuda=on_gpu(via))
        return run(self._send_all(plan, via))

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
        return run(self._send(calls.infer(model, inputs, outputs), via))

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
        return self._pool(SharedMemory, max_bytes, kind, views, wait_s, device)

    def regions(self) -> list[str]:
        """Names of the shared-memory regions that clients have registered at the server."""
        return [
            name
            for kind in ("system", "cuda")
            for name in wire.region_names(run(self._ask(f"get_{kind}_shared_memory_status")))
        ]

    def unregister(self, name: str) -> None:
        """Make the server let go of a region, of either kind, whose client is gone.

        A pool unregisters its own; unregistering another client's breaks its calls.
        """
        for kind in ("system", "cuda"):
            run(self._memory(f"unregister_{kind}_shared_memory", name))
