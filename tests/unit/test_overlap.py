"""How the images of a request overlap, by a clock that only moves when everything waits."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import selectors
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panotriton.models.osediff import plan_size
from panotriton.models.super_resolution import Limits, Places, SuperResolver
from panotriton.pipeline.contract import Options
from panotriton.pipeline.networks import OSEDIFF
from tests.server import standins

PREPARE_S, FINISH_S = 3.0, 2.0
SERVICE_S = {OSEDIFF.encoder: 2.0, OSEDIFF.denoiser: 3.0, OSEDIFF.decoder: 4.0}
NETWORKS_S = sum(SERVICE_S.values())
SIDE = 32  # px: four latents a side, at upscale 1


class Clock(asyncio.SelectorEventLoop):
    """A loop whose seconds pass without being waited for; what waits for another thread would hang."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Skipping(self))

    def time(self) -> float:
        return self.now


class _Skipping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everything waits, and nothing will happen"
        self._clock.now += timeout
        return super().select(0)


@dataclass
class Machine:
    """Networks that each work on one request at a time, and threads for the rest, as many as are asked for.

    spans: (what, from, to) in seconds of the clock. rows: of each request to the denoiser.
    """

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    free: dict[str, asyncio.Lock] = field(default_factory=dict)
    service_s: Mapping[str, float] = field(default_factory=lambda: SERVICE_S)

    async def call(self, model: str, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        count = len(next(iter(inputs.values())))
        if model == OSEDIFF.text_encoder:
            return {"PROMPT_EMBEDS": np.zeros((1, 77, 8), np.float32)}
        async with self.free.setdefault(model, asyncio.Lock()):
            await self.spend(model, self.service_s[model])
        if model == OSEDIFF.encoder:
            height, width = inputs["IMAGE"].shape[1:3]
            return {"LATENT": np.zeros((1, 4, height // 8, width // 8), np.float32)}
        if model == OSEDIFF.denoiser:
            self.rows.append(count)
            return {"NOISE": inputs["LATENT"]}
        height, width = inputs["LATENT"].shape[2:]
        return {"IMAGE": np.zeros((1, 8 * height, 8 * width, 3), np.uint8)}

    async def to_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        finishing = work.__name__ == "_finish"
        await self.spend(*(("finish", FINISH_S) if finishing else ("prepare", PREPARE_S)))
        # Of the last stage the seconds are enough: its arithmetic is that of other tests.
        return None if finishing else work(*arguments)

    async def spend(self, what: str, seconds: float) -> None:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(seconds)
        self.spans.append((what, began, began + seconds))

    def most_at_once(self, *kinds: str) -> int:
        """The most spans of these kinds that cover one moment."""
        spans = [(start, end) for what, start, end in self.spans if what in kinds]
        return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)

    def count(self, what: str) -> int:
        return sum(kind == what for kind, _, _ in self.spans)

    def end(self, what: str) -> float:
        """Of its last span."""
        return max(end for kind, _, end in self.spans if kind == what)

    def idle(self, what: str) -> float:
        """Seconds between its first span and its last in which it did nothing."""
        spans = sorted((start, end) for kind, start, end in self.spans if kind == what)
        return sum(max(0, later[0] - one[1]) for one, later in itertools.pairwise(spans))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network's settings and tokenizer, of tiles of 16 latents."""
    write_settings(tmp_path)
    standins.tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_settings(folder: Path, **others: int) -> None:
    (folder / "osediff.json").write_text(json.dumps(standins.SETTINGS | others))


@contextmanager
def clocked(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Iterator[Clock]:
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "to_thread", machine.to_thread)
        clock = Clock()
        yield clock
        clock.close()


def spent(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, work: Callable[[], Coroutine[Any, Any, Any]]
) -> float:
    with clocked(monkeypatch, machine) as clock:
        clock.run_until_complete(work())
        return clock.now


def pictures(count: int, height: int = SIDE, width: int = SIDE) -> Any:
    return np.zeros((count, height, width, 3), np.uint8)


def test_the_networks_never_wait_for_a_resize_or_for_colours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one image there at a time: only the first resize and the last colours are waited for."""
    machine, count = Machine(), 6
    resolver = SuperResolver(folder, Limits(images_in_flight=1))
    images, options = pictures(count, 40, 36), Options(upscale=1)  # 40×36 is made 40×32: resized

    def work() -> Coroutine[Any, Any, Any]:
        return resolver.run(images, machine.call, options)

    assert spent(monkeypatch, machine, work) == PREPARE_S + count * NETWORKS_S + FINISH_S


def test_encoder_denoiser_and_decoder_work_on_different_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slowest of them is never idle between its first image and its last."""
    machine, count = Machine(), 8
    resolver = SuperResolver(folder, Limits())

    def work() -> Coroutine[Any, Any, Any]:
        return resolver.run(pictures(count, 40, 36), machine.call, Options(upscale=1))

    total = spent(monkeypatch, machine, work)
    slowest = OSEDIFF.decoder
    before = PREPARE_S + SERVICE_S[OSEDIFF.encoder] + SERVICE_S[OSEDIFF.denoiser]
    assert total == before + count * SERVICE_S[slowest] + FINISH_S
    assert machine.idle(slowest) == 0
    assert machine.most_at_once(*SERVICE_S) == 3


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_what_is_in_work_is_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    machine, limits = Machine(), Limits(images_in_flight=in_flight)
    resolver = SuperResolver(folder, limits)
    seen: Counter[str] = Counter()

    def work() -> Coroutine[Any, Any, Any]:
        places = Places(limits)

        async def watched(model: str, inputs: Any, outputs: Any) -> Any:
            taken = in_flight - places.at_networks._value
            seen["at networks"] = max(seen["at networks"], taken)
            seen["in work"] = max(seen["in work"], in_flight + 2 - places.in_work._value)
            return await machine.call(model, inputs, outputs)

        images, options = pictures(12, 40, 36), Options(upscale=1)
        return resolver.run(images, watched, options, None, places)

    spent(monkeypatch, machine, work)
    assert seen == {"at networks": in_flight, "in work": in_flight + 2}


def test_calls_that_share_places_overlap_as_the_images_of_one_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of panorama_stream, which asks for image after image."""
    machine, count, limits = Machine(), 6, Limits(images_in_flight=1)
    resolver = SuperResolver(folder, limits)

    async def work() -> None:
        places, options = Places(limits), Options(upscale=1)
        asked = (
            resolver.run(pictures(1, 40, 36), machine.call, options, None, places)
            for _ in range(count)
        )
        await asyncio.gather(*asked)

    assert spent(monkeypatch, machine, work) == PREPARE_S + count * NETWORKS_S + FINISH_S


def test_tiles_of_a_large_image_are_decoded_while_others_are_blended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder and decoder are never idle between them, and only the last blend is waited for."""
    machine, tiles = Machine(), 3
    limits = Limits(vae_untiled_max_pixels=2048 * 256)
    resolver = SuperResolver(folder, limits)
    image = pictures(1, 256, 3072)  # cores of 1024 px

    def work() -> Coroutine[Any, Any, Any]:
        return resolver.run(image, machine.call, Options(upscale=1))

    spent(monkeypatch, machine, work)
    encoder, decoder = OSEDIFF.encoder, OSEDIFF.decoder
    assert [machine.count(what) for what in (encoder, decoder)] == [tiles, tiles]
    assert [machine.idle(what) for what in (encoder, decoder)] == [0, 0]
    assert machine.end("prepare") == machine.end(decoder) + PREPARE_S  # a blend's seconds, too


@pytest.mark.parametrize(
    ("settings", "limits", "rows"),
    [
        ({"tiles_a_request": 8}, Limits(), [8]),  # the batch of a GPU is full at once
        ({}, Limits(), [4, 4]),
        ({"tiles_a_request": 8}, Limits(tiles_in_flight=4), [4, 4]),
        ({"tiles_a_request": 3}, Limits(), [3, 3, 2]),
    ],
)
def test_a_request_has_as_many_tiles_as_fill_the_denoisers_batch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    limits: Limits,
    rows: list[int],
) -> None:
    write_settings(folder, **settings)
    machine, resolver = Machine(), SuperResolver(folder, limits)
    image = pictures(1, 24 * 8, 40 * 8)  # 24 × 40 latents: 2 × 4 tiles of 16, 8 of them shared

    def work() -> Coroutine[Any, Any, Any]:
        return resolver.run(image, machine.call, Options(upscale=1))

    spent(monkeypatch, machine, work)
    assert machine.rows == rows


@pytest.mark.parametrize(
    ("size", "upscale", "count"),
    [
        ((512, 1024), 2, 4),
        ((300, 420), 2, 3),
        ((200, 264), 4, 4),
        ((256, 256), 3, 1),  # its rows' places are no exact fractions
        ((301, 300), 2, 1),  # rounded down to a multiple of 8: resized twice
        ((7, 14), 2, 1),  # enlarged first
        ((512, 512), 1, 1),
    ],
)
def test_bands_of_rows_are_those_of_the_whole(
    folder: Path, size: tuple[int, int], upscale: int, count: int
) -> None:
    plan = plan_size(*size, upscale, standins.SETTINGS["process_size"])
    images = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    assert len(plan.bands(images[0])) == count
    machine, encoded = Machine(service_s=dict.fromkeys(SERVICE_S, 0.0)), []

    async def call(model: str, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        if model == OSEDIFF.encoder:
            encoded.append(inputs["IMAGE"])
        return await machine.call(model, inputs, outputs)

    asyncio.run(SuperResolver(folder, Limits()).run(images, call, Options(upscale=upscale)))
    np.testing.assert_array_equal(encoded[0][0], plan.prepare(images[0]))
    assert np.shares_memory(encoded[0], images) == (plan.network == size)


def test_calls_in_flight_wait_beside_each_other_and_take_no_thread_from_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as 30, however few cores there are; asyncio's own threads stay free meanwhile."""
    count = 30
    together = threading.Barrier(count + 1, timeout=60)

    class Request:
        def __init__(self, **given: Any) -> None:
            assert given["preferred_memory"] == ("host", 0)

        def exec(self) -> Any:
            together.wait()
            return SimpleNamespace(has_error=lambda: False)

    server = ModuleType("triton_python_backend_utils")
    server.InferenceRequest = Request  # type: ignore[attr-defined]
    server.TRITONSERVER_MEMORY_CPU = "host"  # type: ignore[attr-defined]
    server.PreferredMemory = lambda *where: where  # type: ignore[attr-defined]
    server.Logger = SimpleNamespace(log_warn=print)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, server.__name__, server)
    monkeypatch.delitem(sys.modules, "panotriton.models.requests", raising=False)
    requests = importlib.import_module("panotriton.models.requests")

    async def work() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        calls = [asyncio.ensure_future(requests.call("model", {}, [])) for _ in range(count)]
        await asyncio.to_thread(together.wait)  # only passes where all calls are in flight
        return await asyncio.gather(*calls)

    try:
        assert asyncio.run(work()) == [{}] * count
    finally:
        sys.modules.pop("panotriton.models.requests", None)
