"""Good requests beside ones that die while batched with others' in `qwen`: the same answer, each time.

The real qwen_scorer, qwen_describer and qwen around a stand-in for the weights that hashes what it is asked.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from panotriton.server.launch import LocalServer
from tests.conftest import ROOT

pytestmark = pytest.mark.thorough
SOAK_S = float(os.environ.get("PANOTRITON_FAULTS_SOAK_S", "60"))
MOST_GROWTH = 1.5  # of resident memory from a third of the time on: a leak a request is far more
ENGINE = """


import hashlib


class _Hash:
    def __init__(self, *settings): pass

    async def answer(self, images, *question):
        texts = (repr((i.shape, question)).encode() + np.ascontiguousarray(i).tobytes() for i in images)
        return [(hashlib.sha256(text).hexdigest(), 0.5) for text in texts]
"""
OUTPUTS = {"qwen_describer": ["DESCRIPTION", "DESCRIPTION_ERROR"], "qwen_scorer": ["RAW_OUTPUT"]}


@pytest.fixture(scope="module")
def asked(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("soak") / "repository"
    for model in (*OUTPUTS, "qwen"):
        shutil.copytree(ROOT / "model_repository" / model, folder / model)
    for model in OUTPUTS:
        shutil.copy(repository / model / "1" / "prompt.txt", folder / model / "1")
    code = folder / "qwen" / "1" / "model.py"
    real = code.read_text()
    fake = real.replace('{"torch": _Torch, "vllm": _Vllm}[settings["engine"]]', "_Hash")
    assert fake != real
    code.write_text(fake + ENGINE)
    (folder / "qwen" / "1" / "qwen.json").write_text("{}")
    with LocalServer(folder) as running:
        yield running


def images(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(1, 9)), *(int(side) * 28 for side in draw.integers(1, 9, 2)), 3)
    return draw.integers(0, 256, shape, np.uint8)


def ask(protocol: Any, client: Any, model: str, pixels: np.ndarray) -> list[bytes]:
    tensor = protocol.InferInput("IMAGES", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    result = client.infer(model, [tensor])
    return [text for name in OUTPUTS[model] for text in result.as_numpy(name).flat]


def cancel(server: LocalServer, draw: random.Random) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        pixels = images(draw.randrange(1000, 2000))
        tensor = tritonclient.grpc.InferInput("IMAGES", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels)
        call = client.async_infer(
            draw.choice(sorted(OUTPUTS)), [tensor], lambda result, error: None
        )
        time.sleep(draw.uniform(0, 0.02))
        call.cancel()


def drop(server: LocalServer, draw: random.Random) -> None:
    pixels = images(draw.randrange(1000, 2000))
    tensor = tritonclient.http.InferInput("IMAGES", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    body, header = tritonclient.http.InferenceServerClient.generate_request_body([tensor])
    host, port = server.http_url.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v2/models/{draw.choice(sorted(OUTPUTS))}/infer HTTP/1.1\r\nHost: {host}\r\n"
            f"Inference-Header-Content-Length: {header}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body[: draw.choice([len(body), len(body) // 2])]
        )
        time.sleep(draw.uniform(0, 0.02))


def confuse(server: LocalServer, draw: random.Random) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        tensor = tritonclient.grpc.InferInput("IMAGE", [1, 28, 28, 3], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 28, 28, 3), np.uint8))
        texts = []
        for name in draw.sample(["SYSTEM_PROMPT", "READING", "STOP_AFTER"], 2):
            texts.append(tritonclient.grpc.InferInput(name, [1, 1], "BYTES"))
            text = draw.choice([b"", b"\xff\xfe", b"y" * 5000])
            texts[-1].set_data_from_numpy(np.array([[text]], np.object_))
        with pytest.raises(InferenceServerException):
            client.infer("qwen", [tensor, *texts])


def growth(server: LocalServer) -> int:
    processes = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (processes, *processes.children()))


def test_good_answers_stay_the_same_beside_requests_that_die(asked: LocalServer) -> None:
    ended = threading.Event()
    wrong: list[str] = []

    def repeat(work: Callable[[LocalServer, random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        while not ended.is_set():
            try:
                work(asked, draw)
            except Exception as error:
                wrong.append(f"{work.__name__}: {error}")
            ended.wait(0.03)

    hostile = [
        threading.Thread(target=repeat, args=(work, seed), daemon=True)
        for seed, work in enumerate((cancel, drop, confuse))
    ]
    with (
        tritonclient.grpc.InferenceServerClient(asked.grpc_url) as grpc,
        tritonclient.http.InferenceServerClient(asked.http_url) as http,
    ):
        ways = ((tritonclient.grpc, grpc), (tritonclient.http, http))
        questions = [(model, images(seed)) for seed in range(6) for model in OUTPUTS]
        expected = [ask(*ways[0], *question) for question in questions]
        for thread in hostile:
            thread.start()
        began, warm = time.monotonic(), 0
        while time.monotonic() - began < SOAK_S and not wrong:
            for question, answer in zip(questions, expected, strict=True):
                for way in ways:
                    assert ask(*way, *question) == answer, question[0]
            if not warm and time.monotonic() - began > SOAK_S / 3:
                warm = growth(asked)
        ended.set()
        for thread in hostile:
            thread.join(30)
    assert not wrong
    assert warm
    assert growth(asked) < MOST_GROWTH * warm
