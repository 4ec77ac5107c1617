"""Events of `panorama_stream` as they arrive, and what a cancel stops."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panotriton import AsyncClient, Client, events
from panotriton.errors import InferenceFailed, InvalidInput, ModelUnavailable
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
FILES = (PANORAMAS / "courtyard.jpg", PANORAMAS / "interior.jpg")
SMALL: dict[str, Any] = {"crop_size": 64, "interpolations": 2, "seed": 7}


def collected(client: Client, *images: Any, **options: Any) -> list[events.Event]:
    return list(client.stream(*images, **(SMALL | options)))


def of(found: list[events.Event], kind: type) -> list[Any]:
    return [event for event in found if isinstance(event, kind)]


@pytest.fixture
def client(standin: LocalServer) -> Any:
    with Client(standin.grpc_url) as made:
        yield made


@pytest.mark.parametrize("sphere_size", [None, 0])
def test_a_stream_holds_what_the_group_holds(client: Client, sphere_size: int | None) -> None:
    group = client.process(*FILES, **SMALL, sphere_size=sphere_size)
    found = collected(client, *FILES, sphere_size=sphere_size)
    assert isinstance(found[0], events.Accepted)
    assert isinstance(found[1], events.Cameras)
    assert isinstance(found[-1], events.Done)
    assert found[-1].kept == group.kept
    assert {event.interval for event in of(found, events.Kept)} == set(group.kept)
    sharp = {(pair.panorama, pair.interval): pair for pair in group.pairs}
    for event in of(found, events.PairReady):
        np.testing.assert_array_equal(event.sharp, sharp[event.panorama, event.interval].sharp)
    for event in of(found, events.Scored):
        assert event.quality == sharp[event.panorama, event.interval].quality
    views = {(e.interval, e.panorama, e.weight_idx): e for e in of(found, events.View)}
    assert len(views) == len(group.kept) * 2 * 2
    described = {event.interval: event.text for event in of(found, events.Described)}
    for interval in group.intervals:
        assert described[interval.interval] == interval.description
        for p, sequence in enumerate(interval.sequences, start=1):
            for i, image in enumerate(sequence.images[1:-1], start=1):
                np.testing.assert_array_equal(views[interval.interval, p, i].image, image)
                assert views[interval.interval, p, i].camera == sequence.cameras[i]


def test_counts_only_rise_to_the_total(client: Client) -> None:
    found = collected(client, *FILES)
    assert (found[0].done, found[0].total) == (0, 16 + 8 * 2 * 2)
    assert [event.done for event in found] == sorted(event.done for event in found)
    totals = [event.total for event in found]
    assert totals == sorted(totals, reverse=True)
    assert found[-1].done == found[-1].total


def test_a_failed_first_pair_spares_the_second(client: Client) -> None:
    found = collected(client, *FILES)
    pairs = {(event.panorama, event.interval) for event in of(found, events.PairReady)}
    for event in of(found, events.Dropped):
        first = next(s for s in of(found, events.Scored) if s.interval == event.interval)
        assert ((2, event.interval) in pairs) == (first.quality.final_score >= 0.7)
    assert len(pairs) < 16


def test_no_interval_kept(client: Client) -> None:
    found = collected(client, *FILES, threshold=1.0)
    assert found[-1].kept == ()  # type: ignore[union-attr]
    assert len(of(found, events.Dropped)) == 8
    assert not of(found, events.View)


def test_pixels_and_cameras(client: Client) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    (cameras,) = of(collected(client, image, image), events.Cameras)
    found = collected(client, image, image, seed=None, cameras=cameras.cameras)
    np.testing.assert_array_equal(of(found, events.Cameras)[0].cameras, cameras.cameras)


def test_bad_requests_are_refused_by_name(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="align is 'x'"):
        client.stream(*FILES, align="x")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(FILES[0].read_bytes()[:5000])
    with pytest.raises(InvalidInput, match="ENCODED_2 is a broken image"):
        list(client.stream(FILES[0], broken))
    with pytest.raises(InferenceFailed, match="fails when asked to"):
        list(client.stream(*FILES, prompt="fail"))
    assert isinstance(collected(client, *FILES)[-1], events.Done)


def test_http_says_what_to_use_instead(standin: LocalServer) -> None:
    with (
        Client(standin.http_url, protocol="http") as client,
        pytest.raises(InvalidInput, match="needs gRPC"),
    ):
        client.stream(*FILES)


def test_a_server_without_the_model_says_so(standin_repository: Path) -> None:
    with (
        BriefServer(standin_repository, load_models=["decode"]) as server,
        Client(server.grpc_url) as client,
    ):
        with pytest.raises(ModelUnavailable, match="panorama_stream"):
            list(client.stream(*FILES))
        with pytest.raises(ModelUnavailable, match="serves no model of this pipeline"):
            client.weights()


def calls_afterwards(client: Client) -> int:
    """Calls of the UNet that still end; half a second each, so that eight would if the work went on."""
    before = client.statistics("osediff_unet")["osediff_unet"].requests
    time.sleep(4.5)
    return client.statistics("osediff_unet")["osediff_unet"].requests - before


def test_leaving_the_loop_stops_the_work_within_tiles(client: Client) -> None:
    """A pair of 256 px crops has 105 tiles: 27 calls."""
    options = {**SMALL, "crop_size": 256, "prompt": "slow"}
    for event in client.stream(*FILES, **options):
        if isinstance(event, events.Cameras):
            time.sleep(1)
            break
    assert calls_afterwards(client) <= 4  # two images, two calls of four tiles each


def test_cancelling_the_task_stops_the_work(client: Client, standin: LocalServer) -> None:
    async def consume(asynchronous: AsyncClient) -> None:
        async for _ in asynchronous.stream(*FILES, **SMALL, prompt="slow"):
            pass

    async def run() -> None:
        async with AsyncClient(standin.grpc_url) as asynchronous:
            found = [event async for event in asynchronous.stream(*FILES, **SMALL)]
            assert isinstance(found[-1], events.Done)
            with pytest.raises(InvalidInput, match="align"):
                asynchronous.stream(*FILES, align="x")
            task = asyncio.create_task(consume(asynchronous))
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert calls_afterwards(client) <= 4


def test_streams_run_side_by_side(client: Client) -> None:
    streams = [client.stream(*FILES, **(SMALL | {"seed": seed})) for seed in range(3)]
    last: list[Any] = [None] * 3
    running = dict(enumerate(streams))
    while running:
        for index, stream in list(running.items()):
            try:
                last[index] = next(stream)
            except StopIteration:
                del running[index]
    assert all(isinstance(event, events.Done) for event in last)


def test_a_stream_whose_client_was_closed_ends_in_silence(standin: LocalServer) -> None:
    with Client(standin.grpc_url) as client:
        stream = client.stream(*FILES, **SMALL)
        assert isinstance(next(stream), events.Accepted)
    stream.close()  # type: ignore[attr-defined]
