"""What clients say and do when their server freezes, dies, or loses a model's process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc

from panotriton import AsyncClient, Client
from panotriton.client import conversation
from panotriton.client.transports import grpc, http
from panotriton.errors import (
    ConnectError,
    InvalidInput,
    ModelUnavailable,
    RequestTimeout,
    ServerUnavailable,
)
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer
from tests.server.harm import Victim
from tests.server.proxy import Proxy

IMAGE = np.zeros((8, 8, 3), np.uint8)
PANORAMA = np.zeros((64, 128, 3), np.uint8)
KINDS = ["grpc", "http", "grpc async", "http async"]
ALSO_HTTP = pytest.param("http", marks=pytest.mark.thorough)


@pytest.fixture(scope="module")
def victim(standin_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(standin_repository, tmp_path_factory.mktemp("victim") / "server.log")
    yield victim
    victim.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps in a tenth of the time."""
    monkeypatch.setattr(conversation, "WATCH_EVERY_S", 1.0)
    monkeypatch.setattr(conversation, "SILENT_S", 2.0)
    monkeypatch.setattr(conversation, "CONNECT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(grpc, "_PARTING_S", 1.0)


Ask = Callable[..., Any]


@pytest.fixture(params=KINDS)
def ask(request: pytest.FixtureRequest, victim: Victim) -> Iterator[Ask]:
    url = victim.grpc_url if request.param.startswith("grpc") else victim.http_url
    with asking(request.param, url) as ask:
        yield ask


@contextlib.contextmanager
def asking(kind: str, url: str) -> Iterator[Ask]:
    """`upscale` of one small image, by one of the clients."""
    protocol, _, awaited = kind.partition(" ")
    client: Any = (AsyncClient if awaited else Client)(url, protocol=protocol, retries=0)
    loop = asyncio.new_event_loop()

    def done(answer: Any) -> Any:
        return loop.run_until_complete(answer) if inspect.isawaitable(answer) else answer

    yield lambda image=IMAGE, **options: done(client.upscale(image, **options)).image.size
    done(client.close())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_a_server_that_freezes_is_given_up_and_found_again(
    ask: Ask, victim: Victim, impatient: None
) -> None:
    assert ask() == (16, 16)
    victim.stop()
    try:
        with pytest.raises(ServerUnavailable, match="has not said for 2 s that it lives.*frozen"):
            ask()
        with pytest.raises(ConnectError, match="frozen"):
            ask()
    finally:
        victim.go_on()
    assert ask() == (16, 16)


def test_a_long_answer_is_waited_for_while_the_server_lives(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(conversation, "WATCH_EVERY_S", 0.1)
    honest = conversation.Conversation._is

    async def counted(self: Any, question: str, *within_s: float) -> bool:
        asked.append(question)
        return await honest(self, question, *within_s)

    monkeypatch.setattr(conversation.Conversation, "_is", counted)
    assert ask(prompt="slow") == (16, 16)
    assert "is_server_live" in asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_on_the_other_side_of_the_world_is_reached(
    standin: LocalServer, kind: str
) -> None:
    port = standin.grpc_port if kind.startswith("grpc") else standin.http_port
    with Proxy(port, late_s=1.5) as far, asking(kind, f"127.0.0.1:{far}") as ask:
        assert ask() == (16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_link_is_no_frozen_server(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """While 2.4 MB are on their way, for 2.4 s, it is asked whether it lives, and answers at once."""
    monkeypatch.setattr(conversation, "WATCH_EVERY_S", 0.3)
    monkeypatch.setattr(conversation, "SILENT_S", 0.6)
    port = standin.grpc_port if kind.startswith("grpc") else standin.http_port
    with Proxy(port, bytes_per_s=1_000_000) as slow, asking(kind, f"127.0.0.1:{slow}") as ask:
        assert ask(image=np.zeros((800, 1000, 3), np.uint8), upscale=1) == (1000, 800)


def test_clients_of_one_server_have_connections_of_their_own(standin: LocalServer) -> None:
    """Behind a balancer they reach several servers; one's tensors do not hold up another's."""
    process = psutil.Process()

    def connections() -> int:
        remote = (each.raddr for each in process.net_connections("tcp") if each.raddr)
        return sum(each.port == standin.grpc_port for each in remote)

    before = connections()
    with Client(standin.grpc_url) as one, Client(standin.grpc_url) as other:
        for client in (one, other):
            assert client.upscale(IMAGE).image.size == (16, 16)
        assert connections() - before == 2 * 2  # of each one for tensors, one for questions


@pytest.mark.parametrize("kind", KINDS)
def test_no_proxy_comes_between_processes_of_one_machine(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = standin.grpc_port if kind.startswith("grpc") else standin.http_port
    with asking(kind, f"localhost:{port}") as ask:
        assert ask() == (16, 16)


FORKING = """
import multiprocessing, os, sys, threading
import numpy as np
from panotriton import Client

def ask(value):
    pixels = np.full((1, 64, 64, 3), value, np.uint8)
    for _ in range(20):
        answer = client.infer("echo", {"IMAGES": pixels}, ["IMAGES_OUT"])["IMAGES_OUT"]
        assert (answer == value).all(), answer
    if os.getpid() != parent:
        client.close()

parent = os.getpid()
client = Client(sys.argv[1], protocol=sys.argv[2], retries=0)
ask(1)
workers = [multiprocessing.get_context("fork").Process(target=ask, args=(n,)) for n in (2, 3, 4)]
for worker in workers:
    worker.start()
ask(5)
for worker in workers:
    worker.join()
assert [worker.exitcode for worker in workers] == [0, 0, 0]
ask(6)
before = len(os.listdir("/proc/self/fd"))
for n in range(10):
    thread = threading.Thread(target=ask, args=(n,))
    thread.start()
    thread.join()
assert len(os.listdir("/proc/self/fd")) <= before
client.close()
"""


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_forks_and_threads_share_a_client_and_leave_nothing(
    standin: LocalServer, protocol: str
) -> None:
    """As workers of a data loader, and of a web server with a thread a request."""
    url = standin.grpc_url if protocol == "grpc" else standin.http_url
    done = subprocess.run(
        [sys.executable, "-c", FORKING, url, protocol],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_client_can_be_sent_to_another_process(standin: LocalServer) -> None:
    with Client(standin.http_url, protocol="http", timeout_s=50, headers={"X": "y"}) as client:
        assert client.upscale(IMAGE).image.size == (16, 16)
        with pickle.loads(pickle.dumps(client)) as other:
            assert vars(other).keys() == vars(client).keys()
            assert other._transport.headers == {"x": "y"}
            assert (other.protocol, other._timeout_s) == ("http", 50)
            assert other.upscale(IMAGE).image.size == (16, 16)
    awaited = pickle.loads(pickle.dumps(AsyncClient(standin.grpc_url)))
    assert asyncio.run(awaited.upscale(IMAGE)).image.size == (16, 16)


def test_connections_that_are_silent_while_the_server_computes_are_kept(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    keep_alive = http.keep_alive
    monkeypatch.setattr(http, "keep_alive", lambda sock: (keep_alive(sock), kept.append(sock)))
    for kind in ("http", "http async"):
        kept.clear()
        with asking(kind, standin.http_url) as ask:
            assert ask() == (16, 16)
            for sock in kept:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
            assert kept


def test_a_stream_of_a_frozen_server_ends(victim: Victim, impatient: None) -> None:
    with Client(victim.grpc_url) as client:
        events = client.stream(PANORAMA, PANORAMA, crop_size=64, prompt="slow")
        next(events)
        victim.stop()
        try:
            with pytest.raises(ServerUnavailable, match="frozen"):
                list(events)
        finally:
            victim.go_on()


def test_a_timeout_tells_a_busy_server_from_a_silent_one(victim: Victim) -> None:
    with Client(victim.grpc_url, timeout_s=0.3) as client:
        for _ in range(20):  # until this machine is quick enough to say that it lives
            with pytest.raises(RequestTimeout, match=r"within 0\.3 s; (it is alive|nor)") as told:
                client.upscale(IMAGE, prompt="slow")
            if "it is alive" in str(told.value):
                return
    pytest.fail("never said that the server is alive")


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(work())
        except ServerUnavailable as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


LONG = np.zeros((256, 256, 3), np.uint8)  # many tiles: several seconds, where the prompt is slow


@pytest.mark.parametrize("protocol", ["grpc", ALSO_HTTP])
def test_what_was_lost_with_its_server_is_sent_once_more(victim: Victim, protocol: str) -> None:
    url = victim.grpc_url if protocol == "grpc" else victim.http_url
    with Client(url, protocol=protocol, retries=0) as once:
        assert once.upscale(IMAGE).image.size == (16, 16)
        thread, ended = in_background(lambda: once.upscale(LONG, prompt="slow"))
        thread.join(1)
        victim.kill()
        thread.join()
        assert isinstance(ended[0], ServerUnavailable)
        assert ended[0].lost
        with pytest.raises(ServerUnavailable, match="went before it answered") as refused:
            once.upscale(IMAGE)
        assert not refused.value.lost
        with Client(url, protocol=protocol) as newcomer, pytest.raises(ConnectError) as nobody:
            newcomer.upscale(IMAGE)
        assert type(nobody.value) is ConnectError
    victim.restart()
    with Client(url, protocol=protocol, retries=9) as client:
        assert client.upscale(IMAGE).image.size == (16, 16)
        thread, ended = in_background(lambda: client.upscale(LONG, prompt="slow").image.size)
        thread.join(1)
        victim.restart()
        thread.join()
        assert ended == [(512, 512)]


@pytest.mark.parametrize("protocol", ["grpc", ALSO_HTTP])
def test_memory_is_registered_anew_at_a_server_that_was_started_anew(
    victim: Victim, protocol: str
) -> None:
    url = victim.grpc_url if protocol == "grpc" else victim.http_url
    with (
        Client(url, protocol=protocol, retries=9) as client,
        client.shared_memory(4 << 20) as memory,
    ):
        assert client.upscale(IMAGE, via=memory).image.size == (16, 16)
        victim.restart()
        for _ in range(2):
            assert client.upscale(IMAGE, via=memory).image.size == (16, 16)
        assert memory.allocated_bytes == 1 << 20
        assert len(client.regions()) == 1
    with Client(url, protocol=protocol) as client:
        assert client.regions() == []


def test_a_dead_process_of_a_model_is_the_servers_trouble(victim: Victim) -> None:
    victim.kill_stub("osediff_unet")
    try:
        for url, protocol in ((victim.grpc_url, "grpc"), (victim.http_url, "http")):
            with Client(url, protocol=protocol, retries=0) as client:
                with pytest.raises(ServerUnavailable, match="osediff_unet.*is not healthy") as told:
                    client.upscale(IMAGE)
                assert not told.value.lost
                with pytest.raises(ServerUnavailable, match="is not healthy"):
                    client.process(PANORAMA, PANORAMA, crop_size=64)
        with (
            Client(victim.grpc_url) as client,
            pytest.raises(ServerUnavailable, match="is not healthy"),
        ):
            list(client.stream(PANORAMA, PANORAMA, crop_size=64))
    finally:
        victim.restart()


def test_an_unloaded_model_is_waited_for_and_a_missing_one_is_not(
    standin_repository: Path,
) -> None:
    with BriefServer(standin_repository, load_models=["echo", "panorama_stream"]) as server:
        control = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        control.unload_model("echo")
        control.unload_model("panorama_stream")
        pixels = {"IMAGES": PANORAMA[None]}
        for url, protocol in ((server.grpc_url, "grpc"), (server.http_url, "http")):
            with Client(url, protocol=protocol, retries=0) as client:
                with pytest.raises(ServerUnavailable, match="no available versions"):
                    client.infer("echo", pixels, ["IMAGES_OUT"])
                with pytest.raises(ModelUnavailable):
                    client.infer("nothing", pixels, ["IMAGES_OUT"])
        with (
            Client(server.grpc_url, retries=0) as client,
            pytest.raises(ServerUnavailable, match="no available versions"),
        ):
            list(client.stream(PANORAMA, PANORAMA))
        timer = threading.Timer(0.5, control.load_model, ["echo"])
        timer.start()
        with Client(server.grpc_url, retries=9) as client:
            np.testing.assert_array_equal(
                client.infer("echo", pixels, ["IMAGES_OUT"])["IMAGES_OUT"], PANORAMA[None]
            )
        timer.join()
        control.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_names_beyond_reason_are_the_callers_fault(
    standin: LocalServer, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = standin.grpc_url if protocol == "grpc" else standin.http_url
    with Client(url, protocol=protocol) as client:
        for model, name in (("x" * 70_000, "IMAGES"), ("echo", "y" * 70_000)):
            with pytest.raises(InvalidInput, match="has 70000 bytes; expected 1024 at most"):
                client.infer(model, {name: PANORAMA[None]}, ["IMAGES_OUT"])
        monkeypatch.setattr("panotriton.client.calls._MAX_NAME_BYTES", 100_000)
        with pytest.raises(InvalidInput):  # what the server or gRPC makes of it
            client.infer("echo", {"y" * 70_000: PANORAMA[None]}, ["IMAGES_OUT"])
