"""What /proc says of the Python models' processes: a request that is not answered proves nothing, since
a model may work for minutes; a process that is gone proves everything, and asking it costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "Stall", "Stub", "find_stubs", "look_at"]

_PROC = Path("/proc")
_STUB = "triton_python_backend_stub"
_KILL_S = 5.0
_STALLED_S = 5.0  # a server takes note of a process that ends in order at once
_NAME = _STUB[:15]  # as /proc has it
_INSTANCE = re.compile(r"(.+)_\d+_\d+$")


@dataclass(frozen=True)
class Process:
    """A process as /proc/PID/stat shows it; state is R, S, D, T (stopped), Z (dead, not yet reaped) …"""

    pid: int
    name: str
    state: str
    parent: int

    @property
    def dead(self) -> bool:
        return self.state in ("Z", "X")

    @property
    def stopped(self) -> bool:
        return self.state in ("T", "t")


@dataclass(frozen=True)
class Stub:
    """A process that runs one instance of a Python model, and what its command line says."""

    process: Process
    instance: str
    region: str
    server: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def model(self) -> str:
        match = _INSTANCE.match(self.instance)
        return match[1] if match else self.instance

    @property
    def orphaned(self) -> bool:
        """Whether its server is gone. Seen from another PID namespace, `server` is another number."""
        parent = look_at(self.process.parent)
        return parent is None or parent.dead or "tritonserver" not in parent.name

    def kill(self) -> None:
        """End it and wait for that; not there any more is as good."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_S
        while (left := look_at(self.pid)) and not left.dead and time.monotonic() < deadline:
            time.sleep(0.01)


class Stall:
    """A server that loads a model whose process has died: it takes no note, and waits for minutes."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._since: dict[int, float] = {}

    def seen(self) -> bool:
        """Whether a process died some time ago, and is still its zombie; to be asked again and again."""
        processes = (look_at(int(folder.name)) for folder in _PROC.glob("[0-9]*"))
        zombies = {
            process.pid
            for process in processes
            if process and process.dead and process.parent == self._server
            if process.name == _NAME
        }
        now = time.monotonic()
        self._since = {pid: self._since.get(pid, now) for pid in zombies}
        return any(now - since > _STALLED_S for since in self._since.values())


def look_at(pid: int) -> Process | None:
    """The process, or None where there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    head, _, rest = text.rpartition(")")
    state, parent = rest.split()[:2]
    return Process(pid, head.partition("(")[2], state, int(parent))


def find_stubs(server: int | None = None) -> list[Stub]:
    """The living stubs of one server, by its process id, or those of every server on this machine."""
    return [stub for stub in _stubs() if server is None or stub.process.parent == server]


def _stubs() -> Iterator[Stub]:
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            process = look_at(int(folder.name))
            # stub, model file, region, its size, its growth, server, backend folder, handle, instance …
            if process and arguments[0].endswith(_STUB) and len(arguments) > 8:
                yield Stub(process, arguments[8], arguments[2], int(arguments[5]))
