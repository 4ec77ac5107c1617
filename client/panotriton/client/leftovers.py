"""Shared memory that dead processes left: what `panotriton doctor` lists and removes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from panotriton.pipeline.regions import FOLDER, NAME, held

__all__ = ["Leftover", "dead_regions", "find_leftovers"]

_YOUNG_S = 5.0
_SERVER = re.compile(r"triton_python_backend_shm_region_panotriton_[0-9a-f]+_")


@dataclass(frozen=True)
class Leftover:
    """A file in /dev/shm that nobody needs any more."""

    path: Path
    nbytes: int
    owner: str

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def find_leftovers(folder: Path = FOLDER) -> list[Leftover]:
    """Regions of clients that no longer hold their lock, and of servers that no process maps.

    Files younger than 5 s are left alone: their owner may not have locked or mapped them yet.
    """
    found = []
    mapped = _mapped_names(folder)
    for path in sorted(filter(_settled, folder.glob("*panotriton_*"))):
        client = NAME.match(path.name)
        if client and not held(path):
            found.append(_leftover(path, f"client, process {client[1]}"))
        elif _SERVER.match(path.name) and path.name not in mapped:
            found.append(_leftover(path, "server"))
    return found


def dead_regions(names: list[str], folder: Path = FOLDER) -> list[str]:
    """Those of a server's registered regions whose client is gone: no lock held, no such process."""
    return [name for name in names if (m := NAME.match(name)) and _dead(folder / name, int(m[1]))]


def _settled(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > _YOUNG_S
    return False


def _dead(path: Path, pid: int) -> bool:
    return not held(path) if path.exists() else not Path(f"/proc/{pid}").exists()


def _leftover(path: Path, owner: str) -> Leftover:
    return Leftover(path, path.stat().st_size, owner)


def _mapped_names(folder: Path) -> set[str]:
    return {name for maps in Path("/proc").glob("[0-9]*/maps") for name in _names_in(maps, folder)}


def _names_in(maps: Path, folder: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
        for line in maps.read_text(errors="replace").splitlines():
            if f"{folder}/" in line and not line.endswith("(deleted)"):
                yield line.rpartition("/")[2]
