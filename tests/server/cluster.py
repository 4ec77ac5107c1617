"""A Ray cluster of this machine and stand-in replicas, and what kills their processes."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil

from tests.replica import Replica

HARMS = ("worker", "replica", "driver")


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def write_panoramas(folder: Path, count: int, *, broken: bool = False) -> Path:
    """Small ones of a colour each; the broken one is no image."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((64, 128, 3), number * 7 % 256, np.uint8)
        cv2.imwrite(str(folder / f"p{number:03d}.png"), pixels)
    if broken:
        (folder / "broken.png").write_bytes(b"no image")
    return folder


@contextlib.contextmanager
def replicas(count: int, *arguments: object) -> Iterator[list[Replica]]:
    started = [Replica(free_port(), *arguments) for _ in range(count)]
    try:
        yield started
    finally:
        for replica in started:
            replica.kill()


class Cluster:
    """`ray start`, several workers on a few processors."""

    def __init__(self, log: Path) -> None:
        # Short: sockets lie below it, whose paths may have 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Only what a run asks for is started: each process costs seconds.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "2"),
            *("--include-dashboard", "false", "--object-store-memory", str(100 << 20)),
            *("--temp-dir", self._folder.name, "--disable-usage-stats"),
        ]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while "--block" not in log.read_text():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def workers(self) -> list[psutil.Process]:
        """Processes of the pool's actors."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("MapWorker" in word for word in process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(children, timeout=5)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def run_harmed(
    command: list[str],
    output: Path,
    cluster: Cluster,
    servers: list[Replica],
    harms: list[str],
    seed: int,
    wanted: int,
) -> list[str]:
    """Run until it is done, and kill -9 what `harms` name when about a random number of groups is recorded.

    A driver that was killed is started again, a replica a moment later; workers are Ray's affair.
    """
    rng = random.Random(seed)
    moments = sorted(rng.randrange(2, wanted - 4) for _ in harms)
    done: list[str] = []
    driver = _Driver(command, cluster.environment)
    ended = threading.Event()

    def harm() -> None:
        for moment, what in zip(moments, harms, strict=True):
            while recorded(output) < moment:
                if ended.wait(0.02):
                    return
            done.append(f"{what} after {recorded(output)} groups")
            _do(what, driver, cluster, rng.choice(servers), rng)

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        driver.finish()
    finally:
        ended.set()
        thread.join()
    return done


class _Driver:
    """The command, started again whenever it was killed."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, env=self._environment
        )

    def kill(self) -> None:
        self._process.kill()

    def finish(self) -> None:
        while (code := self._process.wait(timeout=240)) == -signal.SIGKILL:
            self._start()
        assert code == 0


def recorded(output: Path) -> int:
    """Groups whose record is there."""
    return sum(
        name.endswith(".json") and name.count(".") == 1
        for _, _, names in os.walk(output / "records")
        for name in names
        if not name.startswith(".")
    )


def _some(cluster: Cluster) -> list[psutil.Process]:
    """Its workers, once there is one: all may have been killed just now."""
    end = time.monotonic() + 60
    while not (workers := cluster.workers()):
        assert time.monotonic() < end, "no worker has been started again"
        time.sleep(0.05)
    return workers


def _do(what: str, driver: _Driver, cluster: Cluster, server: Replica, rng: random.Random) -> None:
    kill: dict[str, Callable[[], None]] = {
        "driver": driver.kill,
        "worker": lambda: rng.choice(_some(cluster)).kill(),
        "replica": server.kill,
    }
    kill[what]()
    if what == "replica":
        time.sleep(1)
        server.restart()
