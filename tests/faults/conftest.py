"""Supervised servers to do harm to. Each is a process of its own, as `panotriton serve` is."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from panotriton.client.client import Client
from panotriton.server.processes import Stub, find_stubs

HERE = Path(__file__).parent
# What is promised of service and answers after any death, in seconds beyond the time that loading takes.
PROMISED_S = 30.0


class Serving:
    """One supervised server and what it said."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._addresses: dict[str, str] = {}
        self._started = threading.Event()
        began = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._started.wait(300), self.text()
        assert "gRPC" in self._addresses, self.text()
        self.patience_s = PROMISED_S + time.monotonic() - began

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.append(line)
                if match := re.match(r"  (\w+) +(\S+)$", line):
                    self._addresses[match[1]] = match[2]
                if line.startswith("ready"):
                    self._started.set()
        self._started.set()

    @property
    def grpc(self) -> str:
        return self._addresses["gRPC"]

    @property
    def http(self) -> str:
        return self._addresses["HTTP"].removeprefix("http://")

    def text(self) -> str:
        return "".join(self.said)

    def server(self) -> psutil.Process:
        (server,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.name() == "tritonserver"
        ]
        return server

    def stubs(self, model: str) -> list[Stub]:
        return [stub for stub in find_stubs(self.server().pid) if stub.model == model]

    def kill_stubs(self, model: str) -> None:
        stubs = self.stubs(model)
        assert stubs, f"no process of {model}"
        for stub in stubs:
            os.kill(stub.pid, signal.SIGKILL)

    def probe(self, path: str) -> tuple[int, str]:
        """Status and text of the supervision's own endpoint."""
        host, port = self._addresses["health"].removeprefix("http://").split("/")[0].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def count(self, metric: str) -> float:
        """The sum of one metric over its labels."""
        found = re.findall(rf"^{metric}(?:{{.*}})? (\S+)$", self.probe("/metrics")[1], re.MULTILINE)
        return sum(map(float, found))

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.patience_s
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.text()}"
            time.sleep(0.2)

    def close(self) -> None:
        """At once, by two signals: test_ends.py has the end in order, which takes ten seconds."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)


class Answer(threading.Thread):
    """One call of a client in the background, and how it ended."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: object = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            self.error = error

    def ended(self) -> bool:
        return not self.is_alive()


def group(
    serving: Serving, panoramas: tuple[np.ndarray, np.ndarray], prompt: str = ""
) -> list[int]:
    """One small group by one request: the intervals kept."""
    with Client(serving.grpc, retries=0, timeout_s=300) as client:
        return list(client.process(*panoramas, **SMALL, prompt=prompt).kept)


def stream(
    serving: Serving, panoramas: tuple[np.ndarray, np.ndarray], prompt: str = ""
) -> list[str]:
    """The same as events: their names."""
    with Client(serving.grpc, retries=0, timeout_s=300) as client:
        return [type(event).__name__ for event in client.stream(*panoramas, **SMALL, prompt=prompt)]


SMALL = {"seed": 7, "crop_size": 64, "interpolations": 0, "threshold": 0.0}


@contextmanager
def served(repository: Path, folder: Path, *arguments: str) -> Iterator[Serving]:
    """`panotriton serve` on free ports."""
    log = folder / "server.log"
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--health-port=0"]
    options = ["--repository", str(repository), "--log-file", str(log), *ports, *arguments]
    serving = Serving([sys.executable, str(HERE / "serving.py"), json.dumps(options)], log)
    try:
        yield serving
    finally:
        serving.close()


@pytest.fixture(scope="module")
def serving(
    standin_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    with served(standin_repository, tmp_path_factory.mktemp("serving"), "--restarts=20") as running:
        yield running
