"""The client against a real tritonserver, over both protocols, awaited or not."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from panotriton import AsyncClient, Camera, Client, Tls, crop
from panotriton.client.transports import grpc
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelUnavailable,
    RequestTimeout,
    ServerBusy,
)
from panotriton.pipeline.results import Timings
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer
from tests.server.proxy import Proxy

RNG = np.random.default_rng(0)
SMALL: dict[str, Any] = {"crop_size": 64, "interpolations": 2, "seed": 7, "threshold": 0.7}
PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
FILES = (PANORAMAS / "courtyard.jpg", PANORAMAS / "interior.jpg")
CAMERA = Camera(30, -10, 5, 90, 0.4)


class Waiting:
    """An AsyncClient whose methods wait for their results, so that one test serves both clients."""

    def __init__(self, client: AsyncClient) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = client

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self.client, name)(*arguments, **options)
            return self.loop.run_until_complete(result) if inspect.isawaitable(result) else result

        return call


def url(server: LocalServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


@pytest.fixture(params=["grpc", "http", "grpc async", "http async"])
def client(request: pytest.FixtureRequest, standin: LocalServer) -> Iterator[Any]:
    protocol, _, awaited = request.param.partition(" ")
    options: dict[str, Any] = {"protocol": protocol, "timings": True}
    if not awaited:
        with Client(url(standin, protocol), **options) as made:
            yield made
        return
    waiting = Waiting(AsyncClient(url(standin, protocol), **options))
    yield waiting
    waiting.close()
    waiting.loop.run_until_complete(waiting.loop.shutdown_asyncgens())
    waiting.loop.close()


OSEDIFF = [
    "osediff",
    *(f"osediff_{n}" for n in ("text_encoder", "vae_encoder", "unet", "vae_decoder")),
]


@pytest.fixture(params=["grpc", "http"])
def plain_client(request: pytest.FixtureRequest, standin: LocalServer) -> Iterator[Client]:
    with Client(url(standin, request.param), protocol=request.param) as made:
        yield made


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def test_every_method(client: Any, panoramas: tuple[np.ndarray, np.ndarray]) -> None:
    health = client.health()
    assert (health.live, health.ready, health.version) == (True, True, "2.51.0")
    assert {"panorama", "crop", "panorama_stream"} <= {
        model.name for model in client.models() if model.ready
    }
    image = noise(40, 64)
    sharp = client.upscale(image)
    assert sharp.image.size == (128, 80)
    assert sharp.model == "osediff"
    score = client.score(sharp.image)
    assert score.raw == f"Final Score: {score.final:.2f}"
    assert client.describe(sharp.torch()).text.startswith("Mean level")
    view = client.crop(panoramas[0], CAMERA, size=64)
    np.testing.assert_array_equal(view.numpy(), crop(panoramas[0], CAMERA, 64))
    assert view.camera == CAMERA
    view = client.crop(panoramas[0], CAMERA, size=64, sphere_size=0)
    np.testing.assert_array_equal(view.numpy(), crop(panoramas[0], CAMERA, 64, sphere_size=0))


@pytest.mark.parametrize("sphere_size", [None, 0, 200])
def test_all_views_of_a_group_are_cut_from_the_same_spheres(
    plain_client: Client, panoramas: tuple[np.ndarray, np.ndarray], sphere_size: int | None
) -> None:
    images = panoramas[0], np.ascontiguousarray(panoramas[1][::2, ::3])  # of two sizes
    options = SMALL | {"threshold": 0.0, "intermediates": True, "sphere_size": sphere_size}
    group = plain_client.process(*images, **options)
    assert group.kept == tuple(range(1, 9))
    for pair in group.pairs:
        found = np.split(pair.image, 2, axis=1)
        for view, camera in zip(found, (pair.left, pair.right), strict=True):
            expected = crop(images[pair.panorama - 1], camera, 64, sphere_size)
            np.testing.assert_array_equal(view, expected)
    for interval in group.intervals:
        for image, sequence in zip(images, interval.sequences, strict=True):
            for view, camera in zip(sequence.crops, sequence.cameras[1:-1], strict=True):
                np.testing.assert_array_equal(view, crop(image, camera, 64, sphere_size))


def test_every_kind_of_image_gives_the_same_result(client: Any, tmp_path: Path) -> None:
    image = noise(40, 64)
    path = tmp_path / "a.png"
    PILImage.fromarray(image).save(path)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    results = client.upscale([image, path, str(path), PILImage.fromarray(image), tensor])
    for result in results[1:]:
        np.testing.assert_array_equal(result.numpy(), results[0].numpy())


def test_a_list_of_mixed_sizes_comes_back_in_order(client: Any) -> None:
    images = [noise(40, 64), noise(30, 30), noise(40, 64)]
    together = client.upscale(images, upscale=3)
    for image, result in zip(images, together, strict=True):
        alone = client.upscale(image, upscale=3)
        np.testing.assert_array_equal(result.numpy(), alone.numpy())
    assert client.score([]) == []


def test_a_group_is_the_same_from_files_and_pixels(client: Any) -> None:
    encoded = client.process(*FILES, **SMALL, intermediates=True)
    pixels = client.process(*map(PILImage.open, FILES), **SMALL, intermediates=True)
    assert (encoded.model, pixels.model) == ("panorama_encoded", "panorama")
    assert encoded.kept == pixels.kept == (5, 8)
    assert encoded.image_count == 2 * 2 * 4
    for one, other in zip(encoded.pairs, pixels.pairs, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.sharp, other.sharp)


def test_tiles_give_the_same_bits_whatever_arrives_first(standin: LocalServer) -> None:
    """105 tiles per image: their sums round by the order in which they are added."""
    image = noise(256, 512)
    with Client(standin.grpc_url) as client, ThreadPoolExecutor(4) as pool:
        alone = client.upscale(image).numpy()
        for other in pool.map(lambda _: client.upscale([image, image]), range(4)):
            for result in other:
                np.testing.assert_array_equal(result.numpy(), alone)


def test_a_server_tells_what_its_weights_are(client: Any) -> None:
    """Of the stand-ins only one says so in its config."""
    assert client.weights() == {"osediff": "sha256:stand-in"}


def test_timings_add_up(client: Any) -> None:
    timings = client.upscale(noise(40, 64), prompt="slow").timings
    assert timings.compute_ms > 500
    parts = timings.queue_ms + timings.compute_ms + timings.network_ms
    assert parts == pytest.approx(timings.total_ms)
    assert min(timings.queue_ms, timings.network_ms) >= 0


def test_results_through_shared_memory_are_bit_for_bit_the_same(
    client: Any, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    images = [noise(40, 64), noise(30, 30), noise(40, 64)]
    memory = client.shared_memory(64 << 20)
    try:
        for plain, through in zip(
            client.upscale(images), client.upscale(images, via=memory), strict=True
        ):
            np.testing.assert_array_equal(plain.numpy(), through.numpy())
        assert client.score(images, via=memory)[1].final == client.score(images)[1].final
        one = client.process(*panoramas, **SMALL, intermediates=True)
        two = client.process(*panoramas, **SMALL, intermediates=True, via=memory)
        assert one.kept == two.kept
        for a, b in zip(one.pairs, two.pairs, strict=True):
            assert a.quality == b.quality
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.sharp, b.sharp)
        for x, y in zip(one.intervals, two.intervals, strict=True):
            np.testing.assert_array_equal(x.sequences[1].images, y.sequences[1].images)
            np.testing.assert_array_equal(x.sequences[0].crops, y.sequences[0].crops)
    finally:
        done = memory.close()
        if inspect.isawaitable(done):
            client.loop.run_until_complete(done)


def test_no_interval_kept_through_shared_memory(
    plain_client: Client, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    with plain_client.shared_memory(64 << 20) as memory:
        group = plain_client.process(*panoramas, crop_size=64, threshold=1.0, via=memory)
    assert group.kept == ()


def test_errors_keep_their_kind_and_cause(client: Any) -> None:
    with pytest.raises(InvalidInput, match="shape.*IMAGES") as caught:
        client.infer("osediff", {"IMAGES": noise(8, 8)}, ["IMAGES_SR"])
    assert caught.value.__cause__ is not None
    with pytest.raises(ModelUnavailable, match="nothing"):
        client.infer("nothing", {"IMAGES": noise(8, 8)}, ["X"])
    with pytest.raises(InferenceFailed, match="fails when asked to"):
        client.upscale(noise(8, 8), prompt="fail")


def test_a_broken_panorama_is_told_by_its_file(client: Any, tmp_path: Path) -> None:
    broken = tmp_path / "cut.jpg"
    broken.write_bytes(FILES[0].read_bytes()[:30_000])
    for ask in (
        lambda: client.process(FILES[0], broken, **SMALL),
        lambda: client.crop(broken, CAMERA, size=64),
    ):
        with pytest.raises(InvalidImage, match=r"^\S+/cut\.jpg is a broken image \("):
            ask()


def test_a_long_value_is_echoed_short_and_keeps_its_kind(client: Any) -> None:
    for name in ("ALIGN", "A" * 20_000):  # the second is told by the server itself
        tensors = {"IMAGES": noise(64, 64)[None], name: np.array([b"x" * 20_000], np.object_)}
        with pytest.raises(InvalidInput) as caught:
            client.infer("osediff", tensors, ["IMAGES_SR"])
        if name == "ALIGN":
            assert str(caught.value).startswith(f"ALIGN is '{'x' * 78}…; expected one of adain")


def test_in_a_list_a_bad_image_fails_alone(client: Any, tmp_path: Path) -> None:
    images = [noise(28, 5880), noise(28, 56), tmp_path / "none.png", noise(40, 64), noise(28, 56)]
    for ask in (client.score, client.describe):
        bad, one, missing, two, three = ask(images, return_exceptions=True)
        assert isinstance(bad, InvalidImage)
        assert str(bad).startswith("images[0] is 5880×28 px")
        assert isinstance(missing, InvalidImage)
        alone = [timeless(ask(images[i])) for i in (1, 3, 4)]
        assert [timeless(result) for result in (one, two, three)] == alone
        with pytest.raises(InvalidImage, match=r"images\[0\] is 5880"):
            ask(images)
    failed, _ = client.upscale([noise(8, 8), "none.png"], prompt="fail", return_exceptions=True)
    assert isinstance(failed, InferenceFailed)  # the server's, not at the door


def timeless(result: Any) -> Any:
    return dataclasses.replace(result, timings=Timings(0))


def test_a_prompt_that_is_cut_is_told_once_a_call(client: Any, standin: LocalServer) -> None:
    prompt = "x " * 77 + "and what comes after"
    said = (
        f"PROMPT is read up to character 153 of {len(prompt)} and not from 'and what comes after' on: "
        "the text encoder takes 77 tokens; shorten it, or put what matters first"
    )
    before = standin.log_text().count(said)
    found = client.upscale([noise(8, 8), noise(8, 8)], prompt=prompt)
    assert [image.warning for image in found] == [said, said]
    assert standin.log_text().count(said) == before + 1
    assert client.process(*FILES, **SMALL, prompt=prompt).warning == said
    if client.protocol == "grpc":
        *_, done = client.stream(*FILES, **SMALL, prompt=prompt)
        assert done.warning == said
    assert standin.log_text().count(said) >= before + 2
    assert client.upscale(noise(8, 8), prompt="x " * 77).warning == ""
    assert client.process(*FILES, **SMALL).warning == ""


def test_an_error_leaves_the_memory_usable(plain_client: Client) -> None:
    with plain_client.shared_memory(4 << 20) as memory:
        for _ in range(5):
            with pytest.raises(InferenceFailed):
                plain_client.upscale(noise(8, 8), prompt="fail", via=memory)
        assert plain_client.upscale(noise(8, 8), via=memory).image.size == (16, 16)
        assert memory.allocated_bytes == 1 << 20


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_timeout_is_told(standin: LocalServer, protocol: str) -> None:
    with (
        Client(url(standin, protocol), protocol=protocol, timeout_s=0.2) as client,
        pytest.raises(RequestTimeout, match=r"did not answer within 0\.2 s"),
    ):
        client.upscale(noise(8, 8), prompt="slow")


def test_threads_share_a_client(plain_client: Client) -> None:
    images = [noise(16, 16 + 8 * i) for i in range(8)]
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = plain_client.upscale(images[i]).image.size

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: (32 + 16 * i, 32) for i in range(8)}


def test_a_server_that_comes_up_late_is_found(standin_repository: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with Client(f"127.0.0.1:{port}", retries=8) as client:
        sizes: list[tuple[int, int]] = []
        thread = threading.Thread(
            target=lambda: sizes.append(client.upscale(noise(8, 8)).image.size)
        )
        thread.start()
        time.sleep(0.5)  # it has met nobody by now
        with BriefServer(standin_repository, grpc_port=port, load_models=OSEDIFF):
            thread.join()
    assert sizes == [(16, 16)]


def test_only_what_found_no_server_or_no_room_is_sent_again(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    with Client(standin.grpc_url, retries=2) as client:
        for error, tries in ((ServerBusy("full"), 3), (ConnectError("lost"), 1)):

            def fail(*arguments: Any, error: Exception = error) -> Any:
                sent.append(1)
                raise error

            sent.clear()
            monkeypatch.setattr(client, "_exchange", fail)
            with pytest.raises(type(error)):
                client.upscale(noise(8, 8))
            assert len(sent) == tries


INTERRUPTED = """
import sys, numpy as np
from panotriton import Client
with Client(sys.argv[1]) as client, client.shared_memory(8 << 20) as memory:
    client.upscale(np.zeros((8, 8, 3), np.uint8), via=memory)
    print("ready", flush=True)
    while True:
        client.upscale(np.zeros((8, 8, 3), np.uint8), prompt="slow", via=memory)
