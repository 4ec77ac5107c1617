"""Networks on other servers: two and three real ones on loopback, against one that has them all."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from panotriton import Client, Group, InferenceFailed, ServerBusy, ServerUnavailable
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer

UNET = ("osediff_unet", "osediff_vae_decoder")
REST = ("osediff", "osediff_text_encoder", "osediff_vae_encoder")  # of super-resolution
SMALL = {"seed": 7, "crop_size": 64, "interpolations": 2, "threshold": 0.0}
SLOW = {"seed": 7, "crop_size": 64, "interpolations": 0, "threshold": 0.0, "prompt": "slow"}
PANORAMAS = np.random.default_rng(7).integers(0, 256, (2, 64, 128, 3), np.uint8)
IMAGES = np.random.default_rng(8).integers(0, 256, (3, 40, 56, 3), np.uint8)


def without(repository: Path, models: tuple[str, ...], folder: Path) -> Path:
    """A repository that lacks these models."""
    shutil.copytree(repository, folder, ignore=lambda _, names: {*models} & {*names})
    return folder


@pytest.fixture(scope="module")
def networks(
    standin_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[LocalServer]]:
    """Two replicas that have two networks and nothing else."""
    folder = tmp_path_factory.mktemp("networks")
    servers = [
        BriefServer(standin_repository, load_models=UNET, log_file=folder / f"{i}.log")
        for i in range(2)
    ]
    with servers[0], servers[1]:
        yield servers


@pytest.fixture(scope="module")
def front_repository(standin_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without(standin_repository, UNET, tmp_path_factory.mktemp("front") / "repository")


@pytest.fixture(scope="module")
def front(
    front_repository: Path,
    networks: list[LocalServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalServer]:
    """Everything but those, which it does not even have as files."""
    place = f"{','.join(UNET)}={','.join(server.grpc_url for server in networks)}"
    log = tmp_path_factory.mktemp("front") / "server.log"
    with BriefServer(front_repository, placement=place, log_file=log) as running:
        yield running


def executions(server: LocalServer) -> int:
    """Of all its networks: of one request at a time, each may go to a replica of its own, by turns."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        stats = client.get_inference_statistics().model_stats
        return sum(int(model.execution_count) for model in stats)


def same(one: Group, other: Group) -> None:
    """Bit for bit, but for how long it took."""
    assert one.kept == other.kept
    assert one.kept
    assert [(p.quality, p.raw, p.left) for p in one.pairs] == [
        (p.quality, p.raw, p.left) for p in other.pairs
    ]
    assert [i.description for i in one.intervals] == [i.description for i in other.intervals]
    for mine, theirs in zip(made(one), made(other), strict=True):
        assert np.array_equal(mine, theirs)


def made(group: Group) -> list[np.ndarray]:
    views = [v for i in group.intervals for s in i.sequences for v in s.images]
    return [*(pair.sharp for pair in group.pairs), *views]


def test_a_group_is_the_same_bit_for_bit(
    front: LocalServer, networks: list[LocalServer], standin: LocalServer
) -> None:
    before = [executions(server) for server in networks]
    with Client(front.grpc_url) as client, Client(standin.grpc_url) as alone:
        same(client.process(*PANORAMAS, **SMALL), alone.process(*PANORAMAS, **SMALL))
        served = {model.name for model in client.models()}
    assert not served & {*UNET}
    # Both replicas had their share.
    assert all(executions(server) > 4 + was for server, was in zip(networks, before, strict=True))


def test_a_stream_is_the_same(front: LocalServer, standin: LocalServer) -> None:
    def views(url: str) -> dict[str, np.ndarray]:
        with Client(url) as client:
            events = list(client.stream(*PANORAMAS, **SMALL))
        assert type(events[-1]).__name__ == "Done"
        return {place(event): event.image for event in events if hasattr(event, "image")}

    def place(event: object) -> str:
        names = ("panorama", "interval", "weight_idx")
        return repr([type(event).__name__, *(getattr(event, name, None) for name in names)])

    one, other = views(front.grpc_url), views(standin.grpc_url)
    assert one.keys() == other.keys()
    assert len(one) > 16
    for name, image in one.items():
        assert np.array_equal(image, other[name])


