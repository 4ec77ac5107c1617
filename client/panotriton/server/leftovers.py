"""What dead servers left, for `panotriton doctor`, and what callers left with a server that lives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from panotriton.pipeline.regions import FOLDER, NAME, held
from panotriton.server.processes import Stub, find_stubs

__all__ = ["SHM_PREFIX", "abandoned", "orphaned_stubs"]

# Client regions whose name starts with the first part are refused by the server, so that no client
# can register (and overwrite) the memory that it shares with its Python models.
SHM_PREFIX = "triton_python_backend_shm_region_panotriton_"


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
