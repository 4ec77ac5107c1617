"""The engine of one process: as many pairs in flight as the servers have room for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from panotriton.groups.dataset import Rows
from panotriton.groups.maker import Maker, Outcome
from panotriton.groups.plan import Plan
from panotriton.groups.replicas import Replicas, Servers

__all__ = ["LocalEngine"]


class LocalEngine:
    """Makes groups in this process. replicas: being watched."""

    def __init__(self, servers: Servers, replicas: Replicas, patience_s: float = 600.0) -> None:
        self._servers = servers
        self._replicas = replicas
        self._patience_s = patience_s

    async def weights(self, wanted: Mapping[str, str] | None) -> dict[str, str]:
        return await self._replicas.weights(wanted)

    def ahead(self, rate: float, missing: int) -> int:
        return 4 * max(1, self._replicas.room)

    async def run(self, plan: Plan, rows: Rows, take: Callable[[Outcome], bool]) -> None:
        maker = Maker(plan, self._servers, self._replicas, self._patience_s)
        tasks: set[asyncio.Task[Outcome]] = set()
        try:
            while True:
                while len(tasks) < max(1, self._replicas.room) and (row := rows()):
                    tasks.add(asyncio.create_task(maker.make(*row)))
                if not tasks:
                    return
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                failures = [error for task in done if (error := task.exception())]
                # All that were made, whatever one says and others met.
                enough = [take(task.result()) for task in done if not task.exception()]
                if failures:
                    raise failures[0]
                if any(enough):
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await maker.close()