@contextmanager
def serve(repository: Path, *options: str) -> Iterator[str]:
    """`panotriton serve` on free ports; its gRPC address."""
    ports = ("--http-port=0", "--grpc-port=0", "--metrics-port=0", "--health-port=0")
    command = [sys.executable, "-m", "panotriton", "serve", "--repository", str(repository)]
    with subprocess.Popen([*command, *ports, *options], stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        lines = iter(it.stdout.readline, "")
        words = [line.split() for line in takewhile(lambda line: "ready;" not in line, lines)]
        try:
            yield dict(line for line in words if len(line) == 2)["gRPC"]
        finally:
            it.send_signal(signal.SIGTERM)
            assert it.wait(60) == 0


def test_serve_takes_networks_alone_and_places_them(
    server: LocalServer, quick_repository: Path, tmp_path: Path
) -> None:
    """The command, twice, with the small preset: its real networks and qwen on a server of their own."""
    models = (*UNET, "qwen")
    lacking = without(quick_repository, models, tmp_path / "front")
    with (
        serve(quick_repository, "--models", ",".join(models)) as networks,
        serve(
            lacking, "--place", f"{','.join(UNET)}={networks}", "--place", f"qwen={networks}"
        ) as url,
        Client(url) as client,
        Client(server.grpc_url) as alone,
    ):
        for one, other in zip(client.upscale([*IMAGES]), alone.upscale([*IMAGES]), strict=True):
            assert np.array_equal(one.numpy(), other.numpy())
        one, other = client.score(IMAGES[0]), alone.score(IMAGES[0])
        assert (one.raw, one.final) == (other.raw, other.final)
        assert client.describe(IMAGES[0]).text == alone.describe(IMAGES[0]).text
        with Client(networks) as behind:
            assert {model.name for model in behind.models() if model.ready} == {*models}


def test_a_requests_own_failure_is_its_own(front: LocalServer, standin: LocalServer) -> None:
    said = []
    for url in (front.grpc_url, standin.grpc_url):
        with Client(url) as client, pytest.raises(InferenceFailed) as failure:
            client.upscale(IMAGES[0], prompt="fail")
        said.append(str(failure.value))
    assert said[0] == said[1]


def test_a_replica_that_goes_in_mid_group_is_replaced_by_another(
    front: LocalServer, networks: list[LocalServer], standin: LocalServer
) -> None:
    before = executions(networks[0])
    with (
        Client(front.grpc_url, retries=0) as client,
        Client(standin.grpc_url) as alone,
        ThreadPoolExecutor(2) as pool,
    ):
        group = pool.submit(client.process, *PANORAMAS, **SLOW)
        undisturbed = pool.submit(alone.process, *PANORAMAS, **SLOW)
        while executions(networks[0]) == before:
            time.sleep(0.1)
        networks[0].kill()
        try:
            same(group.result(120), undisturbed.result(120))
            assert f"{networks[0].grpc_url}: " in front.log_text()  # the server's log says so
            assert "others are asked" in front.log_text()
        finally:
            networks[0].start()
        deadline = time.monotonic() + 60
        while not executions(networks[0]):  # and back it is
            assert time.monotonic() < deadline
            client.upscale(IMAGES[0])


def test_no_replica_left_is_the_servers_trouble_until_one_is_back(
    front: LocalServer, networks: list[LocalServer]
) -> None:
    with Client(front.grpc_url, retries=0) as client:
        for server in networks:
            server.kill()
        try:
            with pytest.raises(ServerUnavailable) as trouble:
                client.upscale(IMAGES[0])
            for server in networks:
                assert server.grpc_url in str(trouble.value)
            assert "Model 'osediff_unet' is not ready where PANOTRITON_PLACE" in str(trouble.value)
            assert not trouble.value.lost
        finally:
            for server in networks:
                server.start()
        assert client.upscale(IMAGES[0]).numpy().shape == (80, 112, 3)


def test_a_drained_replica_sends_its_work_to_the_other(
    front_repository: Path, standin_repository: Path
) -> None:
    """Unloading, as the supervisor's drain does it, refuses newcomers and finishes what is there."""
    one = BriefServer(standin_repository, load_models=UNET, controlled=True)
    two = BriefServer(standin_repository, load_models=UNET)
    with one, two:
        place = f"{','.join(UNET)}={one.grpc_url},{two.grpc_url}"
        with (
            BriefServer(front_repository, placement=place) as front,
            Client(front.grpc_url, retries=0, timeout_s=120) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            group = pool.submit(client.process, *PANORAMAS, **SLOW)
            while not executions(one):
                time.sleep(0.1)
            assert one.control.drain(60)
            assert len(group.result(120).pairs) == 16


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:{free}", "failed to connect"),
        ("no-such-host.invalid:8001", "no-such-host.invalid:8001: "),
        ("{http}", ""),  # a server's, but of its HTTP
        ("{other}", "unknown model"),  # a server's that lacks the model
    ],
)
def test_a_wrong_address_is_told_by_the_first_request(
    address: str, says: str, front_repository: Path, standin: LocalServer, front: LocalServer
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    address = address.format(free=free, http=standin.http_url, other=front.grpc_url)
    with (
        BriefServer(
            front_repository, load_models=REST, placement=f"{','.join(UNET)}={address}"
        ) as wrong,
        Client(wrong.grpc_url, retries=0) as client,
        pytest.raises(ServerUnavailable) as trouble,
    ):
        client.upscale(IMAGES[0])
    assert f"not ready where PANOTRITON_PLACE has it, {address}" in str(trouble.value)
    assert says in str(trouble.value)


def test_full_queues_everywhere_are_told_as_full(
    front_repository: Path, standin_repository: Path, tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(standin_repository, narrow)
    config = narrow / "osediff_unet" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_queue_size: 1024", "max_queue_size: 1"))
    with BriefServer(narrow, load_models=UNET) as networks:
        place = f"{','.join(UNET)}={networks.grpc_url}"
        with (
            BriefServer(front_repository, load_models=REST, placement=place) as front,
            Client(front.grpc_url, retries=0) as client,
            pytest.raises(ServerBusy, match="maximum queue size"),
        ):
            client.upscale([IMAGES[0]] * 8, prompt="slow")


@pytest.mark.thorough
def test_a_replica_that_stops_is_given_up(
    front: LocalServer, networks: list[LocalServer], standin: LocalServer
) -> None:
    """Its connection stays, and its machine answers pings of TCP."""
    stopped = psutil.Process(networks[0].pid)
    with Client(front.grpc_url, retries=0, timeout_s=300) as client, Client(standin.grpc_url) as it:
        stopped.suspend()
        try:
            group = client.process(*PANORAMAS, **SMALL)
        finally:
            stopped.resume()
        same(group, it.process(*PANORAMAS, **SMALL))
