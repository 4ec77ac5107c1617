"""A server to do harm to: killed, stopped, its models' processes killed, started again on the same ports."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil

from panotriton.server.launch import LocalServer


class Victim:
    """A stand-in server whose addresses stay, whatever happens to it."""

    def __init__(self, repository: Path, log: Path) -> None:
        self._repository = repository
        self._log = log
        self._server = LocalServer(repository, log_file=log)
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

    def restart(self) -> None:
        """Another server on the same ports."""
        self.close()
        ports = {name: getattr(self._server, name) for name in ("http_port", "grpc_port")}
        self._server = LocalServer(self._repository, log_file=self._log, **ports)
        self._server.__enter__()

    def close(self) -> None:
        self.go_on()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server.pid, signal.SIGKILL)
        self._server.stop()
