"""`AsyncClient`: the methods of `Client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from panotriton.client import calls
from panotriton.client.conversation import Conversation
from panotriton.client.pixels import ImageLike
from panotriton.client.shared_memory import AsyncSharedMemory, on_gpu
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

__all__ = ["AsyncClient"]


class AsyncClient(Conversation):
    """`Client` for asyncio: the same arguments, results and errors; use it in an `async with` block.

    Any number of calls may be in flight. Cancelling a task cancels its request over gRPC to a
    server that bears it, from 2.57 (25.04) on; else only the wait ends. It belongs to the event loop in
    which it is first used, until that is closed.
    """

    _asynchronous = True

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
        """`Client.close`."""
        await self._transport.close()

    async def ready(self) -> bool:
        """`Client.ready`."""
        return await self._is("is_server_ready")

    async def health(self) -> Health:
        """`Client.health`."""
        return await self._health()

    async def models(self) -> list[Model]:
        """`Client.models`."""
        return await self._models()

    async def weights(self) -> dict[str, str]:
        """`Client.weights`."""
        return await self._weights()

    async def statistics(self, model: str = "") -> dict[str, StageTime]:
        """`Client.statistics`."""
        return await self._statistics(model)

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
        sphere_size: int | None = DEFAULTS.sphere_size,
        intermediates: bool = False,
        via: AsyncSharedMemory | None = None,
    ) -> Group:
        """`Client.process`."""
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
        sphere_size: int | None = DEFAULTS.sphere_size,
    ) -> AsyncIterator[Event]:
        """`Client.stream`; cancelling the task that iterates cancels the request."""
        inputs = calls.stream(
            panorama_1,
            panorama_2,
            seed=seed,
            cameras=cameras,
            options=Options(
                crop_size, upscale, align, prompt, threshold, interpolations, sphere_size
            ),
        )
        return self._events(inputs)

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
            cuda=on_gpu(via),
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
            calls.score(images, mode=mode, cuda=on_gpu(via), return_exceptions=return_exceptions),
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
            calls.describe(images, cuda=on_gpu(via), return_exceptions=return_exceptions), via
        )

    @overload
    async def crop(
        self,
        panorama: ImageLike,
        cameras: Camera,
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: AsyncSharedMemory | None = None,
    ) -> Cropped: ...

    @overload
    async def crop(
        self,
        panorama: ImageLike,
        cameras: Sequence[Camera],
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: AsyncSharedMemory | None = None,
    ) -> list[Cropped]: ...

    async def crop(
        self,
        panorama: ImageLike,
        cameras: Any,
        *,
        size: int = DEFAULTS.crop_size,
        sphere_size: int | None = DEFAULTS.sphere_size,
        via: AsyncSharedMemory | None = None,
    ) -> Any:
        """`Client.crop`."""
        plan = calls.crop(panorama, cameras, size=size, sphere_size=sphere_size, cuda=on_gpu(via))
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
        return self._pool(AsyncSharedMemory, max_bytes, kind, views, wait_s, device)
