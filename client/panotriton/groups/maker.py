"""One pair of panoramas to one recorded group: what every engine does with a row, and all that it does."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from panotriton import __version__
from panotriton.client.aio import AsyncClient
from panotriton.errors import (
    ConnectError,
    InvalidInput,
    OutOfPatience,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
    StoreError,
    brief,
)
from panotriton.groups.balance import BUSY, DONE, LOST, SLOW, UNUSED
from panotriton.groups.folder import base_name, process_command
from panotriton.groups.plan import Pair, Plan, read_panorama
from panotriton.groups.records import MAX_ATTEMPTS, Records
from panotriton.groups.replicas import Lease, Servers, other_weights
from panotriton.groups.sinks import Record, open_sink
from panotriton.groups.store import is_url, open_store
from panotriton.pipeline.results import Group
from panotriton.pipeline.scratch import PREFIX, Scratch, atomic

__all__ = ["INPUT", "SERVER", "Board", "Maker", "Outcome", "Panoramas", "to_the_end"]

INPUT, SERVER = "input", "server"
"""Whose trouble it was that a pair gave no group."""

_CACHE_BYTES = 2 << 30  # of panoramas that came from an object store
_AWAY_WAITS_S = (1.0, 2.0, 4.0)  # for a share that is away
_BUSY_WAIT_S, _LONGEST_BUSY_WAIT_S = 0.5, 30.0
_LOADING_WAIT_S, _LOADING_TRIES = 0.5, 60


T = TypeVar("T")


class Board(Protocol):
    """`Replicas`, or what stands for one in another process."""

    async def acquire(self, ticket: int | None = None) -> Lease: ...

    async def release(
        self,
        lease: Lease,
        outcome: str,
        seconds: float = 0.0,
        error: PanotritonError | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What came of a pair: intervals kept of a group of so many bytes, or an error and whose trouble it was.

    attempts: how often a server has failed on it, in all runs.
    """

    index: int
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    trouble: str = ""
    attempts: int = 0

    @property
    def made(self) -> bool:
        return not self.error


