"""A thousand calls through shared memory: nothing grows, and nothing is left at either end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from panotriton import AsyncClient, Client
from panotriton.cli import main
from panotriton.client.shared_memory import SharedMemory
from panotriton.errors import RequestTimeout, SharedMemoryError
from panotriton.pipeline.regions import FOLDER
from panotriton.server.launch import LocalServer

MIB = 1 << 20
CALLS = 1000


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, standin: LocalServer) -> Iterator[Client]:
    url = standin.grpc_url if request.param == "grpc" else standin.http_url
    with Client(url, protocol=request.param) as made:
        yield made


def regions(pid: int) -> list[str]:
    return [path.name for path in FOLDER.glob(f"panotriton_{pid}_*")]


def registered(client: Client, pid: int) -> list[str]:
    return [name for name in client.regions() if name.startswith(f"panotriton_{pid}_")]


def resident_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / MIB)


def ask(client: Client, memory: SharedMemory, value: int) -> None:
    image = np.full((1, 16, 16, 3), value % 256, np.uint8)
    got = client.infer("echo", {"IMAGES": image}, {"IMAGES_OUT": image.nbytes}, via=memory)
    assert (got["IMAGES_OUT"] == image).all()


def test_a_thousand_calls_of_four_threads(client: Client, standin: LocalServer) -> None:
    with client.shared_memory(16 * MIB) as memory, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: ask(client, memory, i), range(CALLS // 5)))  # warm
        gc.collect()
        before = resident_mib(os.getpid()), resident_mib(standin.pid), len(regions(os.getpid()))
        list(pool.map(lambda i: ask(client, memory, i), range(CALLS)))
        gc.collect()
        after = resident_mib(os.getpid()), resident_mib(standin.pid), len(regions(os.getpid()))
        assert after[2] <= max(before[2], 4)
        assert after[0] - before[0] < 16
        assert after[1] - before[1] < 16
        assert 1 <= len(regions(os.getpid())) <= 4  # one per call in flight
        assert sorted(registered(client, os.getpid())) == sorted(regions(os.getpid()))
    assert regions(os.getpid()) == []
    assert registered(client, os.getpid()) == []


PROCESS = """
import resource, sys
import numpy as np
from panotriton import Client
url, protocol, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Client(url, protocol=protocol) as client, client.shared_memory(4 << 20) as memory:
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
    for i in range(calls):
        image = np.full((1, 16, 16, 3), i % 256, np.uint8)
        got = client.infer("echo", {"IMAGES": image}, {"IMAGES_OUT": image.nbytes}, via=memory)
        assert (got["IMAGES_OUT"] == image).all()
        if i == calls // 5:
            before = resident()
    print(resident() - before)
