"""What a run does while its server is in trouble: it waits, tries again in turn, and gives up in the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from panotriton.client.aio import AsyncClient
from panotriton.errors import (
    ConnectError,
    OutOfPatience,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerUnavailable,
)

__all__ = ["Outages"]

T = TypeVar("T")

_TROUBLE = (ConnectError, RequestTimeout)  # the server's, never a pair's

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_DEATHS = 2
_OUTAGES = 3


class Outages:
    """Times in which no healthy server answers: from the first trouble to the next group that is made.

    patience_s: how long one may pause the run; contact_s: the same before a server has ever answered.
    say: told of each once, when it begins and when it ends.
    """

    def __init__(
        self, client: AsyncClient, patience_s: float, contact_s: float, say: Callable[[str], None]
    ) -> None:
        self._client = client
        self._patience_s = patience_s
        self._contact_s = contact_s
        self._say = say
        self._error: PanotritonError | None = None  # that began the present one
        self._paused_s = 0.0
        self._wait_s = _FIRST_WAIT_S
        self._count = 0
        self._met = False
        self._turn = asyncio.Lock()
        self._deaths: Counter[int] = Counter()
        self._seen: dict[int, set[int]] = {}

    async def attempt(self, work: Callable[[], Awaitable[T]]) -> T | PanotritonError:
        """`work`: at once, or in an outage after a pause and alone, so that one bad pair stands out.

        Returns the server's trouble, where it met any. Raises OutOfPatience, or where no server has ever
        answered what the first call raised.
        """
        if self._error:
            async with self._turn:
                if self._error:
                    await self._pause(self._error)
                    return await self._tried(work)
        return await self._tried(work)

    async def _tried(self, work: Callable[[], Awaitable[T]]) -> T | PanotritonError:
        try:
            done = await self._admitted(work)
        except OutOfPatience:
            raise
        except _TROUBLE as trouble:
            return trouble
        self._met = True
        if self._error:
            self._say(f"goes on, after a pause of {self._paused_s:.0f} s")
            self._error, self._paused_s, self._wait_s = None, 0.0, _FIRST_WAIT_S
        return done

    async def _admitted(self, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, again and again while the server has no room for it, which is no trouble."""
        waited_s, wait_s = 0.0, _FIRST_WAIT_S
        while True:
            try:
                return await work()
            except ServerBusy as error:
                if waited_s >= self._patience_s:
                    raise OutOfPatience(f"busy for {self._patience_s:g} s: {error}") from error
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311
            waited_s += wait_s
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def blamed(self, index: int, error: PanotritonError) -> str:
        """Why pair `index` is not tried again in this run; empty where it is.

        It is left where the server died twice under it, and where it found three outages, between which
        others were made.
        """
        if not self._error:
            self._begin(error)
        self._deaths[index] += isinstance(error, ServerUnavailable) and error.lost
        self._seen.setdefault(index, set()).add(self._count)
        if self._deaths[index] >= _DEATHS:
            return f"the server died {_DEATHS} times under it: {error}"
        return f"{_OUTAGES} tries failed: {error}" if len(self._seen[index]) >= _OUTAGES else ""

    def _begin(self, error: PanotritonError) -> None:
        self._error = error
        self._count += 1
        self._say(f"paused, for {self._allowed_s:g} s at most: {error}")

    @property
    def _allowed_s(self) -> float:
        return self._patience_s if self._met else self._contact_s

    async def _pause(self, error: PanotritonError) -> None:
        """Wait longer each time, until a server says that it is ready."""
        while True:
            left_s = self._allowed_s - self._paused_s
            if left_s <= 0:
                raise self._over(error)
            began = time.monotonic()
            await asyncio.sleep(min(left_s, self._wait_s * random.uniform(0.5, 1.5)))  # noqa: S311
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
            ready = await self._client.ready()
            self._paused_s += time.monotonic() - began
            if ready:
                return

    def _over(self, error: PanotritonError) -> PanotritonError:
        if not self._met:
            return error
        return OutOfPatience(
            f"paused for {self._patience_s:g} s, and no server made a group; at first: {error}"
        )