class Maker:
    """Makes and records groups of one run; `make` may be called any number of times at once.

    patience_s: how long servers may have no room.
    """

    def __init__(
        self, plan: Plan, servers: Servers, board: Board, patience_s: float = 600.0
    ) -> None:
        self._plan = plan
        self._servers = servers
        self._board = board
        self._patience_s = patience_s
        self._sink = open_sink(plan.output, plan.layout, pages=plan.pages)
        self._records = Records(open_store(plan.output))
        self._panoramas = Panoramas()
        self._clients: dict[str, AsyncClient] = {}
        self._names: dict[str, str] = {}

    async def close(self) -> None:
        """Close the channels, and remove copies of panoramas."""
        self._panoramas.close()
        for client in self._clients.values():
            await client.close()

    async def make(self, index: int, attempts: int = 0) -> Outcome:
        """Make and record one group, or record why there is none.

        attempts: how often servers have failed on it before. A server's trouble is waited out: raises
        OutOfPatience where that takes too long, ConnectError where no server ever answered, StoreError
        where nothing can be kept.
        """
        pair = self._plan.pair(index)
        if known := await asyncio.to_thread(self._sink.find, pair):
            return await to_the_end(self._recorded, pair, known, 0.0)
        tried = _Tried(self._patience_s)
        while True:
            try:  # each time: copies may have made room for others meanwhile
                bases, paths = _bases(pair), await self._paths(pair)
            except InvalidInput as error:
                return await to_the_end(self._failed, pair, str(error), INPUT, attempts)
            ticket = random.getrandbits(62) if attempts else None
            lease = await self._board.acquire(ticket)
            try:
                group, seconds = await self._try(lease, pair, paths)
            except _Trouble as trouble:
                if trouble.counts:
                    attempts = await to_the_end(self._attempted, pair, lease, trouble.error)
                words = self._named(str(trouble.error), pair, paths)
                if trouble.ends:
                    return await to_the_end(self._failed, pair, words, trouble.whose, attempts)
                if attempts >= MAX_ATTEMPTS:
                    words = f"{attempts} attempts failed, the last by {lease.address}: {words}"
                    return await to_the_end(self._failed, pair, words, SERVER, attempts)
                await tried.pause(trouble)
                continue
            about = self._about(lease.address, pair)
            return await to_the_end(self._keep, pair, group, bases, about, seconds)

    async def _paths(self, pair: Pair) -> list[Path]:
        return [
            await asyncio.to_thread(self._panoramas.path, name, digest)
            for name, digest in zip(pair.panoramas, pair.digests, strict=True)
        ]

    def _keep(
        self, pair: Pair, group: Group, bases: tuple[str, str], about: Record, seconds: float
    ) -> Outcome:
        return self._recorded(pair, self._sink.write(pair, group, bases, about), seconds)

    async def _try(self, lease: Lease, pair: Pair, paths: list[Path]) -> tuple[Group, float]:
        """One request; tells the board what came of it. Raises _Trouble."""
        client = self._client(lease.address)
        work = client.process(
            *paths, seed=pair.seed, intermediates=True, **dict(self._plan.options)
        )
        began = time.monotonic()
        try:
            group = await asyncio.wait_for(work, lease.deadline_s)
            await self._check_weights(client, lease)
            await self._learn_name(client, lease.address)
        except (asyncio.TimeoutError, PanotritonError) as error:
            trouble = _judged(error, lease)
            says = trouble.error if trouble.says == LOST else None
            await self._board.release(lease, trouble.says, 0.0, says)
            raise trouble from error
        except BaseException:
            await self._board.release(lease, UNUSED)
            raise
        seconds = time.monotonic() - began
        await self._board.release(lease, DONE, seconds)
        return group, seconds

    async def _check_weights(self, client: AsyncClient, lease: Lease) -> None:
        """A server may have been started anew, with others, since the run last asked it."""
        ours = dict(self._plan.weights)
        for _ in range(_LOADING_TRIES):
            served = await client.weights()
            if served == ours:
                return
            if (
                any(ours.get(model) != each for model, each in served.items())
                or await client.ready()
            ):
                break
            await asyncio.sleep(_LOADING_WAIT_S)  # a model is being loaded anew
        raise ServerUnavailable(other_weights(lease.address, served, ours))

    def _client(self, address: str) -> AsyncClient:
        return self._clients.setdefault(address, self._servers.client(address))

    async def _learn_name(self, client: AsyncClient, address: str) -> None:
        if address not in self._names:
            health = await client.health()
            self._names[address] = f"{health.name} {health.version}".strip()

    def _about(self, address: str, pair: Pair) -> dict[str, Any]:
        """What group_info.json says besides the result."""
        options = {"seed": pair.seed, **self._plan.options}
        return {
            "panoramas": list(pair.panoramas),
            "options": options,
            "version": __version__,
            "server": self._names[address],
            **self._plan.about,
            "command": process_command(pair.panoramas, options),
        }

    def _recorded(self, pair: Pair, record: Record, seconds: float) -> Outcome:
        self._records.made(pair.index, record)
        return Outcome(pair.index, len(record["kept"]), record["bytes"], seconds)

    def _attempted(self, pair: Pair, lease: Lease, error: PanotritonError) -> int:
        attempt = {"replica": lease.address, "time": _now(), "error": str(error)}
        return self._records.attempted(pair.index, attempt)

    def _failed(self, pair: Pair, error: str, trouble: str, attempts: int) -> Outcome:
        failure: dict[str, Any] = {
            "panoramas": list(pair.panoramas),
            "error": error,
            "trouble": trouble,
        }
        if attempts:
            failure["attempts"] = self._records.attempts(pair.index)
        self._records.failed(pair.index, failure)
        return Outcome(pair.index, error=error, trouble=trouble, attempts=attempts)

    @staticmethod
    def _named(words: str, pair: Pair, paths: list[Path]) -> str:
        """A panorama by its URL, where a message has the name of our copy."""
        for path, name in zip(paths, pair.panoramas, strict=True):
            words = words.replace(str(path), name).replace(brief(path), brief(name))
        return words


async def to_the_end(function: Callable[..., T], *arguments: Any) -> T:
    """In a thread, which can't be stopped, and must not write once the run has ended: cancelled, it is
    waited for."""
    working = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise


