"""What dead servers left, for `panotriton doctor`, and what callers left with a server that lives."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from panotriton.pipeline.regions import FOLDER, NAME, held
from panotriton.server.processes import Stub, find_stubs

__all__ = [
    "SHM_PREFIX",
    "WORK_PREFIX",
    "abandoned",
    "dead_folders",
    "lock_folder",
    "orphaned_stubs",
]

# Client regions whose name starts with the first part are refused by the server, so that no client
# can register (and overwrite) the memory that it shares with its Python models.
SHM_PREFIX = "triton_python_backend_shm_region_panotriton_"
WORK_PREFIX = "panotriton-server-"
_LOCK = "lock"


@dataclass(frozen=True)
class DeadFolder:
    """A launcher's temporary folder that nobody uses any more."""

    path: Path

    def remove(self) -> None:
        """Delete it and what is in it."""
        shutil.rmtree(self.path)


def lock_folder(folder: Path) -> int:
    """Mark a launcher's temporary folder as used, as long as a process holds the descriptor given back."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def dead_folders(parent: Path | None = None) -> list[DeadFolder]:
    """Temporary folders of launchers that are gone with their servers and stubs."""
    where = parent or Path(tempfile.gettempdir())
    return [
        DeadFolder(folder)
        for folder in sorted(where.glob(f"{WORK_PREFIX}*"))
        if not held(folder / _LOCK)
    ]


def orphaned_stubs() -> list[Stub]:
    """Stubs of our servers whose server is gone."""
    return list(_orphans())


def abandoned(regions: Iterable[str], folder: Path = FOLDER) -> list[str]:
    """Of a server's registered regions those that our clients will not name again: the file is removed,
    or its owner is dead. Other clients' are left alone.
    """
    return [name for name in regions if NAME.match(name) and _let_go(folder / name)]


def _let_go(path: Path) -> bool:
    return not path.exists() or not held(path)


def _orphans() -> Iterator[Stub]:
    for stub in find_stubs():
        if stub.region.startswith(SHM_PREFIX) and stub.orphaned:
            yield stub