"""


def test_a_thousand_calls_of_four_processes(client: Client, standin: LocalServer) -> None:
    before_mib, registered_before = resident_mib(standin.pid), client.regions()
    command = [sys.executable, "-c", PROCESS, client.url, client.protocol, str(CALLS // 4)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    grown = [float(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert max(grown) < 16
    assert not [name for process in processes for name in regions(process.pid)]
    assert resident_mib(standin.pid) - before_mib < 16
    assert client.regions() == registered_before


def test_several_calls_share_a_small_pool_by_waiting(client: Client) -> None:
    image = np.zeros((1, 512, 512, 3), np.uint8)  # twice 0.75 MiB: a slot of 2 MiB
    with client.shared_memory(4 * MIB) as memory, ThreadPoolExecutor(8) as pool:

        def work(_: int) -> int:
            outputs = {"IMAGES_OUT": image.nbytes}
            return client.infer("echo", {"IMAGES": image}, outputs, via=memory)["IMAGES_OUT"].size

        assert set(pool.map(work, range(40))) == {image.size}
        assert memory.allocated_bytes <= 4 * MIB
        with pytest.raises(SharedMemoryError, match=f"max_bytes is {4 * MIB}"):
            client.upscale(np.zeros((1024, 1024, 3), np.uint8), via=memory)


def test_views_are_the_region_itself(client: Client) -> None:
    with client.shared_memory(16 * MIB, views=True) as memory:
        first = client.upscale(np.full((64, 64, 3), 9, np.uint8), via=memory)
        second = client.upscale(np.full((64, 64, 3), 5, np.uint8), via=memory)
        assert (int(first.numpy().max()), int(second.numpy().max())) == (9, 5)
        assert len(regions(os.getpid())) == 2
        del first
        client.upscale(np.full((64, 64, 3), 1, np.uint8), via=memory)
        assert len(regions(os.getpid())) == 2
    assert registered(client, os.getpid()) == []
    assert int(second.numpy().max()) == 5


KILLED = """
import sys, numpy as np
from panotriton import Client
client = Client(sys.argv[1])
memory = client.shared_memory(8 << 20)
client.upscale(np.zeros((64, 64, 3), np.uint8), via=memory)
print("ready", flush=True)
input()
"""


def test_the_doctor_finds_and_removes_what_a_killed_client_left(
    standin: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED, standin.grpc_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    (name,) = regions(process.pid)
    os.utime(FOLDER / name, (time.time() - 60,) * 2)
    with Client(standin.grpc_url) as client:
        assert registered(client, process.pid) == [name]
        assert main(["doctor", "--url", standin.grpc_url]) == 1
        assert capsys.readouterr().out.count(name) == 2  # the file, and the server's registration
        main(["doctor", "--url", standin.grpc_url, "--fix"])
        assert regions(process.pid) == []
        assert registered(client, process.pid) == []
        assert client.upscale(np.zeros((8, 8, 3), np.uint8)).image.size == (16, 16)


def test_a_pool_only_unregisters_its_own(client: Client) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with client.shared_memory(MIB) as one:
        client.upscale(image, via=one)
        with client.shared_memory(MIB) as other:
            client.upscale(image, via=other)
            assert len(registered(client, os.getpid())) == 2
        assert len(registered(client, os.getpid())) == 1
        client.upscale(image, via=one)


def test_an_interrupted_call_is_not_followed_by_another_in_its_memory(client: Client) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with client.shared_memory(4 * MIB) as memory:
        client.upscale(image, via=memory)
        here = threading.get_ident()
        timer = threading.Timer(0.2, signal.pthread_kill, [here, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.upscale(image, prompt="slow", via=memory)
        timer.join()
        (interrupted,) = registered(client, os.getpid())
        # Over gRPC the answer is heard that gives the slot back; over HTTP nobody listens: its name goes.
        assert regions(os.getpid()) == ([interrupted] if client.protocol == "grpc" else [])
        assert client.upscale(image, via=memory).image.size == (16, 16)
        assert len(registered(client, os.getpid())) == 2
    time.sleep(0.6)  # the server may be writing until its request ends, not longer
    left = registered(client, os.getpid())
    assert not left or (client.protocol == "http" and left == [interrupted])  # in use at the close
    for name in left:
        client.unregister(name)


def test_the_memory_of_calls_that_timed_out_comes_back(
    client: Client, standin: LocalServer
) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with (
        Client(client.url, protocol=client.protocol, timeout_s=0.2) as hasty,
        hasty.shared_memory(2 * MIB, wait_s=30) as memory,  # two slots
    ):
        late = 0
        for _ in range(8):
            with contextlib.suppress(RequestTimeout):
                hasty.upscale(image, prompt="slow", via=memory)
                late -= 1
            late += 1
            client.upscale(image)  # so that time goes by
        assert late
        assert memory.allocated_bytes <= 2 * MIB
        for _ in range(60):  # until the last late one has been answered
            with contextlib.suppress(RequestTimeout):
                hasty.statistics("echo")
            with memory._changed:
                memory._collect()
            if not memory._lost:
                break
            time.sleep(0.2)
    assert regions(os.getpid()) == []
    assert registered(client, os.getpid()) == []


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_memory_of_cancelled_calls_comes_back(standin: LocalServer, protocol: str) -> None:
    """Nobody hears when the server has ended them: it is asked, once the pool is full."""
    image = np.zeros((8, 8, 3), np.uint8)
    url = standin.grpc_url if protocol == "grpc" else standin.http_url

    async def main() -> None:
        async with (
            AsyncClient(url, protocol=protocol) as client,
            client.shared_memory(MIB, wait_s=20) as memory,  # one slot
        ):
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.upscale(image, prompt="slow", via=memory), 0.1)
                assert (await client.upscale(image, via=memory)).image.size == (16, 16)
                assert memory.allocated_bytes == MIB

    asyncio.run(main())
    with Client(url, protocol=protocol) as client:
        assert registered(client, os.getpid()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_never_visit_the_host(server: LocalServer) -> None:
    image = torch.rand(3, 64, 96, device="cuda")
    with Client(server.grpc_url) as client, client.shared_memory(16 * MIB, "cuda") as memory:
        through = client.upscale(image, via=memory)
        assert through.pixels.is_cuda
        assert through.torch().is_cuda
        plain = client.upscale(image)
        np.testing.assert_array_equal(through.numpy(), plain.numpy())
        again = client.upscale(Path(__file__).parent.parent / "data/panoramas/city.jpg", via=memory)
        assert again.pixels.is_cuda
