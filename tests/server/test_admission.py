"""A full server says so at once: the real queues, before models that finish nothing until they are told."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from panotriton import Client, ServerBusy
from panotriton.pipeline.events import Event
from tests.brief import BriefServer

ROOT = Path(__file__).parent.parent.parent
PANORAMA = np.zeros((64, 128, 3), np.uint8)
FILES = [ROOT / "tests/data/panoramas" / f"{name}.jpg" for name in ("courtyard", "interior")]
# It answers what it has, all with an error, once the file `open` is there.
CLOSED = """
import time
from pathlib import Path
from panotriton.errors import InferenceFailed
from panotriton.models.requests import respond

class TritonPythonModel:
    def initialize(self, args):
        self._open = Path(args["model_repository"]) / "open"

    def execute(self, requests):
        while not self._open.exists():
            time.sleep(0.05)
        return respond(requests, self._fail)

    @staticmethod
    def _fail(request):
        raise InferenceFailed("let go")
"""
INPUTS: dict[str, dict[str, Any]] = {
    "decode": {"ENCODED": np.array([b"x"], np.object_)},
    "preprocess": {"PANORAMA_1": PANORAMA, "PANORAMA_2": PANORAMA, "SEED": np.array([7])},
    "osediff": {"IMAGES": PANORAMA[None]},
}
TYPES = {"object": "BYTES", "uint8": "UINT8", "int64": "INT64"}


@dataclass
class Closed:
    url: str
    repository: Path


@pytest.fixture(scope="module")
def closed(standin_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    folder = tmp_path_factory.mktemp("closed")
    repository = folder / "repository"
    shutil.copytree(standin_repository, repository)
    for model in INPUTS:
        shutil.copy(ROOT / "model_repository" / model / "config.pbtxt", repository / model)
        (repository / model / "1" / "model.py").write_text(CLOSED)
    stream = repository / "panorama_stream" / "config.pbtxt"
    text = stream.read_text().replace('string_value: "16"', 'string_value: "2"', 1)
    stream.write_text(text)
    with BriefServer(repository, log_file=folder / "log") as running:
        yield Closed(running.grpc_url, repository)


def queue_size(model: str) -> int:
    text = (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return int(config.dynamic_batching.default_queue_policy.max_queue_size)


@pytest.fixture
def fill(closed: Closed) -> Iterator[Callable[[str], None]]:
    """What fills a model's queue; in the end all that waited is answered."""
    waiting: list[Any] = []
    used: list[Path] = []
    with triton.InferenceServerClient(closed.url) as client:

        def until_refused(model: str) -> None:
            used.append(closed.repository / model / "open")
            inputs = []
            for name, value in INPUTS[model].items():
                inputs.append(triton.InferInput(name, value.shape, TYPES[value.dtype.name]))
                inputs[-1].set_data_from_numpy(value)

            def send(count: int) -> None:
                for _ in range(count):
                    answered: list[Exception] = []
                    waiting.append(answered)
                    client.async_infer(
                        model, inputs, lambda result, error, to=answered: to.append(error)
                    )

            send(queue_size(model))
            for _ in range(100):  # what the instances have at hand comes on top
                send(16)
                time.sleep(0.2)
                if refused := [each[0] for each in waiting if each]:
                    break
            assert {error.status() for error in refused} == {"StatusCode.UNAVAILABLE"}

        yield until_refused
        for gate in used:
            gate.touch()
        deadline = time.monotonic() + 60
        while not all(waiting):
            assert time.monotonic() < deadline, f"{waiting.count([])} were never answered"
            time.sleep(0.05)
        for gate in used:
            gate.unlink()


REQUESTS: dict[str, Callable[[Client], object]] = {
    "decode": lambda client: client.process(*FILES, seed=7),
    "preprocess": lambda client: client.process(PANORAMA, PANORAMA, seed=7),
    "osediff": lambda client: client.upscale(PANORAMA),
}


@pytest.mark.parametrize("model", REQUESTS)
def test_a_full_queue_is_told_at_once(
    model: str, closed: Closed, fill: Callable[[str], None]
) -> None:
    """Nothing in front of it ends before its answer."""
    fill(model)
    with Client(closed.url, retries=0) as client, pytest.raises(ServerBusy, match="maximum queue"):
        REQUESTS[model](client)


def test_a_full_queue_is_told_in_a_stream(closed: Closed, fill: Callable[[str], None]) -> None:
    fill("preprocess")
    with Client(closed.url) as client, pytest.raises(ServerBusy, match="maximum queue"):
        list(client.stream(PANORAMA, PANORAMA, seed=7))


def test_streams_are_counted(closed: Closed) -> None:
    gate = closed.repository / "preprocess" / "open"

    def begun(client: Client) -> Iterator[Event]:
        events = iter(client.stream(PANORAMA, PANORAMA, seed=7))
        next(events)  # accepted
        return events

    with ExitStack() as stack:
        clients = [stack.enter_context(Client(closed.url)) for _ in range(3)]
        streams = [begun(client) for client in clients[:2]]
        with pytest.raises(ServerBusy, match="2 groups are in work"):
            begun(clients[2])
        gate.touch()
        for events in streams:
            with pytest.raises(Exception, match="let go"):
                list(events)
        gate.unlink()
