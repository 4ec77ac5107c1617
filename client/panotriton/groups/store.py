"""Where a run reads and writes: a folder, or an object store by its URL.

Everything is written whole or not at all. `create` is what makes a group's result exist exactly once: of
several writers one succeeds, and the others learn that they came late.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from panotriton.errors import InvalidInput, PanotritonError, StoreError, brief
from panotriton.pipeline.scratch import Scratch, atomic

__all__ = [
    "FolderStore",
    "ObjectStore",
    "Store",
    "is_url",
    "json_bytes",
    "json_line",
    "open_store",
]

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def is_url(place: object) -> bool:
    """Whether `place` names an object store rather than a folder of this machine."""
    return bool(_URL.match(str(place)))


def open_store(place: str | Path) -> Store:
    """The store at a path or a URL (s3://bucket/prefix, gs://bucket/prefix, what fsspec knows).

    Credentials are the environment's, as the store's own tools read them. Raises InvalidInput for a
    URL that carries some, for an unknown scheme, and where the scheme's library is not installed.
    """
    return ObjectStore(str(place)) if is_url(place) else FolderStore(Path(place))


def json_bytes(content: Any) -> bytes:
    """As JSON that people read is written."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # Of a name that is no UTF-8, Python's \udcff for the byte ff is JSON's escape as well.
    return text.encode(errors="backslashreplace")


def json_line(content: Any) -> bytes:
    """The same on one line, ten times as fast: what there is one of for each group."""
    return (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


_EXISTS = ("PreconditionFailed", "412")
_IN_CONFLICT = ("ConditionalRequestConflict", "OperationAborted", "409")
_CONFLICT_WAITS_S = (0.1, 0.4, 1.6)
_MAGIC = frozenset("*?[")


class Store:
    """Files below one place, by relative names with slashes."""

    place: str

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is none."""
        raise NotImplementedError

    def write(self, name: str, data: bytes) -> None:
        """Replace the file."""
        raise NotImplementedError

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist; False where it does."""
        raise NotImplementedError

    def list(self, folder: str) -> Iterator[str]:
        """Names of what lies directly in a folder, without its path; none where there is no folder."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it; nothing where there is none."""
        raise NotImplementedError

    def read_json(self, name: str) -> Any:
        """None where there is no such file."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self.place}/{name} is no JSON ({error}), as after a power loss: remove it, and run the "
                "same command again"
            ) from error

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write piece by piece; it replaces the one of that name at the end."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self._upload(name, file)

    def _upload(self, name: str, file: BinaryIO) -> None:
        raise NotImplementedError

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json_bytes(content))


class FolderStore(Store):
    """A folder of this machine, or one that all machines of a run mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self._replacing(name) as part:
            part.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _create_unnamed(path, data)
        except FileExistsError:
            return False
        except (OSError, AttributeError):  # files without a name are Linux's, and NFS has none
            with Scratch(".create-", path.parent, sweep=False) as scratch:
                part = scratch / "part"
                part.write_bytes(data)
                try:
                    path.hardlink_to(part)  # the one step that refuses an existing name
                except FileExistsError:
                    return False
        return True

    def list(self, folder: str) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry.name

    def remove(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _upload(self, name: str, file: BinaryIO) -> None:
        with self._replacing(name) as part, part.open("wb") as copy:
            shutil.copyfileobj(file, copy)

    def _replacing(self, name: str) -> AbstractContextManager[Path]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return atomic(path)


def _create_unnamed(path: Path, data: bytes) -> None:
    """A file that has no name until it is whole: of a process that is killed nothing is left."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o666, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder)
    finally:
        os.close(folder)


class ObjectStore(Store):
    """An object store, through fsspec. `create` is a conditional put (If-None-Match, if-generation-match)."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if "@" in rest.split("/")[0]:
            raise InvalidInput(
                f"the URL {scheme}://…{rest.rpartition('@')[2]} carries credentials, which would end up in "
                "logs: leave them out, and set the environment variables or files of the store's own tools"
            )
        self.place = url.rstrip("/")
        self._root = rest.rstrip("/")
        self._files = _file_system(scheme)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return ObjectStore, (self.place,)  # connections don't travel

    def read(self, name: str) -> bytes:
        with self._named(name):
            return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        with self._named(name):
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        with self._named(name):
            for wait_s in (*_CONFLICT_WAITS_S, None):
                try:
                    self._files.pipe_file(self._path(name), data, mode="create")
                except FileExistsError:
                    return False
                except OSError as error:
                    answer = _answer(error)
                    if answer in _EXISTS:
                        return False
                    if answer not in _IN_CONFLICT or wait_s is None:
                        raise
                    time.sleep(wait_s)  # another put of that name is not decided yet
                else:
                    return True
            raise AssertionError("the last try returns or raises")

    def list(self, folder: str) -> Iterator[str]:
        path = self._path(folder).rstrip("/")
        with self._named(folder), contextlib.suppress(FileNotFoundError):
            for found in self._files.ls(path, detail=False, refresh=True):
                if name := str(found).rstrip("/").removeprefix(f"{path}/"):
                    yield name

    def remove(self, name: str) -> None:
        path = self._path(name)
        with self._named(name), contextlib.suppress(FileNotFoundError):
            if not _MAGIC.intersection(path):
                self._files.rm(path, recursive=True)
                return
            # Exactly: rm takes brackets and stars for patterns.
            for found in self._files.find(path):
                self._files.rm_file(found)

    def _upload(self, name: str, file: BinaryIO) -> None:
        with self._named(name):
            remote = self._files.open(self._path(name), "wb")
            try:
                shutil.copyfileobj(file, remote, 1 << 24)
            except BaseException:  # to close it would keep what has been sent
                with contextlib.suppress(Exception):
                    remote.discard()
                remote.closed = True
                raise
            remote.close()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Libraries raise what they like: all but a missing file becomes a StoreError that says where."""
        try:
            yield
        except (FileNotFoundError, PanotritonError):
            raise
        except Exception as error:
            raise StoreError(f"{self.place}/{name}: {type(error).__name__}: {error}") from error


def _answer(error: OSError) -> str:
    """What the store answered: S3's code, or the HTTP status of others."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if (code := getattr(each, "code", None)) is not None:
            return str(code)
    return ""


def _file_system(scheme: str) -> Any:
    extra = _EXTRAS.get(scheme)
    install = f": pip install 'panotriton[{extra}]'" if extra else ""
    try:
        import fsspec  # noqa: PLC0415 an extra's

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise InvalidInput(f"{scheme}:// needs a library that is not installed{install}") from error
    except ValueError as error:
        raise InvalidInput(
            f"{brief(scheme)}:// is no scheme of an object store; expected s3:// or gs://, or a folder's path"
        ) from error
