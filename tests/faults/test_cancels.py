"""Requests that nobody waits for any more, at the moment of their answers: the server stays, and stays right.

A server before 2.57 (25.04) bears no cancelled gRPC call. As a script this shows it, with plain tritonclient:

    python tests/faults/test_cancels.py cancel    # or deadline, or none
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

sys.path.append(str(Path(__file__).parents[2]))  # as a script

from panotriton.client.aio import AsyncClient
from panotriton.client.client import Client
from panotriton.errors import PanotritonError
from panotriton.server.launch import LocalServer
from tests.server import standins

CALLS = 1500  # of each of four callers; a fifth of them is given up


def picture(caller: int) -> np.ndarray:
    return np.full((1, 64, 64, 3), caller, np.uint8)


async def impatient(url: str, caller: int, counts: Counter[str]) -> None:
    draw, image = random.Random(caller), picture(caller)
    async with AsyncClient(url, retries=0) as client:
        for _ in range(CALLS):
            asked = client.infer("echo", {"IMAGES": image}, {"IMAGES_OUT": image.nbytes})
            try:
                got = await asyncio.wait_for(asked, draw.uniform(0, 0.01))
            except (TimeoutError, asyncio.TimeoutError):
                counts["given up"] += 1
            else:
                counts["right" if (got["IMAGES_OUT"] == image).all() else "wrong"] += 1


def test_requests_given_up_leave_the_server_and_others_alone(standin_repository: Path) -> None:
    counts: Counter[str] = Counter()
    with LocalServer(standin_repository) as server:

        async def main() -> None:
            await asyncio.gather(*(impatient(server.grpc_url, n, counts) for n in range(4)))

        resident = psutil.Process(server.pid).memory_info().rss
        asyncio.run(main())
        grown = psutil.Process(server.pid).memory_info().rss - resident
        assert server.exit_code() is None
        image = picture(9)
        with Client(server.grpc_url, retries=0) as client:
            got = client.infer("echo", {"IMAGES": image}, {"IMAGES_OUT": image.nbytes})
        assert (got["IMAGES_OUT"] == image).all()
    assert counts["given up"] > CALLS / 10
    assert not counts["wrong"]
    assert grown < counts["given up"] * 30_000  # 75 KB each were kept of calls that were cancelled


def test_a_time_out_of_the_blocking_client_does_the_same(standin_repository: Path) -> None:
    """And the client that is closed at once waits for what it has left behind."""
    image = np.zeros((64, 64, 3), np.uint8)
    with LocalServer(standin_repository) as server:
        late = 0
        for number in range(40):
            # Around the time that an answer takes; the first is late and the second not, on any machine.
            timeout_s = 60.0 if number == 1 else 0.02 + number % 10 / 200
            with Client(server.grpc_url, retries=0, timeout_s=timeout_s) as client:
                try:
                    client.upscale(image, prompt="" if number else "slow")
                except PanotritonError:
                    late += 1
        assert server.exit_code() is None
        assert 0 < late < 40


def show(how: str, seconds: float = 15) -> None:
    """What plain tritonclient does to the server."""
    counts: Counter[str] = Counter()
    ended = threading.Event()

    def ask(url: str, caller: int) -> None:
        draw, image = random.Random(caller), picture(caller)
        client = tritonclient.grpc.InferenceServerClient(url)
        tensor = tritonclient.grpc.InferInput("IMAGES", list(image.shape), "UINT8")
        tensor.set_data_from_numpy(image)
        while not ended.is_set():
            answered, answers = threading.Event(), []

            def answer(result: object, error: object, to: list = answers, at=answered) -> None:
                to.append(result if error is None else error)
                at.set()

            within = {"client_timeout": draw.uniform(0.0005, 0.02)} if how == "deadline" else {}
            call = client.async_infer("echo", [tensor], answer, **within)
            if how == "cancel":
                answered.wait(draw.uniform(0, 0.01))
                call.cancel()
            answered.wait(10)
            counts["asked"] += 1
            for found in answers:
                if isinstance(found, InferenceServerException):
                    counts[str(found)[:50]] += 1
                else:
                    counts[
                        "right" if (found.as_numpy("IMAGES_OUT") == image).all() else "wrong"
                    ] += 1

    with tempfile.TemporaryDirectory() as folder:
        repository = standins.build(Path(folder) / "repository")
        with LocalServer(repository) as server:
            threads = [threading.Thread(target=ask, args=(server.grpc_url, n)) for n in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(int(seconds * 10)):
                ended.wait(0.1)
                if server.exit_code() is not None:
                    print("the server is gone")
                    break
            ended.set()
            for thread in threads:
                thread.join()
    print(how, dict(counts))


if __name__ == "__main__":
    show(sys.argv[1])
