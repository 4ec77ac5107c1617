"""System shared memory as a pool: image tensors are written once, in place, and only names are sent.

```python
with Client() as client, client.shared_memory(512 << 20) as memory:
    sharp = client.upscale(image, via=memory)
```
A slot is one file in /dev/shm, named `panotriton_<pid>_<uuid>` and locked by its owner, so that
`panotriton doctor` can tell what a killed process left. It is allocated in full (a full /dev/shm
is an error here and not a bus error later, in the server), registered once and used again.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import fcntl
import mmap
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from panotriton.client.calls import Call
from panotriton.client.pixels import Images
from panotriton.client.transports.base import Pending
from panotriton.client.twins import resolved, run
from panotriton.errors import PanotritonError, SharedMemoryError
from panotriton.pipeline.regions import FOLDER, PREFIX

__all__ = [
    "AsyncSharedMemory",
    "Layout",
    "Pool",
    "SharedMemory",
    "Slot",
    "SystemSlot",
    "layout",
    "on_gpu",
]

_ALIGNMENT = 64
_MIB = 1 << 20
_POLL_S = 0.002
_RECLAIM_EVERY_S = 0.5
_LATE_S = 5.0  # for requests that were given up: what is still out then stays registered


@dataclass(frozen=True)
class Span:
    """A tensor's place in a slot, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Where a call's image tensors lie in its slot, side by side; `nbytes` is their sum."""

    inputs: Mapping[str, Span]
    outputs: Mapping[str, Span]
    nbytes: int


def layout(call: Call[Any]) -> Layout:
    """Places for every image input and every output whose size is bounded; empty tensors have none."""
    end = 0

    def place(nbytes: int) -> Span:
        nonlocal end
        span = Span(end, nbytes)
        end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return span

    sizes = {name: value.nbytes for name, value in call.inputs.items() if isinstance(value, Images)}
    inputs = {name: place(nbytes) for name, nbytes in sizes.items() if nbytes}
    outputs = {name: place(nbytes) for name, nbytes in call.outputs.items() if nbytes}
    return Layout(inputs, outputs, end)


class Slot(Protocol):
    """A registered region. `read` returns a view; `nbytes` is what it takes of the pool's cap."""

    kind: str
    name: str
    nbytes: int

    def open(self) -> None: ...
    def close(self) -> None: ...
    def registration(self) -> tuple[Any, ...]: ...
    def write(self, offset: int, images: Images) -> None: ...
    def read(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def copied(self, view: Any) -> Any: ...


class SystemSlot:
    """A file in /dev/shm, mapped until the last view of it is gone."""

    kind = "system"

    def __init__(self, nbytes: int) -> None:
        self.name = f"{PREFIX}{os.getpid()}_{uuid.uuid4().hex}"
        self.nbytes = nbytes
        self._lock_fd = -1
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(0, np.uint8)

    def open(self) -> None:
        """Make, lock, allocate and map the file; raises SharedMemoryError with the reason."""
        path = FOLDER / self.name
        try:
            fd = self._lock_fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)  # held while we live: see pipeline/regions.py
            os.posix_fallocate(fd, 0, self.nbytes)
            self._bytes = np.frombuffer(mmap.mmap(fd, self.nbytes), np.uint8)
        except OSError as error:
            self.close()
            raise SharedMemoryError(
                f"cannot allocate {self.nbytes / _MIB:.0f} MiB in {FOLDER}: {error.strerror}; free some "
                "(`panotriton doctor`), make it larger (docker run --shm-size), or ask for less"
            ) from error

    def close(self) -> None:
        """Remove the file; views stay valid until they are collected."""
        (FOLDER / self.name).unlink(missing_ok=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._bytes = np.empty(0, np.uint8)

    def registration(self) -> tuple[Any, ...]:
        """The arguments of tritonclient's register function."""
        return self.name, f"/{self.name}", self.nbytes

    def write(self, offset: int, images: Images) -> None:
        """Copy each part to its place: the one copy on this side."""
        target = self.read(offset, images.shape, np.uint8)
        for row, part in zip((target,) if images.alone else target, images.parts, strict=True):
            np.copyto(row, part if isinstance(part, np.ndarray) else part.cpu().numpy())

    def read(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """A view, valid until the slot is used again."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._bytes[offset : offset + nbytes].view(dtype).reshape(shape)

    def copied(self, view: Any) -> Any:
        """The view's content in memory of its own."""
        return np.array(view)


class _Loan:
    """The base of every array made of it, and so alive while any of them is."""

    def __init__(self, view: np.ndarray[Any, Any]) -> None:
        self._view = view
        self.__array_interface__ = view.__array_interface__

    @classmethod
    def of(cls, view: np.ndarray[Any, Any], back: Callable[[], None]) -> np.ndarray[Any, Any]:
        """The same pixels; `back` is called when nothing refers to them any more."""
        loan = cls(view)
        weakref.finalize(loan, back).atexit = False
        return np.asarray(loan)


@dataclass
class _Grant:
    slot: Slot
    is_new: bool
    evicted: list[Slot]


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """Slots up to `max_bytes`: which are idle, in a call, or kept back. Thread-safe.

    A slot whose request was given up is kept back until the server has answered all the same, and then
    used again. Where the request was cancelled, nobody says when: the server may still be writing to it.
    Once its room is wanted, and on close, the server is asked, from release 2.50 on, which refuses to let go
    of what it uses. What is left its supervision lets go of, or `panotriton doctor --fix` when its process is
    gone.

    register, unregister: of a slot, at the server. let_go: whether it has ended what used a slot.
    """

    def __init__(
        self,
        make_slot: Callable[[int], Slot],
        max_bytes: int,
        views: bool,
        wait_s: float,
        register: Callable[[Slot], Any],
        unregister: Callable[[Slot], Any],
        let_go: Callable[[Slot], Any],
    ) -> None:
        if max_bytes < _MIB:
            raise SharedMemoryError(f"max_bytes is {max_bytes}; expected at least {_MIB}, 1 MiB")
        self.max_bytes = max_bytes
        self.views = views
        self._make_slot = make_slot
        self._wait_s = wait_s
        self._register = register
        self._unregister = unregister
        self._let_go = let_go
        self._reclaims_s = 0.0
        self._pid = os.getpid()  # a forked child must not remove its parent's regions
        self._changed = threading.Condition()
        self._idle: list[Slot] = []
        self._busy: set[Slot] = set()
        self._lost: set[Slot] = set()
        self._late: set[Slot] = set()  # of the lost, those that are expected back
        self._lent: set[Slot] = set()
        self._returned: collections.deque[Slot] = collections.deque()
        self._closed = False
        _POOLS.add(self)

    @property
    def on_gpu(self) -> bool:
        """Whether CUDA tensors can be sent, and results come, without leaving the GPU."""
        return self._make_slot is not SystemSlot

    @property
    def allocated_bytes(self) -> int:
        """What all slots take together."""
        return sum(slot.nbytes for slot in self._slots())

    def close(self) -> Any:  # awaited in an AsyncClient's pool
        """Wait for calls in flight, then unregister, unmap and remove this pool's regions alone."""
        raise NotImplementedError

    async def _close(self) -> None:
        if self._pid != os.getpid():
            return
        began = time.monotonic()
        while self._in_flight(time.monotonic() - began):
            await resolved(self._pause())
        self._reclaims_s = 0.0
        await self._reclaim()
        for slot in self._shut():
            await self._remove(slot)

    def _in_flight(self, waited_s: float) -> bool:
        """Whether there is something left to wait for, after so long."""
        with self._changed:
            self._collect()
            given_up = self._late and waited_s < min(self._wait_s, _LATE_S)
            return bool(given_up or (self._busy and waited_s < self._wait_s))

    def _pause(self) -> Any:
        """A moment, in which another call may end."""
        raise NotImplementedError

    def _slots(self) -> list[Slot]:
        return [*self._idle, *self._busy, *self._lost, *self._lent]

    async def _take(self, nbytes: int) -> Slot:
        """A registered slot for `nbytes`, waited for where the pool is full."""
        deadline = time.monotonic() + self._wait_s
        while (grant := self._try(nbytes)) is None:
            if time.monotonic() > deadline:
                raise self._full()
            await self._reclaim()
            await resolved(self._pause())
        try:
            for slot in grant.evicted:
                await self._remove(slot)
            if grant.is_new:
                grant.slot.open()
                await resolved(self._register(grant.slot))
        except BaseException:  # cancelled, too: what has left the pool is nobody's any more
            for slot in (*grant.evicted, grant.slot):
                self._forget(slot)
            raise
        return grant.slot

    async def _reclaim(self) -> None:
        """Take back the room of requests that nobody waits for, once the server has ended them."""
        if time.monotonic() < self._reclaims_s:
            return
        self._reclaims_s = time.monotonic() + _RECLAIM_EVERY_S
        for slot in list(self._lost):
            if await resolved(self._let_go(slot)):
                with self._changed:
                    self._lost.discard(slot)
                    self._late.discard(slot)
                slot.close()

    async def _remove(self, slot: Slot) -> None:
        with contextlib.suppress(PanotritonError):  # a server that is gone holds no region
            await resolved(self._unregister(slot))
        slot.close()

    def _try(self, nbytes: int) -> _Grant | None:
        with self._changed:
            return self._grant(nbytes)

    def _grant(self, nbytes: int) -> _Grant | None:
        """A slot for `nbytes`, marked busy; None: wait. The caller holds the lock."""
        self._collect()
        if self._closed or self._pid != os.getpid():
            raise SharedMemoryError("this pool is closed, or belongs to the process that forked us")
        size = self._size(nbytes)
        fitting = [slot for slot in self._idle if slot.nbytes >= size]
        if fitting:
            slot = min(fitting, key=lambda slot: slot.nbytes)
            self._idle.remove(slot)
            self._busy.add(slot)
            return _Grant(slot, False, [])
        missing = self.allocated_bytes + size - self.max_bytes
        if missing > sum(slot.nbytes for slot in self._idle):
            return None
        evicted = list(self._evict(missing))
        slot = self._make_slot(size)
        self._busy.add(slot)
        return _Grant(slot, True, evicted)

    def _size(self, nbytes: int) -> int:
        """Rounded up so that nearby sizes share slots: powers of two to 64 MiB, then multiples of it."""
        if nbytes > self.max_bytes:
            raise SharedMemoryError(
                f"the request's images need {nbytes} bytes, the pool's max_bytes is {self.max_bytes}: "
                "make the pool larger, or send fewer or smaller images at once"
            )
        mib = max(1, -(-nbytes // _MIB))
        mib = 1 << (mib - 1).bit_length() if mib <= 64 else -(-mib // 64) * 64
        return min(mib * _MIB, self.max_bytes)

    def _evict(self, missing: int) -> Iterator[Slot]:
        while missing > 0:
            slot = self._idle.pop(0)
            missing -= slot.nbytes
            yield slot

    def _collect(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            if slot in self._lent or slot in self._lost:
                self._lent.discard(slot)
                self._lost.discard(slot)
                self._late.discard(slot)
                self._idle.append(slot)

    def _full(self) -> SharedMemoryError:
        return SharedMemoryError(
            f"all {self.max_bytes} bytes of the pool (max_bytes) were in use for {self._wait_s:g} s: make "
            "it larger, send less at once, or let go of results that are views"
        )

    def _forget(self, slot: Slot) -> None:
        """A slot that never came to be, or was evicted."""
        with self._changed:
            self._busy.discard(slot)
            self._changed.notify_all()
        slot.close()

    def _forget_unknown(self, slot: Slot) -> None:
        """A slot that was registered at a server that is gone, as were all that are idle or kept back."""
        with self._changed:
            self._collect()
            gone = [slot, *self._idle, *self._lost]
            self._idle, self._lost, self._late = [], set(), set()
        for each in gone:
            self._forget(each)

    def _done(self, slot: Slot, *, reusable: bool) -> None:
        with self._changed:
            self._busy.discard(slot)
            if reusable:
                self._idle.append(slot)
            else:
                self._lost.add(slot)
            self._changed.notify_all()
        if not reusable:
            slot.close()  # the name goes at once, the pages when the server lets go of them

    def _leave(self, slot: Slot, request: Pending) -> None:
        """A slot whose request nobody waits for: it comes back when the server has answered."""
        with self._changed:
            self._busy.discard(slot)
            self._lost.add(slot)
            self._late.add(slot)
        request.abandon(lambda: self._take_back(slot))

    def _results(
        self, slot: Slot, tensors: dict[str, Any], outputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs that lie in the slot, copied out, or lent where the pool gives views."""
        placed = [name for name in tensors if name in outputs]
        if not self.views or not placed:
            copies = {name: slot.copied(tensors[name]) for name in placed}
            self._done(slot, reusable=True)
            return tensors | copies
        with self._changed:
            self._busy.discard(slot)
            self._lent.add(slot)
        out = [len(placed)]

        def back() -> None:
            out[0] -= 1
            if out[0] == 0:
                self._take_back(slot)

        return tensors | {name: _Loan.of(tensors[name], back) for name in placed}

    def _take_back(self, slot: Slot) -> None:
        # Runs when an array is collected, at any point of any thread: it may not change what another
        # frame of this thread is looking at.
        self._returned.append(slot)
        with self._changed:
            self._changed.notify_all()

    def _shut(self) -> list[Slot]:
        """Stop lending; the slots to unregister. Those still in a call are treated as lost."""
        with self._changed:
            self._closed = True
            _POOLS.discard(self)
            self._collect()
            owned, late = [*self._idle, *self._lent], list(self._busy)
            self._idle, self._lent, self._busy = [], set(), set()
            self._lost.update(late)
        for slot in self._lost:
            slot.close()
        return owned

    def _abandon(self) -> None:
        """At exit: remove the files without asking anybody."""
        if self._pid == os.getpid():
            for slot in self._shut():
                slot.close()


class SharedMemory(Pool):
    """A pool of a `Client`; leave its `with` block, or close it, before the client."""

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        run(self._close())

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait(_POLL_S * 10)

    def _abandon(self) -> None:
        if self._pid == os.getpid():
            self._wait_s = 0.0
            self.close()


class AsyncSharedMemory(Pool):
    """A pool of an `AsyncClient`; leave its `async with` block, or close it, before the client."""

    async def __aenter__(self) -> AsyncSharedMemory:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._close()

    async def _pause(self) -> None:
        await asyncio.sleep(_POLL_S)


def on_gpu(pool: Pool | None) -> bool:
    """Whether a call through it keeps CUDA tensors where they are."""
    return pool is not None and pool.on_gpu


@atexit.register
def _abandon_pools() -> None:
    for pool in list(_POOLS):
        pool._abandon()
