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

__all__ = ["Loading", "Process", "Stub", "find_stubs", "look_at"]

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


class Loading:
    """A server that loads its models: the processes that it begins, and one that dies as it does.

    Of such a one the server takes no note, and waits for minutes.
    """

    def __init__(self, server: int) -> None:
        self.stubs: set[Stub] = set()
        self._server = server
        self._since: dict[int, float] = {}

    def look(self) -> None:
        """See what there is; to be called again and again."""
        dead = set()
        for process in _processes(self._server):
            if process.dead:
                dead.add(process.pid)
            elif stub := _stub(process):
                self.stubs.add(stub)
        now = time.monotonic()
        self._since = {pid: self._since.get(pid, now) for pid in dead}

    @property
    def stalled(self) -> bool:
        """Whether a process died some time ago, and is still the server's zombie."""
        return any(time.monotonic() - since > _STALLED_S for since in self._since.values())


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
    return [stub for process in _processes(server) if (stub := _stub(process))]


def _processes(server: int | None) -> Iterator[Process]:
    """Those that have a stub's name, dead ones too."""
    for folder in _PROC.glob("[0-9]*"):
        process = look_at(int(folder.name))
        if process and process.name == _NAME and server in (None, process.parent):
            yield process


def _stub(process: Process) -> Stub | None:
    with contextlib.suppress(OSError):  # ended meanwhile
        line = (_PROC / str(process.pid) / "cmdline").read_bytes().decode(errors="replace")
        arguments = line.split("\0")
        # stub, model file, region, its size, its growth, server, backend folder, handle, instance …
        if arguments[0].endswith(_STUB) and len(arguments) > 8:
            return Stub(process, arguments[8], arguments[2], int(arguments[5]))
    return None
