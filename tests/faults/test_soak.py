"""Good requests beside everything bad at once: the same answers each time, and memory that stays flat.

The real pipeline, scorer and describer around stand-ins for the networks. The stand-in for the scorer's
weights hashes what it is asked, so that one wrong byte shows; and it has no ties to break, which real
weights have: see tests/bench/ties.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import os
import random
import shutil
import socket
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from panotriton.client.aio import AsyncClient
from panotriton.client.client import Client
from panotriton.client.transports.http import Blocking
from panotriton.errors import PanotritonError, RequestTimeout
from panotriton.pipeline.regions import FOLDER, PREFIX
from tests.conftest import ROOT
from tests.faults.conftest import SMALL, Serving, served
from tests.faults.test_malformed import ENDPOINTS, body, send

pytestmark = pytest.mark.thorough
SOAK_S = float(os.environ.get("PANOTRITON_FAULTS_SOAK_S", "90"))
SEED = 19
MOST_GROWTH = 1.1  # from the middle third of the time to the last: a leak a request is far more
MIB = 1 << 20
ENGINE = """


import hashlib


class _Hash:
    def __init__(self, *settings): pass

    async def answer(self, images, *question):
        texts = (repr((i.shape, question)).encode() + np.ascontiguousarray(i).tobytes() for i in images)
        return [(hashlib.sha256(text).hexdigest(), int(i.mean()) % 10 / 10) for i, text in zip(images, texts)]
"""
TEXTS = {"qwen_describer": ["DESCRIPTION", "DESCRIPTION_ERROR"], "qwen_scorer": ["RAW_OUTPUT"]}
PROTOCOLS = {"grpc": tritonclient.grpc, "http": tritonclient.http}

Panoramas = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def asked(
    standin_repository: Path,
    repository: Path,
    panoramas: Panoramas,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("soak")
    models = folder / "repository"
    shutil.copytree(standin_repository, models)
    for model in (*TEXTS, "qwen"):
        shutil.rmtree(models / model, ignore_errors=True)
        shutil.copytree(ROOT / "model_repository" / model, models / model)
    for model in TEXTS:
        shutil.copy(repository / model / "1" / "prompt.txt", models / model / "1")
    code = models / "qwen" / "1" / "model.py"
    real = code.read_text()
    fake = real.replace('{"torch": _Torch, "vllm": _Vllm}[settings["engine"]]', "_Hash")
    assert fake != real
    code.write_text(fake + ENGINE)
    (models / "qwen" / "1" / "qwen.json").write_text("{}")
    with served(models, folder, "--restarts=1000") as running:
        crowd(running, panoramas)
        yield running


class Good:
    """One caller's requests, each of which had an answer before."""

    def __init__(self, serving: Serving, panoramas: Panoramas, protocol: str) -> None:
        url = serving.grpc if protocol == "grpc" else serving.http
        self._library = PROTOCOLS[protocol]
        self._plain = self._library.InferenceServerClient(url)
        self._client = Client(url, protocol=protocol, retries=0, timeout_s=120)
        self._memory = self._client.shared_memory(256 * MIB)
        self._panoramas = panoramas
        self.kinds: dict[str, Callable[[], str]] = {
            "group": self._group,
            "group in shared memory": lambda: self._group(via=self._memory),
        }
        if protocol == "grpc":
            self.kinds["stream"] = self._stream
        for model in TEXTS:
            for seed in range(4):
                self.kinds[f"{model} {seed}"] = lambda m=model, s=seed: self._texts(m, images(s))

    def _group(self, **options: Any) -> str:
        made = self._client.process(*self._panoramas, **SMALL, **options)
        return digest(made.pairs, made.intervals)

    def _stream(self) -> str:
        options = SMALL | {"threshold": 0.3}
        events = list(self._client.stream(*self._panoramas, **options))
        if type(events[-1]).__name__ != "Done":
            raise InferenceServerException(str(events[-1]))
        # Its events come in the order in which the server's work ended.
        return digest(*sorted(digest(without_times(event)) for event in events[:-1]))

    def _texts(self, model: str, pixels: np.ndarray) -> str:
        tensor = self._library.InferInput("IMAGES", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels)
        result = self._plain.infer(model, [tensor])
        return digest([text for name in TEXTS[model] for text in result.as_numpy(name).flat])


def without_times(event: Any) -> dict[str, Any]:
    values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {
        name: value
        for name, value in values.items()
        if not any(word in name for word in ("seconds", "_s", "done", "total", "time"))
    }


def digest(*values: Any) -> str:
    """Of everything in nested results; arrays by their bytes."""
    state = hashlib.sha256()

    def add(value: Any) -> None:
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, np.ndarray):
            state.update(repr((value.shape, value.dtype)).encode() + value.tobytes())
        else:
            state.update(repr(value).encode())

    add(values)
    return state.hexdigest()


