"""The threads that do a gateway's work, each with a connection of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from panotriton.errors import ServerBusy
from panotriton.web.gateway.connections import Connection

__all__ = ["Workers"]

T = TypeVar("T")

_READY_TIMEOUT_S = 0.9


class Workers:
    """Runs work on `threads` threads; up to `max_waiting` more requests wait for one.

    A client serves one thread at a time, and images are large: the number of threads bounds
    both the connections and the memory.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        watch: Callable[[], Connection],
        threads: int,
        max_waiting: int,
    ) -> None:
        self._connect = connect
        self._watch = watch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gateway")
        # Health must answer while all the others are at work.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="gateway-health")
        self._question: Future[bool] | None = None
        self._places = threading.BoundedSemaphore(threads + max_waiting)
        self._limit = threads + max_waiting
        self._own = threading.local()
        self._clients: list[Connection] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        # What still runs was given its grace; without a connection it ends.
        for client in self._clients:
            client.close()
        for pool in (self._pool, self._watcher):
            pool.shutdown(cancel_futures=True)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, given a client. Raises ServerBusy at once where all places are taken."""
        if not self._places.acquire(blocking=False):
            raise ServerBusy(
                f"the gateway already has {self._limit} requests; try again later, or start it with "
                "more --threads"
            )
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: work(self._client(self._connect)))
        except asyncio.CancelledError:  # only the end of the gateway cancels; its caller is told
            raise ServerBusy("the gateway is stopping; try again when it is back") from None
        finally:
            self._places.release()

    async def ready(self) -> bool:
        """Whether the server answers, soon, and all its models are ready."""
        if (
            self._question is None or self._question.done()
        ):  # one at a time: a frozen server piles none up
            self._question = self._watcher.submit(lambda: self._client(self._watch).ready())
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._question), _READY_TIMEOUT_S)
        except asyncio.TimeoutError:
            return False

    def _client(self, connect: Callable[[], Connection]) -> Connection:
        client: Connection | None = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = connect()
            self._clients.append(client)
        return client
