"""Which replica gets the next group: the one with the fewest, as long as it has room and answers.

Pure: time is passed in. A data-set run asks it through `replicas`; tests/bench/capacity.py simulates it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["BUSY", "DONE", "LOST", "SLOW", "UNUSED", "Balance"]

DONE, BUSY, SLOW, LOST, UNUSED = "done", "busy", "slow", "lost", "unused"
"""What came of a group: made; refused for want of room; past its deadline; the replica went or did not
answer; it was given up for a reason that says nothing of the replica."""

_OBSERVED = 1000  # groups whose times count
_ENOUGH = 20  # of them, before a deadline is drawn from them
_LEAST_DEADLINE_S = 60.0
_TIMES_P99 = 3.0
_STRIKES = 2  # groups in a row past their deadline, with which a replica rests
_REST_S = 60.0


@dataclass(eq=False)
class Replica:
    """One server, as this run sees it. window: groups that it may have at once."""

    address: str
    window: float
    load: int = 0
    down: bool = False
    gone: bool = False  # no longer among the addresses; its groups are still out
    strikes: int = 0
    rests_until: float = -math.inf
    kept_for: int | None = None  # the ticket of a group that goes alone
    queued: int = -1  # the number of its one valid entry in the queue

    @property
    def rank(self) -> float:
        """How full it is: below 1 there is room."""
        return self.load / int(self.window)


@dataclass
class Balance:
    """`per_replica` groups at each replica: one that it works on and those that wait there.

    A replica that lost a group is down until `up`, then gets one group at a time until it has made one, so
    that a group with which servers die stands out. `ServerBusy` halves a window, and success opens it again.
    """

    per_replica: int = 2
    replicas: dict[str, Replica] = field(default_factory=dict)
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=_OBSERVED))
    _deadline_s: float | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _ranked: list[tuple[float, int, str]] = field(
        default_factory=list
    )  # of equals the longest waiting
    _resting: list[tuple[float, str]] = field(default_factory=list)

    def update(self, addresses: Iterable[str]) -> None:
        """The replicas that there are now."""
        wanted = set(addresses)
        for address in sorted(wanted - self.replicas.keys()):
            self.replicas[address] = Replica(address, float(self.per_replica))
            self._queue(self.replicas[address])
        for address, replica in list(self.replicas.items()):
            was, replica.gone = replica.gone, address not in wanted
            if replica.gone and not replica.load:
                del self.replicas[address]
            elif was and not replica.gone:
                self._queue(replica)

    def take(self, now: float, ticket: int | None = None) -> str | None:
        """A replica for one group, the emptiest; None while there is none with room.

        ticket: of a group that has to be alone at its replica; it asks again with the same one, and
        meanwhile a replica is kept free for it.
        """
        if ticket is not None:
            return self._take_alone(now, ticket)
        self._wake(now)
        while self._ranked and self._ranked[0][0] < 1:
            _, number, address = heapq.heappop(self._ranked)
            replica = self.replicas.get(address)
            if replica and replica.queued == number and self._usable(replica, now):
                replica.load += 1
                self._queue(replica)
                return address
        return None

    def _take_alone(self, now: float, ticket: int) -> str | None:
        usable = [r for r in self.replicas.values() if self._usable(r, now, ticket)]
        if not usable:
            return None
        kept = min(usable, key=lambda r: (r.kept_for != ticket, r.rank))
        if kept.kept_for is None:
            self._release(ticket)  # one that went down while it was kept
            kept.kept_for = ticket
        if kept.load:
            return None
        kept.load += 1
        return kept.address

    def _usable(self, replica: Replica, now: float, ticket: int | None = None) -> bool:
        away = replica.down or replica.gone or replica.rests_until > now
        return not away and replica.kept_for in (None, ticket)

    def _release(self, ticket: int) -> None:
        for replica in self.replicas.values():
            if replica.kept_for == ticket:
                replica.kept_for = None
                self._queue(replica)

    def _queue(self, replica: Replica) -> None:
        """Enter it anew; what was entered before counts no more."""
        replica.queued = next(self._numbers)
        if len(self._ranked) > 8 * len(self.replicas) + 64:
            valid = {(r.queued, r.address) for r in self.replicas.values()}
            self._ranked = [entry for entry in self._ranked if entry[1:] in valid]
            heapq.heapify(self._ranked)
        heapq.heappush(self._ranked, (replica.rank, replica.queued, replica.address))

    def _wake(self, now: float) -> None:
        while self._resting and self._resting[0][0] <= now:
            _, address = heapq.heappop(self._resting)
            if replica := self.replicas.get(address):
                self._queue(replica)

    def give(
        self, address: str, outcome: str, seconds: float, now: float, ticket: int | None = None
    ) -> None:
        """What came of a group that `take` had sent to `address`."""
        replica = self.replicas.get(address)
        if replica is None:
            return
        replica.load = max(0, replica.load - 1)
        if ticket is not None:
            self._release(ticket)
        if outcome == DONE:
            replica.strikes = 0
            replica.window = min(float(self.per_replica), max(1.0, replica.window) + 0.5)
            self._observe(seconds)
        elif outcome == BUSY:
            replica.window = max(1.0, replica.window / 2)
        elif outcome == SLOW:
            replica.strikes += 1
            if replica.strikes >= _STRIKES:
                replica.strikes, replica.rests_until = 0, now + _REST_S
                heapq.heappush(self._resting, (replica.rests_until, address))
        elif outcome == LOST:
            replica.down, replica.window = True, 1.0
        if replica.gone and not replica.load:
            del self.replicas[address]
        else:
            self._queue(replica)

    def up(self, address: str) -> None:
        """A replica that was down answers again."""
        if replica := self.replicas.get(address):
            replica.down = False
            self._queue(replica)

    @property
    def room(self) -> int:
        """Groups that all replicas together may have at once."""
        return sum(int(r.window) for r in self.replicas.values() if not (r.down or r.gone))

    @property
    def all_down(self) -> bool:
        return all(r.down or r.gone for r in self.replicas.values())

    @property
    def deadline_s(self) -> float | None:
        """Three times the observed 99th percentile, a minute at least; None before enough was observed."""
        return self._deadline_s

    def _observe(self, seconds: float) -> None:
        self.times_s.append(seconds)
        count = len(self.times_s)
        if count >= _ENOUGH and (count < 100 or count % 10 == 0):
            p99 = sorted(self.times_s)[math.ceil(0.99 * count) - 1]
            self._deadline_s = max(_LEAST_DEADLINE_S, _TIMES_P99 * p99)