def images(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(1, 9)), *(int(side) * 28 for side in draw.integers(1, 9, 2)), 3)
    return draw.integers(0, 256, shape, np.uint8)


class Bad:
    """What goes wrong with other callers. Each method is one kind, done once."""

    def __init__(self, serving: Serving, panoramas: Panoramas) -> None:
        self._serving = serving
        self._panoramas = panoramas
        self.kinds = [self.interrupt, self.drop, self.confuse, self.nonsense]
        self.kinds += [self.abandon, self.give_up, self.pool]

    def interrupt(self, draw: random.Random) -> None:
        """A task that is cancelled while its request is out."""

        async def main() -> None:
            async with AsyncClient(self._serving.grpc, retries=0) as client:
                ask = draw.choice([client.describe, client.score])
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        ask(list(images(draw.randrange(1000, 2000)))), draw.uniform(0, 0.1)
                    )

        asyncio.run(main())

    def drop(self, draw: random.Random) -> None:
        pixels = images(draw.randrange(1000, 2000))
        tensor = tritonclient.http.InferInput("IMAGES", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels)
        data, header = tritonclient.http.InferenceServerClient.generate_request_body([tensor])
        host, port = self._serving.http.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST /v2/models/{draw.choice(sorted(TEXTS))}/infer HTTP/1.1\r\nHost: {host}\r\n"
                f"Inference-Header-Content-Length: {header}\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data[: draw.choice([len(data), len(data) // 2])]
            )
            time.sleep(draw.uniform(0, 0.02))

    def confuse(self, draw: random.Random) -> None:
        """Refused by `qwen` itself, in one batch with good ones."""
        with tritonclient.grpc.InferenceServerClient(self._serving.grpc) as client:
            tensor = tritonclient.grpc.InferInput("IMAGE", [1, 28, 28, 3], "UINT8")
            tensor.set_data_from_numpy(np.zeros((1, 28, 28, 3), np.uint8))
            texts = []
            for name in ("SYSTEM_PROMPT", "READING", "STOP_AFTER"):
                texts.append(tritonclient.grpc.InferInput(name, [1, 1], "BYTES"))
                text = draw.choice([b"", b"\xff\xfe", b"y" * 5000])
                texts[-1].set_data_from_numpy(np.array([[text]], np.object_))
            limit = tritonclient.grpc.InferInput("MAX_NEW_TOKENS", [1, 1], "INT32")
            limit.set_data_from_numpy(np.array([[draw.choice([-1, 0, 2**31 - 1])]], np.int32))
            client.infer("qwen", [tensor, *texts, limit])

    def nonsense(self, draw: random.Random) -> None:
        models = (
            "panorama",
            "panorama_encoded",
            "panorama_stream",
            "preprocess",
            "osediff",
            "qwen",
        )
        models += ("osediff_unet", *TEXTS, "select", "interpolate", "options")
        path = draw.choice(ENDPOINTS).format(model=draw.choice(models), name="r")
        send(self._serving, path, body(draw))

    def abandon(self, draw: random.Random) -> None:
        """A stream or a group whose caller is gone."""
        with Client(self._serving.grpc, retries=0) as client:
            events = client.stream(*self._panoramas, **SMALL)
            for _ in range(draw.randrange(5)):
                next(events, None)
            events.close()  # type: ignore[attr-defined]

    def give_up(self, draw: random.Random) -> None:
        """A time-out while the server writes to, or reads from, the caller's memory."""
        timeout_s = draw.uniform(0.002, 0.3)
        with (
            Client(self._serving.grpc, retries=0, timeout_s=timeout_s) as client,
            client.shared_memory(64 * MIB) as memory,
            contextlib.suppress(RequestTimeout),
        ):
            client.process(*self._panoramas, **SMALL, via=memory)

    def pool(self, draw: random.Random) -> None:
        with (
            Client(self._serving.grpc, retries=0, timeout_s=60) as client,
            client.shared_memory(16 * MIB) as memory,
        ):
            client.upscale(np.zeros((32, 32 + draw.randrange(32), 3), np.uint8), via=memory)


def stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def mapped(server: psutil.Process) -> int:
    """What a server has of /dev/shm, regions of callers included that are gone by now."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) * 1024


def own_regions() -> int:
    """What the callers of this process have there."""
    total = 0
    for path in FOLDER.glob(f"{PREFIX}{os.getpid()}_*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            total += path.stat().st_blocks * 512
    return total


def crowd(serving: Serving, panoramas: Panoramas) -> None:
    """As many groups at once as are ever in work: what the Python backend shares with a model's process
    grows to the largest need so far, and stays.
    """
    until = time.monotonic() + max(30.0, SOAK_S / 20)

    def work(number: int) -> None:
        kinds, draw = Bad(serving, panoramas), random.Random(number)
        while time.monotonic() < until:
            with contextlib.suppress(PanotritonError, *Blocking.failures):
                kinds.abandon(draw)

    with ThreadPoolExecutor(10) as callers:
        list(callers.map(work, range(10)))


class Memory:
    """Private bytes of a server and its processes, and bytes of /dev/shm, since its start."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._pid = 0
        self.samples: list[tuple[int, int]] = []
        self.longest: list[tuple[int, int]] = []
        self.largest = (0, "")

    def sample(self) -> None:
        with contextlib.suppress(
            psutil.Error, ValueError, FileNotFoundError
        ):  # it is just being started
            server = self._serving.server()
            if server.pid != self._pid:
                self._pid, self.samples = server.pid, []
            processes = (server, *server.children(recursive=True))
            each = [(process.memory_full_info().uss, process.name()) for process in processes]
            self.largest = max(self.largest, *each)
            resident = sum(private for private, _ in each)
            shared = mapped(server) + own_regions()
            self.samples.append((resident, shared))
            self.longest = max(self.longest, self.samples, key=len)

    def growth(self) -> tuple[float, float]:
        """The medians of the last third over those of the middle third."""
        third = len(self.longest) // 3
        middle, last = self.longest[third : 2 * third], self.longest[2 * third :]

        def ratio(which: int) -> float:
            before, after = (statistics.median(s[which] for s in part) for part in (middle, last))
            return after / max(before, MIB)

        return ratio(0), ratio(1)


def answered(asked: Serving, ask: Callable[[], str]) -> str:
    """The answer to a good request of a caller without retries, while no bad ones are sent.

    What was cut off before may still end the server, and another one is told of the caller's memory first.
    """
    deadline = time.monotonic() + asked.patience_s
    while True:
        try:
            return ask()
        except (PanotritonError, *Blocking.failures):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def answers(asked: Serving, callers: list[Good]) -> dict[str, str]:
    """Of each kind, the same from every caller, whenever it asks."""
    found: dict[str, str] = {}
    for caller in [*callers, *callers]:
        for kind, ask in caller.kinds.items():
            answer = answered(asked, ask)
            assert found.setdefault(kind, answer) == answer, f"{kind}: another answer"
    return found


@pytest.fixture
def tidied() -> Iterator[None]:
    """Sockets of calls that were given up are closed when they are found, which is not in another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_good_answers_and_memory_stay_the_same_beside_bad_requests(
    asked: Serving, panoramas: Panoramas, tidied: None
) -> None:
    ended = threading.Event()
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    callers = [Good(asked, panoramas, protocol) for protocol in PROTOCOLS]
    expected = answers(asked, callers)

    def good(number: int) -> None:
        caller = Good(asked, panoramas, ("grpc", "http")[number % 2])
        draw = random.Random(SEED + number)
        while not ended.is_set():
            kind = draw.choice(sorted(caller.kinds))
            try:
                answer = caller.kinds[kind]()
            except (PanotritonError, *Blocking.failures) as error:
                counts["no answer"] += 1
                counts[f"  {type(error).__name__}: {str(error)[:100]}"] += 1
                ended.wait(1)
                continue
            counts["good"] += 1
            if answer != expected[kind]:
                wrong.append(f"{kind}: another answer after {counts}")

    def bad(number: int) -> None:
        kinds = Bad(asked, panoramas).kinds
        draw = random.Random(SEED + number)
        work = kinds[number % len(kinds)]
        while not ended.is_set():
            with contextlib.suppress(PanotritonError, *Blocking.failures):
                work(draw)
            counts[work.__name__] += 1
            ended.wait(0.03)

    memory = Memory(asked)
    threads = [threading.Thread(target=good, args=(n,), daemon=True) for n in range(4)]
    threads += [threading.Thread(target=bad, args=(n,), daemon=True) for n in range(7)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    while time.monotonic() - began < SOAK_S and not wrong:
        memory.sample()
        ended.wait(max(1.0, SOAK_S / 200))
    ended.set()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive(), f"waits for nothing: {stack(thread)}\n{asked.text()}"
    restarts = asked.count("panotriton_server_restarts_total")
    print(f"{SOAK_S:.0f} s, {restarts:.0f} restarts, {dict(counts)}")
    for resident, shared in memory.longest[:: max(1, len(memory.longest) // 10)]:
        print(f"  {resident / MIB:.0f} MiB resident, {shared / MIB:.0f} MiB in /dev/shm")
    print("growth", memory.growth(), "largest", memory.largest)
    assert not wrong
    assert counts["good"]
    assert max(memory.growth()) < MOST_GROWTH
    asked.wait_until(lambda: asked.probe("/ready")[0] == 200, "service again")
    assert answers(asked, callers) == expected