class _Trouble(Exception):
    """A try that gave no group. says: to the board; counts: as an attempt; ends: the pair is not tried again
    now, for `whose` trouble."""

    def __init__(
        self,
        error: PanotritonError,
        says: str,
        *,
        counts: bool = False,
        ends: bool = False,
        whose: str = SERVER,
    ) -> None:
        super().__init__(error)
        self.error = error
        self.says = says
        self.counts = counts
        self.ends = ends
        self.whose = whose


def _judged(error: BaseException, lease: Lease) -> _Trouble:
    """A replica that stops, drains or is not there says nothing of the group; one that goes meanwhile may."""
    if isinstance(error, InvalidInput):
        return _Trouble(error, UNUSED, ends=True, whose=INPUT)
    if isinstance(error, ServerBusy):
        return _Trouble(error, BUSY)
    if isinstance(error, ConnectError):
        return _Trouble(error, LOST, counts=isinstance(error, ServerUnavailable) and error.lost)
    if isinstance(error, PanotritonError) and not isinstance(error, RequestTimeout):
        return _Trouble(error, UNUSED, counts=True, ends=True)  # InferenceFailed
    late = RequestTimeout(
        f"{lease.address} did not make the group within {lease.deadline_s:.0f} s, three times as long as "
        "99 of 100 groups take"
        if lease.deadline_s and not isinstance(error, RequestTimeout)
        else str(error)
    )
    return _Trouble(late, SLOW, counts=True)


class _Tried:
    """The pauses of a pair between its tries; `pause` raises OutOfPatience where servers stay full."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._waited_s = 0.0
        self._wait_s = _BUSY_WAIT_S

    async def pause(self, trouble: _Trouble) -> None:
        if trouble.says != BUSY:
            return  # the board says when there is a replica
        if self._waited_s >= self._patience_s:
            raise OutOfPatience(f"busy for {self._patience_s:g} s: {trouble.error}")
        await asyncio.sleep(self._wait_s * random.uniform(0.5, 1.5))  # noqa: S311
        self._waited_s += self._wait_s
        self._wait_s = min(2 * self._wait_s, _LONGEST_BUSY_WAIT_S)


class Panoramas:
    """Panoramas as files of this machine, of the content that the run began with. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Scratch | None = None
        self._copies: OrderedDict[str, tuple[Path, int]] = OrderedDict()

    def close(self) -> None:
        if self._folder:
            self._folder.close()

    def path(self, panorama: str, digest: str | None) -> Path:
        """Raises InvalidInput where it cannot be read, or has changed."""
        with self._lock:
            if panorama in self._copies:
                self._copies.move_to_end(panorama)
                return self._copies[panorama][0]
        data = _read_again(panorama) if digest else read_panorama(panorama)
        if hashlib.sha256(data).hexdigest() != digest:
            raise InvalidInput(
                f"{brief(panorama)} has changed since the run began: put it back, or begin another run"
            )
        if not is_url(panorama):
            return Path(panorama)
        with self._lock:
            return self._copied(panorama, data)

    def _copied(self, panorama: str, data: bytes) -> Path:
        if self._folder is None:
            self._folder = Scratch(f"{PREFIX}panoramas-")
        folder = self._folder.path / hashlib.sha256(panorama.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        path = folder / PurePosixPath(panorama).name
        with atomic(path) as part:
            part.write_bytes(data)
        self._copies[panorama] = (path, len(data))
        while len(self._copies) > 64 and sum(n for _, n in self._copies.values()) > _CACHE_BYTES:
            _, (old, _) = self._copies.popitem(last=False)
            old.unlink(missing_ok=True)
        return path


def _read_again(panorama: str) -> bytes:
    """One that could be read as the run began. Raises StoreError where not it, but where it lies, is away."""
    for wait_s in (*_AWAY_WAITS_S, None):
        try:
            return read_panorama(panorama)
        except InvalidInput as error:
            if is_url(panorama) or _is_there(Path(panorama).parent):
                raise
            if wait_s is None:
                raise StoreError(
                    f"{error}, nor anything beside it, which could be read as the run began: see to it that "
                    "the panoramas are there, and run the same command again"
                ) from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _is_there(folder: Path) -> bool:
    """Whether the folder can be read and holds anything: a share that is not mounted leaves an empty one."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _bases(pair: Pair) -> tuple[str, str]:
    first, second = (Path(name) for name in pair.panoramas)
    return base_name(first), base_name(second)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
