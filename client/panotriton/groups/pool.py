"""What runs in a cluster: the workers of the pool, and the directory that they and the driver ask.

Actors of Ray's, each in a process of its own. A run has ended when its workers write nothing any more: the
directory tells them, and waits until each has let go of what it was at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import asdict
from typing import Any, TypeVar

from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.maker import Maker, Outcome
from panotriton.groups.plan import Plan
from panotriton.groups.replicas import Lease, Replicas, Servers

__all__ = ["Directory", "Worker", "asked", "causes", "import_ray"]

_BEAT_S = 10.0
_RETRY_S = 1.0
_GONE_S = 2.5 * _BEAT_S  # of a worker that is not heard any more
_POLL_S = 0.05

T = TypeVar("T")


class Directory:
    """`Replicas` as an actor. A new one, after its node has died, learns again which servers there are."""

    def __init__(self, servers: Servers, arguments: dict[str, Any]) -> None:
        self._said: list[str] = []
        self._replicas = Replicas(servers, say=self._said.append, **arguments)
        self._watch: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._at_work: dict[str, str] = {}  # actor → the worker that it is now

    def _watched(self) -> Replicas:
        if self._watch is None:
            self._watch = asyncio.create_task(self._replicas.watch())
        return self._replicas

    async def weights(self, wanted: Mapping[str, str] | None) -> dict[str, str]:
        return await self._watched().weights(wanted)

    async def room(self) -> int:
        return self._watched().room

    async def said(self) -> list[str]:
        said, self._said[:] = list(self._said), []
        return said

    async def beat(self, worker: str) -> None:
        self._watched().beat(worker)

    async def join(self, actor: str, worker: str) -> bool:
        """A worker begins, in place of the one that died where the actor was started again; whether the run
        is over."""
        await self.beat(worker)
        self._at_work[actor] = worker
        return self._over.is_set()

    async def until_over(self, actor: str, worker: str) -> None:
        await self.join(actor, worker)  # this may be another directory than the one that it joined
        await self._over.wait()

    async def leave(self, actor: str) -> None:
        """It writes nothing any more."""
        self._at_work.pop(actor, None)

    async def end(self) -> None:
        """The run is over: return once every worker has left, or is gone."""
        self._over.set()
        while any(self._replicas.hears(worker, _GONE_S) for worker in self._at_work.values()):
            await asyncio.sleep(_POLL_S)

    async def acquire(self, worker: str, weights: Mapping[str, str], ticket: int | None) -> Lease:
        replicas = self._watched()
        replicas.agree(weights)
        return await replicas.acquire(ticket, worker)

    async def release(
        self,
        worker: str,
        lease: Lease,
        outcome: str,
        seconds: float,
        error: PanotritonError | None,
    ) -> None:
        await self._watched().release(lease, outcome, seconds, error, worker)


class Worker:
    """An actor of the pool. Its calls run in threads, their work in one event loop.

    folder: the run's, which relative paths are from; an actor begins in the folder of its cluster.
    """

    def __init__(
        self, plan: Plan, servers: Servers, directory: Any, patience_s: float, folder: str
    ) -> None:
        with contextlib.suppress(OSError):  # relative paths do not reach a machine without it
            os.chdir(folder)
        actor = import_ray().get_runtime_context().get_actor_id()
        self._board = _Board(directory, plan.weights, actor)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._maker = Maker(plan, servers, self._board, patience_s)
        self._making: set[asyncio.Task[Outcome]] = set()
        self._over = bool(self._run(self._board.join()).result())
        self._run(self._board.beats())
        self._run(self._until_over())

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["index"])
        try:
            outcome = self._run(self._make(index, int(row["attempts"]))).result()
        except PanotritonError as error:  # the run's, not the pair's
            error.__cause__ = error.__context__ = None  # gRPC's errors do not travel
            return {**asdict(Outcome(index)), "fatal": pickle.dumps(error)}
        except CancelledError:
            # The run is over, and Ray Data is being ended: an answer would wake it up, so none comes.
            threading.Event().wait()
            raise
        return {**asdict(outcome), "fatal": b""}

    async def _make(self, index: int, attempts: int) -> Outcome:
        if self._over:
            raise asyncio.CancelledError
        making = asyncio.create_task(self._maker.make(index, attempts))
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        return await making

    async def _until_over(self) -> None:
        await self._board.until_over()
        self._over = True
        left = list(self._making)
        for making in left:
            making.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        try:
            await self._maker.close()  # now, since Ray will kill this process
        finally:
            await self._board.leave()


class _Board:
    """A worker's way to the directory, which may be away for a moment, and then another."""

    def __init__(self, directory: Any, weights: Mapping[str, str], actor: str) -> None:
        self._directory = directory
        self._actor = actor
        self._weights = dict(weights)
        self._worker = uuid.uuid4().hex

    async def beats(self) -> None:
        while True:
            await asked(lambda: self._directory.beat.remote(self._worker))
            await asyncio.sleep(_BEAT_S)

    async def join(self) -> bool:
        return bool(await asked(lambda: self._directory.join.remote(self._actor, self._worker)))

    async def until_over(self) -> None:
        await asked(lambda: self._directory.until_over.remote(self._actor, self._worker))

    async def leave(self) -> None:
        await asked(lambda: self._directory.leave.remote(self._actor))

    async def acquire(self, ticket: int | None = None) -> Lease:
        lease: Lease = await asked(
            lambda: self._directory.acquire.remote(self._worker, self._weights, ticket)
        )
        return lease

    async def release(
        self,
        lease: Lease,
        outcome: str,
        seconds: float = 0.0,
        error: PanotritonError | None = None,
    ) -> None:
        plain = type(error)(*error.args) if error else None  # without its cause
        await asked(
            lambda: self._directory.release.remote(self._worker, lease, outcome, seconds, plain)
        )


async def asked(ask: Callable[[], Awaitable[Any]]) -> Any:
    """An answer of the directory, from the next one where it dies meanwhile."""
    exceptions = import_ray().exceptions
    while True:
        try:
            with causes():
                return await ask()
        except (exceptions.ActorUnavailableError, exceptions.ActorDiedError):
            await asyncio.sleep(_RETRY_S)


@contextlib.contextmanager
def causes() -> Any:
    """What an actor raised, as it raised it."""
    try:
        yield
    except import_ray().exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, PanotritonError) else error) from None


def import_ray() -> Any:
    # Ray Data's threads would start a cluster of their own once ours has ended.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        import ray  # noqa: PLC0415 an extra's
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            "the engine ray needs Ray: pip install 'panotriton[cluster]', or --engine local"
        ) from error
    return ray
