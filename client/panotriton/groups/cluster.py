"""The engine of a cluster: Ray Data hands pairs to a pool of actors, which ask the servers.

Distribution, restarts of what died, back-pressure and the pool are Ray's. Which server a group goes to is
decided in one place, an actor that holds `Replicas`: so each has as many as it should, whoever sends them.
Ray's own row checkpoints are not used: a group's record is written with the group, which says more than that
a row went through.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.dataset import Rows
from panotriton.groups.maker import Maker, Outcome
from panotriton.groups.plan import Plan
from panotriton.groups.replicas import Lease, Replicas, Servers

__all__ = ["ClusterEngine"]

_MOST_ROWS = 50_000  # of one execution of Ray Data
_MARGIN = 1.1  # by how much more pairs are begun than a target seems to need
_BEAT_S = 10.0
_OBJECT_STORE_BYTES = 256 << 20  # of a cluster of our own: rows are numbers
_RETRY_S = 1.0
_GONE_S = 2.5 * _BEAT_S  # of a worker that is not heard any more
_POLL_S = 0.05

T = TypeVar("T")


@dataclass
class ClusterEngine:
    """A context manager around a Ray cluster: one that runs, or one of this machine's processors.

    address: as `ray.init` takes it, "auto" for the one this machine belongs to; None: one of our own.
    replicas: keyword arguments of `Replicas`, but `say`. workers: actors; None: one for each processor but
    one. worker_cpus: what each asks of the cluster. in_flight: groups that one holds at most, each up to
    half a gigabyte. Raises InvalidInput where Ray is not installed.
    """

    servers: Servers
    address: str | None = None
    workers: int | None = None
    worker_cpus: float = 1.0
    in_flight: int = 16
    patience_s: float = 600.0
    replicas: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    def __enter__(self) -> ClusterEngine:
        self._ray = _ray()
        if not sys.stderr.isatty():  # where people watch, Ray shows how its pool fares
            logging.getLogger("ray.data").setLevel(logging.WARNING)
        options: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": False}
        if self.address is None:
            options |= {
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        try:
            self._ray.init(self.address or "local", **options)  # whatever RAY_ADDRESS says
        except ConnectionError as error:
            raise InvalidInput(f"no Ray cluster at {self.address}: {error}") from error
        arguments = {"patience_s": self.patience_s, **self.replicas}
        actor = self._ray.remote(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000
        )(_Directory)
        self._directory = actor.remote(self.servers, arguments)
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()

    async def weights(self, wanted: Mapping[str, str] | None) -> dict[str, str]:
        with _causes():
            found: dict[str, str] = await self._directory.weights.remote(wanted)
        return found

    def ahead(self, rate: float, missing: int) -> int:
        """A round ends when its last group is made: few rounds, hardly more pairs than are needed."""
        return max(4 * self._room(), math.ceil(_MARGIN * missing / rate) if rate else 0)

    def _room(self) -> int:
        return max(1, int(self._ray.get(self._directory.room.remote())))

    async def run(self, plan: Plan, rows: Rows, take: Callable[[Outcome], bool]) -> None:
        todo: list[tuple[int, int]] = []
        while len(todo) < _MOST_ROWS and (row := rows()):
            todo.append(row)
        if not todo:
            return
        listening = asyncio.create_task(self._listen())
        outcomes = self._outcomes(plan, todo)
        try:
            while (row := await asyncio.to_thread(next, outcomes, None)) is not None:
                if fatal := row.pop("fatal"):
                    raise pickle.loads(fatal)  # noqa: S301 of our own workers
                if take(Outcome(**row)):
                    await _asked(
                        self._directory.end.remote
                    )  # others are at work on what is not needed
                    return
        except self._ray.exceptions.RayError as error:
            raise ClusterFailed(f"the Ray cluster failed: {error}") from error
        finally:
            listening.cancel()

    def _outcomes(self, plan: Plan, todo: list[tuple[int, int]]) -> Any:
        """Ray Data's rows of results, as they come."""
        import pyarrow  # noqa: PLC0415 Ray's own

        data = self._ray.data
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = False
        workers, cpus = self._pool()
        at_once = min(self.in_flight, max(2, math.ceil(1.5 * self._room() / workers)))
        pool = data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        )
        index, attempts = zip(*todo, strict=True)
        table = pyarrow.table({"index": index, "attempts": attempts})
        dataset = (
            data.from_arrow(table)
            .repartition(
                target_num_rows_per_block=1
            )  # so that every worker takes the next when it can
            .map(
                _Worker,
                fn_constructor_args=(plan, self.servers, self._directory, self.patience_s),
                compute=pool,
                num_cpus=cpus,
            )
        )
        return iter(dataset.iter_rows())

    def _pool(self) -> tuple[int, float]:
        """How many workers, and what each asks for; a processor is left to Ray's own tasks."""
        there = float(self._ray.cluster_resources().get("CPU", 1))
        cpus = min(self.worker_cpus, max(0.25, (there - 1) / 2))
        return self.workers or max(1, int((there - 1) / cpus)), cpus

    async def _listen(self) -> None:
        """Say what the directory says."""
        while True:
            for line in await self._directory.said.remote():
                self.say(line)
            await asyncio.sleep(1)


