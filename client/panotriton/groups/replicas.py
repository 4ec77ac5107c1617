"""The servers of a run: found by name, watched, given groups, and waited for while none of them answers."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from panotriton.client.aio import AsyncClient
from panotriton.errors import (
    ConnectError,
    InvalidInput,
    OutOfPatience,
    PanotritonError,
    quoted,
)
from panotriton.groups.balance import DONE, LOST, UNUSED, Balance

__all__ = ["Lease", "Replicas", "Servers", "addresses", "other_weights"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_REFRESH_S = 10.0
_SILENT_S = 30.0  # of a worker that holds groups
_UNSAID_S = 2.0  # of a pause that no error began: "not ready" says nothing more
_NOT_READY = "no server is ready: they drain, are being started, or are gone"
_DNS = "dns:///"


@dataclass(frozen=True)
class Servers:
    """Which servers, and how they are asked. urls: HOST:PORT each, or dns:///HOST:PORT for every address
    behind a name, as a headless service has one for each ready pod. more: of `AsyncClient`."""

    urls: Sequence[str]
    protocol: str = "grpc"
    more: Mapping[str, Any] | None = None

    def client(self, address: str) -> AsyncClient:
        """One channel, which asks once: what to do about trouble is the run's to say."""
        return AsyncClient(address, protocol=self.protocol, retries=0, **(self.more or {}))


@dataclass(frozen=True)
class Lease:
    """Leave to have one group made. deadline_s: by when, where enough is known to say."""

    address: str
    deadline_s: float | None
    ticket: int | None = None


def addresses(urls: Sequence[str]) -> list[str]:
    """HOST:PORT of each server; names after dns:/// are looked up, and may have none just now."""
    found: list[str] = []
    for url in urls:
        if not url.startswith(_DNS):
            found.append(url)
            continue
        host, _, port = url.removeprefix(_DNS).rpartition(":")
        if not (host and port.isdecimal()):
            raise InvalidInput(f"{quoted(url)}: expected dns:///HOST:PORT")
        with contextlib.suppress(OSError):  # whatever it is, it is asked again
            known = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
            found += [_joined(ip, port) for ip in sorted(known)]
    return list(dict.fromkeys(found))


