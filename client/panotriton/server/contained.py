"""A container's first process: starts tritonserver, supervises it, drains it before its end.

    python3 -m panotriton.server.contained COMMAND …

A dead model is loaded anew; whatever takes more ends this process with EXIT_GAVE_UP, so that the container's
engine, which counts and delays restarts, starts another. The environment says the rest: entrypoint.sh.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from panotriton.errors import InvalidInput
from panotriton.pipeline.placement import SETTING
from panotriton.server.control import ModelControl
from panotriton.server.health import answer_probes
from panotriton.server.launch import die_with_parent
from panotriton.server.processes import Loading, Stub
from panotriton.server.repository import placed, served_here, with_behind
from panotriton.server.supervise import EXIT_GAVE_UP, Supervisor

_POLL_S = 0.5
_EXIT_S = 10.0  # to unload what has nothing left to do
_WRONG_SETTING = 2
_LOAD = "--load-model="
_FOLDER = "--model-repository="


class Contained:
    """tritonserver as the child of this process, its log on this process's output."""

    def __init__(self, command: Sequence[str], http_url: str, key: str) -> None:
        self.control = ModelControl(http_url, key)
        self._command = [*die_with_parent(), *command]
        self._process: subprocess.Popen[bytes] | None = None
        self.loaded: set[Stub] = set()

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """Start it; it is not ready yet."""
        self._process = subprocess.Popen(self._command, start_new_session=True)

    def wait_ready(self) -> int | None:
        """Wait as long as it loads; an exit code where it ends instead. Whoever probes sets the limit."""
        loading = Loading(self.pid)
        self.loaded = loading.stubs
        while self.exit_code() is None and not self.control.healthy("ready"):
            loading.look()
            if loading.stalled:
                print("a model's process died as it loaded", file=sys.stderr, flush=True)
                return EXIT_GAVE_UP
            time.sleep(_POLL_S)
        return self.exit_code()

    def exit_code(self) -> int | None:
        """How the server ended, -N by signal N; None while it runs."""
        return self._running().poll()

    def kill(self) -> None:
        """End it and its stubs at once."""
        process = self._running()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End it in order, or at once where that takes too long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running().terminate()
            self._running().wait(_EXIT_S)
        self.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "started by main"  # noqa: S101
        return self._process


def with_models(command: Sequence[str], placement: str) -> list[str]:
    """The command, loading what this server needs to. Raises InvalidInput for a wrong placement."""
    elsewhere = placed(placement)
    asked = [part.removeprefix(_LOAD) for part in command if part.startswith(_LOAD)]
    (folder,) = (part.removeprefix(_FOLDER) for part in command if part.startswith(_FOLDER))
    loads = [_LOAD + name for name in _to_load(folder, asked, elsewhere)]
    first = next((i for i, part in enumerate(command) if part.startswith(_LOAD)), len(command))
    return [*command[:first], *loads, *(p for p in command[first:] if not p.startswith(_LOAD))]


def _to_load(folder: str, asked: list[str], elsewhere: Collection[str]) -> list[str]:
    """Of *, not what other servers have; of names, also what only those ask."""
    if "://" in folder:  # an object store, not to be listed here
        if "*" in asked and elsewhere:
            raise InvalidInput(
                f"{SETTING} with the repository {folder}: name the models to load in PANOTRITON_LOAD_MODELS"
            )
        return asked
    if "*" not in asked:
        return with_behind(Path(folder), asked)
    return served_here(Path(folder), elsewhere) if elsewhere else asked


def main(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Serve until a signal or until only a new container helps; the exit code."""
    port = environment["PANOTRITON_HTTP_PORT"]
    host = environment["PANOTRITON_HOST"]
    asked = environment["PANOTRITON_HTTP_HOST"]
    here = "127.0.0.1" if asked == "0.0.0.0" else asked  # noqa: S104
    key = os.environ.pop("PANOTRITON_ADMIN_KEY", "")
    try:
        command = with_models(command, environment.get(SETTING, ""))
    except InvalidInput as error:
        print(f"entrypoint: {error}", file=sys.stderr)
        return _WRONG_SETTING
    server = Contained(command, f"{here}:{port}", key)
    supervisor = Supervisor(
        server, drain_s=float(environment["PANOTRITON_EXIT_TIMEOUT_S"]), restarts=0
    )
    signal.signal(signal.SIGTERM, _end_while_loading)
    with answer_probes(supervisor, host, int(environment["PANOTRITON_HEALTH_PORT"])):
        server.start()
        try:
            code = server.wait_ready()
            return supervisor.run() if code is None else code
        finally:
            server.stop()


def _end_while_loading(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)  # nobody has been served yet


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
