"""How files come to be whole, or go: in one step, one writer at a time, or in folders held by a lock.

What a killed process leaves in such a folder can be told, and is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from panotriton.pipeline.regions import held

__all__ = ["PREFIX", "Scratch", "alone", "atomic", "dead_folders"]

PREFIX = "panotriton-"
"""Of those in the system's temporary folder."""

_LOCK = ".lock"


class Scratch:
    """A folder of its own below `parent`, by default the system's for such; `with` removes it.

    prefix: of its name. sweep: remove first what killed processes have left there by the same prefix.
    lock: the descriptor that holds it; a process that inherits it shares the folder.
    """

    def __init__(self, prefix: str, parent: Path | None = None, *, sweep: bool = True) -> None:
        for left in dead_folders(prefix, parent) if sweep else ():
            shutil.rmtree(left, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Locked before it has its name: none is ever seen that nobody holds yet.
        unnamed = self.path / f"{_LOCK}.new"
        self.lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # On a file system without locks none is found dead, either.
        with contextlib.suppress(OSError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(self.path / _LOCK)
        # Cleaners of /tmp, such as systemd-tmpfiles, leave a folder alone that is locked itself.
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it; safe to call twice."""
        if self.lock >= 0:
            os.close(self._folder)
            os.close(self.lock)  # before: NFS keeps files that are open, and their folder
            self.lock = -1
            shutil.rmtree(self.path, ignore_errors=True)


def dead_folders(prefix: str = PREFIX, parent: Path | None = None) -> list[Path]:
    """Those below `parent`, by default the system's temporary folder, whose processes are all gone."""
    where = parent or Path(tempfile.gettempdir())
    return [each for each in sorted(where.glob(f"{prefix}*")) if not held(each / _LOCK)]


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Where to write what then replaces `path` in one step; after an error, what was there is there.

    The name that it yields has the suffix of `path`, for libraries that tell a format by it.
    """
    part = path.with_name(f".{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process, or thread, is here for this folder, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
