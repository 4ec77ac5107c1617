"""Seeded nonsense at every model and endpoint; good requests in between always get the same answer."""

from __future__ import annotations

import http.client
import json
import os
import random
from collections.abc import Callable

import numpy as np
import pytest

from panotriton.client.client import Client
from panotriton.errors import PanotritonError
from panotriton.pipeline.camera import Camera
from tests.faults.conftest import Serving
from tests.faults.test_deaths import mended, recovered

SEED = 19
ROUNDS = int(os.environ.get("PANOTRITON_FAULTS_MALFORMED", "200"))
ENDPOINTS = (
    "v2/models/{model}/infer",
    "v2/models/{model}/generate",
    "v2/models/{model}/versions/1/infer",
    "v2/systemsharedmemory/region/{name}/register",
    "v2/cudasharedmemory/region/{name}/register",
    "v2/repository/index",
    "v2/trace/setting",
    "v2/logging",
)
TYPES = ("UINT8", "FP32", "INT32", "BYTES", "FP64", "BOOL", "NONE", "")
NAMES = (
    "IMAGES",
    "SEED",
    "PROMPT",
    "PANORAMA_1",
    "ENCODED",
    "MODE",
    "",
    "x" * 3000,
    "\u00e9\u0000",
)


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def tensor(draw: random.Random) -> dict[str, object]:
    shape = [draw.choice([0, 1, 2, -1, 3, 2**31, 2**62]) for _ in range(draw.randrange(6))]
    data = draw.choice([[], [1], ["x"], [[1, [2]]], [1.5] * 9, [None], {}, "text", 3])
    return {
        "name": draw.choice(NAMES),
        "datatype": draw.choice(TYPES),
        "shape": draw.choice([shape, [], "3", None]),
        draw.choice(["data", "parameters"]): draw.choice(
            [data, {"shared_memory_region": "none", "shared_memory_byte_size": 8}]
        ),
    }


def body(draw: random.Random) -> bytes:
    request = {
        "inputs": [tensor(draw) for _ in range(draw.randrange(4))],
        "outputs": [{"name": draw.choice(NAMES)} for _ in range(draw.randrange(3))],
        "key": draw.choice(["/none", "", "../../etc/passwd"]),
        "offset": draw.choice([0, -1, 2**62]),
        "byte_size": draw.choice([0, 1, -1, 2**63]),
    }
    text = json.dumps(request).encode()
    kinds: list[Callable[[], bytes]] = [
        lambda: text,
        lambda: text[: draw.randrange(len(text))],
        lambda: draw.randbytes(draw.randrange(200)),
        lambda: deep(draw.choice([10, 1000])),
        lambda: b"",
    ]
    return draw.choice(kinds)()


def send(serving: Serving, path: str, data: bytes) -> int:
    """The status of one request; 0 where the connection broke."""
    host, port = serving.http.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("POST", "/" + path, data)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def sharp(serving: Serving, image: np.ndarray) -> bytes | None:
    """A good request's answer; None where the server was being started again."""
    try:
        with Client(serving.grpc, retries=0) as client:
            return client.upscale(image).numpy().tobytes()
    except PanotritonError:
        return None


def test_good_requests_between_malformed_ones_get_the_same_answer(serving: Serving) -> None:
    image = np.random.default_rng(SEED).integers(0, 256, (40, 64, 3), np.uint8)
    expected = sharp(serving, image)
    assert expected
    draw = random.Random(SEED)
    models = ("panorama", "panorama_encoded", "panorama_stream", "preprocess", "osediff", "decode")
    models += ("osediff_unet", "qwen_scorer", "qwen_describer", "select", "interpolate", "options")
    for number in range(ROUNDS):
        path = draw.choice(ENDPOINTS).format(model=draw.choice(models), name="r")
        status = send(serving, path, body(draw))
        if not status:
            serving.wait_until(lambda: serving.probe("/ready")[0] == 200, "service again")
        if number % 10 == 0:
            again = sharp(serving, image)
            assert again in (expected, None), (
                f"another answer after request {number} of seed {SEED}"
            )
    serving.wait_until(lambda: serving.probe("/ready")[0] == 200, "service again")
    assert sharp(serving, image) == expected


def vast() -> bytes:
    """A shape whose product passes 2**64, which is taken for no data at all."""
    panorama = {"name": "PANORAMA", "datatype": "UINT8", "shape": [1 << 40, 1 << 40, 3], "data": []}
    cameras = {"name": "CAMERAS", "datatype": "FP64", "shape": [1, 5], "data": [0, 0, 0, 90, 0]}
    return json.dumps({"inputs": [panorama, cameras]}).encode()


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "data"), [("osediff", deep(200_000)), ("crop", vast())])
def test_what_ends_a_server_or_a_model_is_followed_by_service(
    serving: Serving, model: str, data: bytes
) -> None:
    """24.10's own faults; docs/RELIABILITY.md has the releases that mend them."""
    image = np.zeros((64, 128, 3), np.uint8)
    expected = sharp(serving, image)
    before = recovered(serving)
    if send(serving, f"v2/models/{model}/infer", data) != 400:
        mended(serving, before)
    assert sharp(serving, image) == expected
    with Client(serving.grpc) as client:
        assert not client.crop(image, Camera(0.0, 0.0, 0.0, 90.0, 0.0)).numpy().any()