class ClusterFailed(PanotritonError):
    """Ray gave the run up."""


class _Directory:
    """`Replicas` as an actor. A new one, after its node has died, learns again which servers there are."""

    def __init__(self, servers: Servers, arguments: dict[str, Any]) -> None:
        self._said: list[str] = []
        self._replicas = Replicas(servers, say=self._said.append, **arguments)
        self._watch: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._at_work: dict[str, float] = {}  # by actor, when it was last heard

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

    async def beat(self, worker: str, actor: str) -> None:
        self._watched().beat(worker)
        if actor in self._at_work:
            self._at_work[actor] = time.monotonic()

    async def join(self, actor: str) -> bool:
        """A worker begins, in place of the one that died where the actor was started again; whether the run
        is over."""
        self._at_work[actor] = time.monotonic()
        return self._over.is_set()

    async def until_over(self, actor: str) -> None:
        self._at_work[actor] = (
            time.monotonic()
        )  # this may be another directory than the one it joined
        await self._over.wait()

    async def leave(self, actor: str) -> None:
        """It writes nothing any more."""
        self._at_work.pop(actor, None)

    async def end(self) -> None:
        """The run is over: return once every worker has left, or is gone."""
        self._over.set()
        while any(time.monotonic() - heard < _GONE_S for heard in self._at_work.values()):
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


class _Worker:
    """An actor of the pool. Its calls run in threads, their work in one event loop."""

    def __init__(self, plan: Plan, servers: Servers, directory: Any, patience_s: float) -> None:
        actor = _ray().get_runtime_context().get_actor_id()
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
        except CancelledError:  # the run is over: an answer would wake up Ray Data, which is being ended
            threading.Event().wait()
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
            await _asked(lambda: self._directory.beat.remote(self._worker, self._actor))
            await asyncio.sleep(_BEAT_S)

    async def join(self) -> bool:
        return bool(await _asked(lambda: self._directory.join.remote(self._actor)))

    async def until_over(self) -> None:
        await _asked(lambda: self._directory.until_over.remote(self._actor))

    async def leave(self) -> None:
        await _asked(lambda: self._directory.leave.remote(self._actor))

    async def acquire(self, ticket: int | None = None) -> Lease:
        lease: Lease = await _asked(
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
        await _asked(
            lambda: self._directory.release.remote(self._worker, lease, outcome, seconds, plain)
        )


async def _asked(ask: Callable[[], Awaitable[Any]]) -> Any:
    """An answer of the directory, from the next one where it dies meanwhile."""
    exceptions = _ray().exceptions
    while True:
        try:
            with _causes():
                return await ask()
        except (exceptions.ActorUnavailableError, exceptions.ActorDiedError):
            await asyncio.sleep(_RETRY_S)


@contextlib.contextmanager
def _causes() -> Any:
    """What an actor raised, as it raised it."""
    try:
        yield
    except _ray().exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, PanotritonError) else error) from None


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415 an extra's
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            "the engine ray needs Ray: pip install 'panotriton[cluster]', or --engine local"
        ) from error
    return ray