"""


def test_ctrl_c_ends_a_call_at_once_and_leaves_no_file(standin: LocalServer) -> None:
    command = [sys.executable, "-c", INTERRUPTED, standin.grpc_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert time.monotonic() - began < 10
    assert not list(Path("/dev/shm").glob(f"panotriton_{process.pid}_*"))


def test_cancelling_a_task_stops_its_work_within_tiles(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """105 tiles, 27 calls of half a second: what was sent is worked off, up to four calls, and no more.

    One cancel, long before its answer, is what this server bears too: see tests/faults/test_cancels.py.
    """
    monkeypatch.setattr(grpc, "_CANCELS_SINCE", (2, 0))
    image = np.zeros((256, 512, 3), np.uint8)

    async def calls(client: AsyncClient) -> int:
        return (await client.statistics("osediff_unet"))["osediff_unet"].requests

    async def main() -> None:
        async with AsyncClient(standin.grpc_url) as client:
            work = asyncio.create_task(client.upscale(image, prompt="slow"))
            await asyncio.sleep(1.5)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            before = await calls(client)
            await asyncio.sleep(4.5)
            assert await calls(client) - before <= 4
            assert (await client.upscale(image)).numpy().shape == (512, 1024, 3)  # room for others

    asyncio.run(main())


def test_an_answer_beyond_grpc_is_refused_before_any_work(standin: LocalServer) -> None:
    """A group of 1024 px where all intervals are kept, with what it is made from."""
    with Client(standin.grpc_url) as client:
        before = client.statistics("decode")["decode"].requests
        with pytest.raises(InvalidInput, match=r"have 2\.5 GB, and grpc passes on 2\.1: pass prot"):
            client.process(
                *[noise(64, 128)] * 2, crop_size=1024, interpolations=8, intermediates=True
            )
        assert client.statistics("decode")["decode"].requests == before


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the loop that was left without closing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_awaited_client_outlasts_its_event_loop(standin: LocalServer, protocol: str) -> None:
    url = standin.grpc_url if protocol == "grpc" else standin.http_url
    client = AsyncClient(url, protocol=protocol)
    for _ in range(2):
        assert asyncio.run(client.upscale(noise(8, 8))).image.size == (16, 16)

    async def main() -> None:
        assert await client.ready()
        with pytest.raises(InvalidInput, match="in another event loop, which is still open"):
            await asyncio.to_thread(lambda: asyncio.run(client.ready()))
        await client.close()

    asyncio.run(main())
    gc.collect()


def certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)


def test_tls_and_authentication_headers(
    standin_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate(tmp_path)
    guarded = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tmp_path}/cert.pem",
        f"--grpc-server-key={tmp_path}/key.pem",
        "--grpc-restricted-protocol=inference:secret=open",
        "--http-restricted-api=inference:secret=open",
    ]
    tls = Tls(ca=tmp_path / "cert.pem")
    with BriefServer(standin_repository, load_models=OSEDIFF, extra_args=guarded) as server:
        port = server.grpc_url.rpartition(":")[2]
        joined = tmp_path / "both.pem"
        joined.write_text((tmp_path / "cert.pem").read_text() + (tmp_path / "key.pem").read_text())
        open_ = {"triton-grpc-protocol-secret": "open"}
        with Client(
            f"localhost:{port}", tls=replace(tls, certificate=joined), headers=open_
        ) as client:
            check_access(client, True)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))  # the system's list
        monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
        with Client(f"localhost:{port}", tls=True, headers=open_) as client:
            check_access(client, True)
        with pytest.raises(InvalidInput, match=r"key\.pem has no certificate; expected both"):
            Tls(key=tmp_path / "key.pem")
        for options, works in (
            ({"headers": {"triton-grpc-protocol-secret": "open"}}, True),
            ({"headers": {}}, False),
        ):
            with Client(f"localhost:{port}", tls=tls, retries=0, **options) as client:
                check_access(client, works)
        with Client(server.grpc_url, retries=0) as client, pytest.raises(ConnectError):
            client.upscale(noise(8, 8))  # without TLS
        for headers, works in (({"secret": "open"}, True), ({}, False)):
            with Client(server.http_url, protocol="http", headers=headers) as client:
                check_access(client, works)
        asyncio.run(check_async(f"localhost:{port}", tls))


def check_access(client: Client, works: bool) -> None:
    if works:
        assert client.upscale(noise(8, 8)).image.size == (16, 16)
    else:
        # 24.10 answers UNAVAILABLE over gRPC, as for a full queue.
        with pytest.raises((InferenceFailed, ServerBusy), match="restricted"):
            client.upscale(noise(8, 8))


async def check_async(url: str, tls: Tls) -> None:
    headers = {"triton-grpc-protocol-secret": "open"}
    async with AsyncClient(url, tls=tls, headers=headers) as client:
        assert (await client.upscale(noise(8, 8))).image.size == (16, 16)


def test_https_by_both_clients(standin: LocalServer, tmp_path: Path) -> None:
    """tritonserver has no HTTPS of its own: a proxy in front of it ends TLS, here openssl-plain."""
    certificate(tmp_path)
    with Proxy(standin.http_port, certificates=tmp_path) as port:
        tls = Tls(ca=tmp_path / "cert.pem")
        with Client(f"localhost:{port}", protocol="http", tls=tls) as client:
            assert client.upscale(noise(8, 8)).image.size == (16, 16)

        async def main() -> None:
            async with AsyncClient(f"localhost:{port}", protocol="http", tls=tls) as client:
                assert (await client.upscale(noise(8, 8))).image.size == (16, 16)

        asyncio.run(main())
        with (
            Client(f"localhost:{port}", protocol="http", tls=True, retries=0) as client,
            pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED|certificate"),
        ):
            client.upscale(noise(8, 8))