def other_weights(address: str, served: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Why a server is left out."""
    return (
        f"{address} serves {served or 'weights it does not name'}; the run is made of "
        f"{ours or 'weights that were not named'}"
    )


def _joined(ip: str, port: str) -> str:
    return f"[{ip}]:{port}" if ipaddress.ip_address(ip).version == 6 else f"{ip}:{port}"


class Replicas:
    """Hands out leases while `watch` runs. Used by one event loop; several processes share one through Ray.

    per_replica: groups that each may have at once. patience_s: how long no replica may answer, and none
    make a group; contact_s: the same before any has. say: told when the run pauses, goes on, or leaves a
    replica out. None has a lease before `weights` or `agree` has settled what all must serve.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        per_replica: int = 2,
        patience_s: float = 600.0,
        contact_s: float = 60.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._servers = servers
        self._balance = Balance(per_replica)
        self._patience_s, self._contact_s = patience_s, contact_s
        self._weights: dict[str, str] | None = None
        self._served: dict[str, dict[str, str]] = {}  # by address, what it said last
        self._say = say
        self._clients: dict[str, AsyncClient] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._waits_s: dict[str, float] = {}
        self._foreign: set[str] = set()
        self._held: dict[str, Counter[str]] = {}  # by worker
        self._beats: dict[str, float] = {}
        self._changed = asyncio.Condition()
        self._met = False
        self._error: PanotritonError | None = None  # that began the present outage
        self._paused_s = 0.0
        self._paused_since: float | None = None
        self._outage = False
        self._over: PanotritonError | None = None

    @contextlib.asynccontextmanager
    async def watched(self) -> Any:
        """While a run goes on."""
        task = asyncio.create_task(self.watch())
        try:
            yield self
        finally:
            await self.stop(task)

    async def stop(self, task: asyncio.Task[None]) -> None:
        """End what `watch` does, and the connections."""
        tasks = [task, *self._probes.values()]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def watch(self) -> None:
        """Look addresses up, ask replicas that are down, and count how long none answers."""
        looked_at = -_REFRESH_S
        while True:
            now = time.monotonic()
            if now - looked_at >= _REFRESH_S:
                looked_at = now
                await self._look_up()
                self._reclaim(now)
            self._count_pause(now)
            await self._wake()
            await asyncio.sleep(0.25)

    async def _look_up(self) -> None:
        found = set(await asyncio.to_thread(addresses, self._servers.urls))
        fresh = found - self._balance.replicas.keys()
        self._balance.update(found)
        for address in fresh:
            self._balance.replicas[address].down = True  # until it has said what it serves
            self._probe(address, first=True)

    def _probe(self, address: str, *, first: bool = False) -> None:
        if address not in self._probes:
            self._probes[address] = asyncio.create_task(self._probed(address, first))

    async def _probed(self, address: str, first: bool) -> None:
        try:
            await self._probing(address, first)
        finally:  # before whom it woke runs, and may want another
            del self._probes[address]

    async def _probing(self, address: str, first: bool) -> None:
        """Until it answers, or is gone; asked less often the longer it does not."""
        client = self._clients.setdefault(address, self._servers.client(address))
        while (replica := self._balance.replicas.get(address)) and not replica.gone:
            if not first:
                wait_s = self._waits_s.get(address, _FIRST_WAIT_S)
                self._waits_s[address] = min(2 * wait_s, _LONGEST_WAIT_S)
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                if first or await client.ready():
                    self._served[address] = dict(await client.weights())
                    admitted = self._admit(address)
                    await self._wake()
                    if admitted:
                        return
            except PanotritonError as error:
                self._error = self._error or error
            first = False

    def _admit(self, address: str) -> bool:
        """If it serves what the run is made of, once that is settled. False where it does not."""
        weights = self._served[address]
        if self._weights is None:
            return True
        if weights == self._weights:
            self._met = True
            self._foreign.discard(address)
            self._balance.up(address)
            return True
        if address not in self._foreign:
            self._foreign.add(address)
            self._say(f"{address} serves other weights than the run's and is left out")
            self._error = self._error or ConnectError(
                other_weights(address, weights, self._weights)
            )
        return False

    def _count_pause(self, now: float) -> None:
        if not self._balance.all_down:
            if self._paused_since is not None:
                self._paused_s += now - self._paused_since
                self._paused_since = None
            return
        if self._paused_since is None:
            self._paused_since = now
        allowed_s = self._patience_s if self._met else self._contact_s
        paused_s = now - self._paused_since
        if not self._outage and (self._error or paused_s >= _UNSAID_S):
            self._outage = True
            self._say(f"paused, for {allowed_s:g} s at most: {self._error or _NOT_READY}")
        if self._paused_s + paused_s >= allowed_s:
            self._over = self._over or self._end()

    def _end(self) -> PanotritonError:
        if not self._met:
            return self._error or ConnectError("no server has an address yet: is one ready?")
        why = f"at first: {self._error}" if self._error else _NOT_READY
        if self._foreign:
            why += (
                f"; other weights than the run's are served by {', '.join(sorted(self._foreign))}"
            )
        return OutOfPatience(
            f"paused for {self._patience_s:g} s, and no server made a group; {why}"
        )

    def _reclaim(self, now: float) -> None:
        """Groups of workers that have gone without a word."""
        for worker, beat in list(self._beats.items()):
            if now - beat > _SILENT_S:
                del self._beats[worker]
                for address, count in self._held.pop(worker, Counter()).items():
                    for _ in range(count):
                        self._balance.give(address, UNUSED, 0.0, now)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def weights(self, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
        """Settle what the run is made of, and return it: what the first replica serves that answers.

        wanted: what a run that goes on was made of; then that, and what the first serves only where all
        have answered, or had their time, and none serves it. Raises as `acquire` does.
        """

        def is_settled() -> bool:
            if wanted is None:
                return bool(self._served)
            return wanted in self._served.values() or (
                self._served.keys() >= self._balance.replicas.keys() != set()
            )

        async with self._changed:
            await self._changed.wait_for(lambda: self._over or is_settled())
        if self._over and not self._served:
            raise self._over
        found = list(self._served.values())
        self.agree(wanted if wanted in found else found[0])
        return dict(self._weights or {})

    def agree(self, weights: Mapping[str, str]) -> None:
        """The run is made of these, unless that is settled: replicas that serve others are left out."""
        if self._weights is None:
            self._weights = dict(weights)
            for address in self._served:
                if not self._admit(address):
                    self._probe(address)  # it may be started again with ours

    def beat(self, worker: str) -> None:
        """A worker is there."""
        self._beats[worker] = time.monotonic()

    def hears(self, worker: str, within_s: float) -> bool:
        """Whether it was there a moment ago."""
        return time.monotonic() - self._beats.get(worker, -math.inf) < within_s

    async def acquire(self, ticket: int | None = None, worker: str = "") -> Lease:
        """Wait for a replica that has room. Raises OutOfPatience, or where no server ever answered its error.

        ticket: of a group that has to be alone at its replica.
        """
        if worker:
            self.beat(worker)
        async with self._changed:
            while True:
                if self._over:
                    raise self._over
                # Who has died since it asked would keep what it is given.
                if not worker or self.hears(worker, _SILENT_S):
                    address = self._balance.take(time.monotonic(), ticket)
                    if address is not None:
                        break
                await self._changed.wait()
        if worker:
            self._held.setdefault(worker, Counter())[address] += 1
        return Lease(address, self._balance.deadline_s, ticket)

    async def release(
        self,
        lease: Lease,
        outcome: str,
        seconds: float = 0.0,
        error: PanotritonError | None = None,
        worker: str = "",
    ) -> None:
        """What came of the group, one of `balance`'s words; error: a replica's that is in trouble."""
        if worker:
            self.beat(worker)
            held = self._held.get(worker, Counter())
            if not held[lease.address]:
                return  # reclaimed
            held[lease.address] -= 1
        self._balance.give(lease.address, outcome, seconds, time.monotonic(), lease.ticket)
        if outcome == LOST:
            self._error = self._error or error
            self._probe(lease.address)
        if outcome == DONE:
            self._made_one(lease.address)
        await self._wake()

    def _made_one(self, address: str) -> None:
        self._waits_s.pop(address, None)
        now = time.monotonic()
        if self._paused_since is not None:
            self._paused_s += now - self._paused_since
            self._paused_since = None
        if self._outage:
            self._say(f"goes on, after a pause of {self._paused_s:.0f} s")
        self._outage, self._error, self._paused_s = False, None, 0.0

    @property
    def room(self) -> int:
        """Groups that the replicas may have at once, all together."""
        return self._balance.room
