"""Files that requests name, opened below the allowed roots only.

A path is resolved first, links included, and must then lie below a root. It is opened one component
at a time from the top of the file system, following no link: whatever is swapped between check and open
is refused or was inside all along. Roots are paths, not descriptors: one that was replaced by another
folder is that folder from the next request on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from panotriton.errors import InvalidInput, PanotritonError, brief, quoted
from panotriton.groups import layout
from panotriton.pipeline.contract import MAX_FILE_BYTES
from panotriton.web.gateway.failures import ForbiddenPath

__all__ = ["Roots"]


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Above a root, folders are passed through; that takes no permission to list them.
_PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without NONBLOCK, opening a named pipe would wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# A caller can cure these; a full disk is ours.
_NAME_AT_FAULT = (errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOTEMPTY)


@dataclass(frozen=True, slots=True)
class _Root:
    """folder: with its links resolved. ours: made again where it is missing. groups: only those in it."""

    folder: Path
    ours: bool = False
    groups: bool = False

    def holds(self, real: Path) -> bool:
        if not real.is_relative_to(self.folder):
            return False
        parts = real.relative_to(self.folder).parts
        return not self.groups or bool(parts and layout.group_number(Path(parts[0])))


class Roots:
    """The folders below which requests may read and write.

    output: one more, which is made when something is written to it. home: a folder of which only the
    group folders count, made in the same way. Raises InvalidInput where another does not exist.
    """

    def __init__(
        self, folders: Sequence[Path], output: Path | None = None, home: Path | None = None
    ) -> None:
        self._roots = [_Root(_existing(folder)) for folder in folders]
        if output is not None:
            self._roots.insert(0, _Root(_resolved(output), ours=True))
        if home is not None:
            self._roots.append(_Root(_resolved(home), ours=True, groups=True))

    def check(self, path: str) -> Path:
        """The path with its links resolved; a relative one starts at the working directory.

        Raises ForbiddenPath where it does not lie below a root, whether it exists or not.
        """
        return self._locate(path)[0]

    def absolute(self, path: str) -> Path:
        """The path as a caller knows it: from the top, its links not resolved. Raises as `check` does."""
        self.check(path)
        return Path(path).absolute()

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The content of a regular file of at most `max_bytes`.

        Raises ForbiddenPath outside the roots, InvalidInput where it cannot be read.
        """
        with self._file(path) as file:
            return _read_all(path, file, max_bytes)

    def modified_ns(self, path: str) -> int:
        """When a file was last written, in ns since the epoch. Raises as `read` does."""
        with self._file(path) as file:
            return os.fstat(file).st_mtime_ns

    def make(self, path: Path) -> None:
        """Make a folder where there is none. Raises as `write` does."""
        real, root = self._locate(str(path))
        with _folder(real, root, str(path), create=True):
            pass

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file in one step, so that a reader never sees half of it; makes its folders.

        Raises ForbiddenPath outside the roots, PanotritonError where it cannot be written.
        """
        # The name is not resolved: a link of that name is replaced, not followed.
        parent, root = self._locate(str(path.parent))
        if path.name in ("", ".."):
            raise _no_file(str(path))
        with _folder(parent, root, str(path), create=True) as folder:
            _replace(path, folder, data)

    @contextlib.contextmanager
    def _file(self, path: str) -> Iterator[int]:
        real, root = self._locate(path)
        if real == root.folder:
            raise _no_file(path)
        with _folder(real.parent, root, path) as folder:
            file = _open(path, real.name, folder, _READ)
        try:
            yield file
        finally:
            os.close(file)

    def _locate(self, path: str) -> tuple[Path, _Root]:
        """The resolved path and the innermost root that holds it."""
        try:
            real = Path(os.path.realpath(path))
        except (ValueError, OSError) as error:  # a NUL, or what no file name can hold
            raise InvalidInput(f"{quoted(path)} is no path: {error}") from error
        holders = [root for root in self._roots if root.holds(real)]
        if not holders:
            raise ForbiddenPath(
                f"{brief(path)} is outside the folders that this gateway may open; move it below one of "
                "them, or start the gateway with another --root"
            )
        return real, max(holders, key=lambda root: len(root.folder.parts))


def _existing(folder: Path) -> Path:
    try:
        os.close(os.open(folder, _FOLDER & ~os.O_NOFOLLOW))
    except OSError as error:
        raise InvalidInput(
            f"root {folder}: {error.strerror}; expected a folder that exists"
        ) from error
    return _resolved(folder)


def _resolved(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


@contextlib.contextmanager
def _folder(real: Path, root: _Root, path: str, *, create: bool = False) -> Iterator[int]:
    """A descriptor of the folder `real`, reached from the top without following a link."""
    top, *above = root.folder.parts
    steps = [(part, _PASSAGE, create and root.ours) for part in above[:-1]]
    steps += [(part, _FOLDER, create and root.ours) for part in above[-1:]]
    steps += [(part, _FOLDER, create) for part in real.relative_to(root.folder).parts]
    folder = os.open(top, _PASSAGE)
    try:
        for part, flags, make in steps:
            inner = _enter(path, part, folder, flags, make)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _enter(path: str, part: str, folder: int, flags: int, make: bool) -> int:
    if make:
        try:
            os.mkdir(part, dir_fd=folder)
        except FileExistsError:
            pass
        except OSError as error:
            raise _unwritable(path, error) from error
    return _open(path, part, folder, flags)


def _open(path: str, part: str, folder: int, flags: int) -> int:
    try:
        return os.open(part, flags, dir_fd=folder)
    except OSError as error:
        if _is_link(part, folder):  # resolved before: it has just taken the place of what was there
            raise ForbiddenPath(
                f"{brief(path)} leads through a link that is not safe to follow"
            ) from error
        raise InvalidInput(f"cannot open {brief(path)}: {error.strerror}") from error


def _is_link(part: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(part, dir_fd=folder).st_mode)
    except OSError:
        return False


def _read_all(path: str, file: int, max_bytes: int) -> bytes:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise _no_file(path)
    if status.st_size > max_bytes:
        raise InvalidInput(
            f"{brief(path)} has {status.st_size} bytes; expected at most {max_bytes}"
        )
    with open(file, "rb", closefd=False) as content:
        return content.read(max_bytes)


def _no_file(path: str) -> InvalidInput:
    return InvalidInput(f"{brief(path)} is not a regular file; expected the path of one")


def _replace(path: Path, folder: int, data: bytes) -> None:
    """Write beside, then rename."""
    temporary = f".{uuid.uuid4().hex}"
    try:
        with os.fdopen(os.open(temporary, _CREATE, 0o666, dir_fd=folder), "wb") as file:
            file.write(data)
        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise _unwritable(str(path), error) from error


def _unwritable(path: str, error: OSError) -> PanotritonError:
    kind = InvalidInput if error.errno in _NAME_AT_FAULT else PanotritonError
    return kind(f"cannot write {brief(path)}: {error.strerror}")
