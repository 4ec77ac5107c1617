"""A server to do harm to: killed, stopped, its models' processes killed, started again on the same ports."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.brief import BriefServer


class Victim:
    """A stand-in server whose addresses stay, whatever happens to it."""

    def __init__(self, repository: Path, log: Path) -> None:
        self._repository = repository
        self._log = log
        self._server = BriefServer(repository, log_file=log, controlled=True)
        self._start()

    def _start(self) -> None:
        self._server.__enter__()

    @property
    def grpc_url(self) -> str:
        return self._server.grpc_url

    @property
    def http_url(self) -> str:
        return self._server.http_url

    def kill(self) -> None:
        os.kill(self._server.pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP: the machine still answers pings and accepts connections, the server nothing."""
        os.kill(self._server.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server.pid, signal.SIGCONT)

    def kill_stub(self, model: str) -> None:
        """The process of a Python model; the server never starts another."""
        for process in psutil.Process(self._server.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(f"/{model}/1/model.py" in word for word in process.cmdline()):
                    process.kill()

    def drain(self) -> None:
        """What is in flight ends; newcomers are refused until another server is there."""
        assert self._server.control.drain(60), "requests that never end"

    def restart(self) -> None:
        """Another server on the same ports."""
        self._end()
        ports = {name: getattr(self._server, name) for name in ("http_port", "grpc_port")}
        self._server = BriefServer(self._repository, log_file=self._log, controlled=True, **ports)
        self._start()

    def close(self) -> None:
        self._end()

    def _end(self) -> None:
        self.go_on()
        self._server.stop()


HARMS = ("kill", "freeze", "kill a stub")
_MODELS = ("osediff", "osediff_unet", "preprocess", "qwen_scorer", "interpolate")


def made(output: Path) -> int:
    """Groups of a run that are complete on disk."""
    # Not glob, which fails where a folder goes while it looks.
    return sum(
        "group_info.json" in files for folder, _, files in os.walk(output) if ".part" not in folder
    )


@contextlib.contextmanager
def harmed(
    victim: Victim,
    output: Path,
    seed: int,
    harms: tuple[str, ...] = HARMS,
    *,
    frozen_s: float = 6.0,
    within_s: float = 1.5,
) -> Iterator[list[str]]:
    """Does each harm once, in seeded order, at seeded moments, while a run writes to `output`.

    within_s: the latest moment, after the groups that come first. Two groups are made between one harm and
    the next, so that with two in flight no pair meets two. Gives what was done, so far.
    """
    rng = random.Random(seed)
    order = rng.sample(harms, len(harms))
    moments = [rng.uniform(0, within_s) for _ in harms]
    models = [rng.choice(_MODELS) for _ in harms]
    ended = threading.Event()
    done: list[str] = []

    def work() -> None:
        for number, (harm, moment, model) in enumerate(zip(order, moments, models, strict=True)):
            begin = made(output) + 2 if number else 0
            while made(output) < begin or not output.exists():
                if ended.wait(0.02):
                    return
            if ended.wait(moment):
                return
            done.append(f"{harm}: {model}" if "stub" in harm else harm)
            _do(victim, harm, model, frozen_s)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


def _do(victim: Victim, harm: str, model: str, frozen_s: float) -> None:
    if harm == "freeze":
        victim.stop()
        time.sleep(frozen_s)
        victim.go_on()
        return
    if harm == "drain":
        victim.drain()
    elif harm == "kill":
        victim.kill()
    else:
        victim.kill_stub(model)
        if harm.endswith("for good"):
            return
        time.sleep(3)  # requests fail; then somebody starts the server again
    victim.restart()
