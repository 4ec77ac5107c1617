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
import os
import pickle
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.dataset import Rows
from panotriton.groups.maker import Outcome
from panotriton.groups.plan import Plan
from panotriton.groups.pool import Directory, Worker, asked, causes, import_ray
from panotriton.groups.replicas import Servers

__all__ = ["ClusterEngine"]

_MOST_ROWS = 50_000  # of one execution of Ray Data
_MARGIN = 1.1  # by how much more pairs are begun than a target seems to need
_OBJECT_STORE_BYTES = 256 << 20  # of a cluster of our own: rows are numbers


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
        self._ray = import_ray()
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
        )(Directory)
        self._directory = actor.remote(self.servers, arguments)
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()

    async def weights(self, wanted: Mapping[str, str] | None) -> dict[str, str]:
        with causes():
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
            while (found := await asyncio.to_thread(lambda: next(outcomes, None))) is not None:
                if fatal := found.pop("fatal"):
                    raise pickle.loads(fatal)  # noqa: S301 of our own workers
                if take(Outcome(**found)):
                    # Workers are at what is not needed.
                    await asked(self._directory.end.remote)
                    return
        except self._ray.exceptions.RayError as error:
            raise ClusterFailed(f"the Ray cluster failed: {error}") from error
        finally:
            listening.cancel()
            with contextlib.suppress(ValueError):  # interrupted, while a thread waits for the next
                await asyncio.to_thread(outcomes.close)

    def _outcomes(
        self, plan: Plan, todo: list[tuple[int, int]]
    ) -> Generator[dict[str, Any], None, None]:
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
                Worker,
                fn_constructor_args=(
                    *(plan, self.servers, self._directory, self.patience_s),
                    os.getcwd(),  # noqa: PTH109 as a word
                ),
                compute=pool,
                num_cpus=cpus,
            )
        )
        # Not iter_rows, whose threads outlive it: they would ask a Ray that has ended, which ends the
        # process. Closed, this ends what computes for it, and its thread.
        for bundle in dataset.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                block = data.block.BlockAccessor.for_block(self._ray.get(entry.ref))
                yield from block.iter_rows(public_row_format=True)

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
