"""How many replicas a number of groups a day needs, and a data-set run over them, simulated.

    python tests/bench/capacity.py [--hardware NAME]

Service times come from capacity.json; run.py puts what the bench `pipeline` measured beside them in the docs.
The run is that of `panotriton dataset --engine ray`: which replica a group goes to is asked of the same
`Balance`, so that what is simulated is what is deployed. A replica is one GPU, which works on one stage of
one group at a time, and CPU steps and transfers, which overlap with the GPU's work on others.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from panotriton.groups.balance import DONE, LOST, SLOW, UNUSED, Balance
from panotriton.groups.records import MAX_ATTEMPTS

ROOT = Path(__file__).parent.parent.parent
TIMES = Path(__file__).with_name("capacity.json")

GROUPS_A_DAY = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
INTERVALS, PAIRS = 8, 16
PAIR_MEGAPIXELS = 2048 * 1024 / 1e6  # a pair of 512 px crops, upscaled by 2
VIEW_MEGAPIXELS = 1024 * 1024 / 1e6
RGB_BYTES_PER_MEGAPIXEL = 3e6


@dataclass(frozen=True)
class Times:
    """Service times of one replica, seconds."""

    sr_s_per_megapixel: float
    score_s_per_pair: float
    describe_s_per_interval: float
    preprocess_s: float
    interpolate_s_per_view: float
    wire_bytes_per_s: float

    @classmethod
    def load(cls, hardware: str) -> Times:
        known = json.loads(TIMES.read_text())
        if hardware not in known:
            raise SystemExit(f"no times for {hardware!r} in {TIMES}; it has {', '.join(known)}")
        return cls(**{name: known[hardware][name] for name in cls.__dataclass_fields__})

    def steps(self, kept: int, views: int = 9) -> list[tuple[str, float]]:
        """What one group asks of a replica, in order: a resource and seconds."""
        between = kept * 2 * views
        sent = (PAIRS * PAIR_MEGAPIXELS + between * VIEW_MEGAPIXELS) * RGB_BYTES_PER_MEGAPIXEL
        steps = [
            ("cpu", self.preprocess_s),
            ("gpu", PAIRS * PAIR_MEGAPIXELS * self.sr_s_per_megapixel),
            ("gpu", PAIRS * self.score_s_per_pair),
            ("gpu", kept * self.describe_s_per_interval),
            ("cpu", between * self.interpolate_s_per_view),
            ("gpu", between * VIEW_MEGAPIXELS * self.sr_s_per_megapixel),
            ("wire", sent / self.wire_bytes_per_s),
        ]
        return [step for step in steps if step[1] > 0]

    def gpu_s(self, kept: float) -> float:
        """GPU seconds of a group that keeps `kept` intervals; linear, so a mean may be given."""
        one = [sum(s for what, s in self.steps(k) if what == "gpu") for k in (0, 1)]
        return one[0] + kept * (one[1] - one[0])


def replicas_for(groups_a_day: float, times: Times, kept: float, utilisation: float = 0.9) -> int:
    """Replicas that finish so many groups a day, each busy for `utilisation` of it."""
    return _replicas(groups_a_day, times.gpu_s(kept), utilisation)


def _replicas(groups_a_day: float, group_s: float, utilisation: float = 0.9) -> int:
    return math.ceil(groups_a_day * group_s / (86400 * utilisation))


def replica_table(group_s: float) -> str:
    """Replicas for some numbers of groups a day, one GPU each."""
    rows = (f"{groups:>14,} {_replicas(groups, group_s):>17,}" for groups in GROUPS_A_DAY)
    return "\n".join((f"{'groups a day':>14} {'replicas at 90 %':>17}", *rows))


def measured(pipeline: dict[str, Any]) -> str:
    """Markdown: the replicas by the results of the bench `pipeline`, whose networks ran on no GPU."""
    stages, kept = pipeline["stages"]["ensemble"], len(pipeline["kept"]["ensemble"])
    group_s = sum(stages[name] for name in ("super-resolution", "scoring", "describing"))
    return (
        f"Crops of {pipeline['request']['crop_size']} px, {kept} of {INTERVALS} intervals kept: "
        f"{group_s:.1f} s per group in the networks' stages.\n\n```\n{replica_table(group_s)}\n```"
    )


@dataclass(frozen=True)
class Run:
    """A data-set run and what befalls it: shares of the replicas that die, of those that take three times
    as long, and of the workers that die. `restart_s` None: a dead replica stays dead. keep_s: what a worker
    takes to encode and store a group, in which it holds no replica.
    """

    replicas: int
    groups: int
    per_replica: int = 2
    workers: int | None = None  # one for eight replicas
    in_flight: int = 16  # groups that a worker holds at most
    keep_probability: float = 0.4
    spread: float = 0.1  # of service times, as the sigma of a lognormal
    keep_s: float = 5.0
    dying: float = 0.0
    slow: float = 0.0
    workers_dying: float = 0.0
    restart_s: float | None = None
    detect_s: float = 20.0
    silent_s: float = 30.0
    seed: int = 0


@dataclass
class Report:
    """What came of a run."""

    run: Run
    finished: Counter[int] = field(default_factory=Counter)
    left: list[int] = field(default_factory=list)  # dead letters
    requeued: int = 0
    deaths: int = 0
    most_pending: int = 0
    waits_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    useful_s: float = 0.0
    alive_s: float = 0.0

    @property
    def utilisation(self) -> float:
        """GPU seconds that went into finished groups, of all that living replicas had."""
        return self.useful_s / self.alive_s

    @property
    def lost(self) -> int:
        return self.run.groups - len(self.finished)

    @property
    def doubled(self) -> int:
        return sum(count - 1 for count in self.finished.values())

    def wait_s(self, quantile: float) -> float:
        return sorted(self.waits_s)[int(quantile * (len(self.waits_s) - 1))]


@dataclass(eq=False)
class Request:
    """One try of one group, on its way through one replica."""

    group: int
    worker: int
    replica: str
    ticket: int | None
    steps: Iterator[tuple[str, float]]
    sent_at: float
    gpu_s: float = 0.0  # of all its steps so far
    step_s: float = 0.0  # of the one that it waits for or is in
    asked_at: float = 0.0
    waited_s: float = 0.0


@dataclass
class Replica:
    name: str
    slowness: float = 1.0
    alive: bool = True
    born: float = 0.0
    at: dict[int, Request] = field(default_factory=dict)
    gpu: Request | None = None
    queue: deque[Request] = field(default_factory=deque)


class Simulation:
    """Discrete events: a heap of (time, number, what happens then)."""

    def __init__(self, run: Run, times: Times) -> None:
        self.run, self.times = run, times
        self.random = random.Random(run.seed)
        self.report = Report(run)
        self.now = 0.0
        self._number = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.replicas = {f"{n:05d}": Replica(f"{n:05d}") for n in range(run.replicas)}
        for name in self.random.sample(sorted(self.replicas), round(run.slow * run.replicas)):
            self.replicas[name].slowness = 3.0
        self.balance = Balance(run.per_replica)
        self.balance.update(self.replicas)
        self._alive = set(self.replicas)
        self.attempts: Counter[int] = Counter()
        self.todo = deque(range(run.groups))
        self.waiting: deque[tuple[int, int]] = (
            deque()
        )  # groups that workers hold, and whose they are
        workers = run.workers or math.ceil(run.replicas / 8)
        self._held: dict[int, set[int]] = {worker: set() for worker in range(workers)}
        self._at_once = min(
            run.in_flight, max(2, math.ceil(1.5 * run.per_replica * run.replicas / workers))
        )
        self._turn = deque(self._held)
        self._in_hand: set[int] = set()
        self._out: dict[int, Request] = {}  # by group
        self._open = run.groups

    def simulate(self) -> Report:
        self._plan_deaths()
        self._send()
        while self._events and self._open:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.report.seconds = self.now
        for replica in self.replicas.values():
            if replica.alive:
                self.report.alive_s += self.now - replica.born
        return self.report

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), happen))

    # ── Ray: whoever has room takes the next ──

    def _send(self) -> None:
        while self.todo and (worker := self._with_room()) is not None:
            group = self.todo.popleft()
            self._held[worker].add(group)
            self._in_hand.add(group)
            self.waiting.append((group, worker))
        for _ in range(len(self.waiting)):
            group, worker = self.waiting.popleft()
            if group not in self._held.get(worker, ()):
                continue  # its worker has died
            ticket = group if self.attempts[group] else None
            address = self.balance.take(self.now, ticket)
            if address is not None:
                self._begin(group, worker, address, ticket)
            elif ticket is None:
                self.waiting.appendleft((group, worker))
                return  # nor is there room for the others
            else:
                self.waiting.append((group, worker))

    def _with_room(self) -> int | None:
        """The workers in turn, but those that hold all that they may."""
        if len(self._in_hand) >= self._at_once * len(self._held):
            return None
        while len(self._held[self._turn[0]]) >= self._at_once:
            self._turn.rotate(-1)
        worker = self._turn[0]
        self._turn.rotate(-1)
        return worker

    def _begin(self, group: int, worker: int, address: str, ticket: int | None) -> None:
        replica = self.replicas[address]
        chance = random.Random(self.run.seed * 1_000_003 + group)  # the same group costs the same
        kept = sum(chance.random() < self.run.keep_probability for _ in range(INTERVALS))
        steps = [
            (what, seconds * replica.slowness * chance.lognormvariate(0, self.run.spread))
            for what, seconds in self.times.steps(kept)
        ]
        request = Request(group, worker, address, ticket, iter(steps), self.now)
        self._out[group] = request
        if deadline_s := self.balance.deadline_s:
            self._after(deadline_s, lambda: self._late(request))
        self._arrive(replica, request)

    def _late(self, request: Request) -> None:
        replica = self.replicas[request.replica]
        if replica.at.pop(id(request), None):
            self._gave(request, SLOW, counts=True)

    def _gave(self, request: Request, outcome: str, *, counts: bool) -> None:
        """A try that gave no group: once more, or never again."""
        if self._out.get(request.group) is not request:
            return  # its worker has died, and it was begun anew
        del self._out[request.group]
        self.balance.give(request.replica, outcome, 0.0, self.now, request.ticket)
        self.report.requeued += 1
        self.attempts[request.group] += counts
        if self.attempts[request.group] >= MAX_ATTEMPTS:
            self.report.left.append(request.group)
            self._settled(request)
        else:
            self.waiting.appendleft((request.group, request.worker))
        self._send()

    def _failed(self, request: Request, *, counts: bool) -> None:
        self._gave(request, LOST, counts=counts)

    def _succeeded(self, request: Request) -> None:
        if self._out.get(request.group) is not request:
            return
        del self._out[request.group]
        seconds = self.now - request.sent_at
        self.balance.give(request.replica, DONE, seconds, self.now, request.ticket)
        self._after(self.run.keep_s, lambda: self._kept(request))
        self._send()

    def _kept(self, request: Request) -> None:
        if request.group not in self._held.get(request.worker, ()):
            return  # the worker died with it
        self.report.finished[request.group] += 1
        self.report.useful_s += request.gpu_s / self.replicas[request.replica].slowness
        self.report.waits_s.append(request.waited_s)
        self._settled(request)
        self._send()

    def _settled(self, request: Request) -> None:
        self._held[request.worker].discard(request.group)
        self._in_hand.discard(request.group)
        self._open -= 1

    # ── a replica ──

    def _arrive(self, replica: Replica, request: Request) -> None:
        if not replica.alive:  # connection refused
            self._after(0.1, lambda: self._failed(request, counts=False))
            return
        replica.at[id(request)] = request
        self.report.most_pending = max(self.report.most_pending, len(replica.at))
        self._next(replica, request)

    def _next(self, replica: Replica, request: Request) -> None:
        if id(request) not in replica.at:  # it died with the replica
            return
        step = next(request.steps, None)
        if step is None:
            del replica.at[id(request)]
            self._succeeded(request)
        elif step[0] == "gpu":
            request.asked_at, request.gpu_s = self.now, request.gpu_s + step[1]
            request.step_s = step[1]
            replica.queue.append(request)
            self._work(replica)
        else:
            self._after(step[1], lambda: self._next(replica, request))

    def _work(self, replica: Replica) -> None:
        while replica.gpu is None and replica.queue:
            request = replica.queue.popleft()
            if id(request) in replica.at:  # it was not given up
                self._begin_work(replica, request)

    def _begin_work(self, replica: Replica, request: Request) -> None:
        replica.gpu = request
        request.waited_s += self.now - request.asked_at
        self._after(request.step_s, lambda: self._worked(replica, request))

    def _worked(self, replica: Replica, request: Request) -> None:
        if replica.gpu is request:
            replica.gpu = None
            self._next(replica, request)
            self._work(replica)

    # ── deaths ──

    def _plan_deaths(self) -> None:
        mean_s = self.times.gpu_s(INTERVALS * self.run.keep_probability)
        about_s = self.run.groups * mean_s / self.run.replicas
        count = round(self.run.dying * self.run.replicas)
        for name in self.random.sample(sorted(self.replicas), count):
            replica = self.replicas[name]
            self._after(self.random.uniform(0, 0.95 * about_s), lambda r=replica: self._die(r))
        count = round(self.run.workers_dying * len(self._held))
        for worker in self.random.sample(sorted(self._held), count):
            at_s = self.random.uniform(0, 0.95 * about_s)
            self._after(at_s, lambda w=worker: self._worker_dies(w))

    def _die(self, replica: Replica) -> None:
        self.report.deaths += 1
        self.report.alive_s += self.now - replica.born
        replica.alive = False
        lost, replica.at, replica.gpu = list(replica.at.values()), {}, None
        replica.queue.clear()
        for request in lost:
            self._after(self.run.detect_s, lambda q=request: self._failed(q, counts=True))
        self._after(self.run.detect_s, lambda: self._listed(replica, there=False))
        if self.run.restart_s is not None:
            self._after(self.run.detect_s + self.run.restart_s, lambda: self._restart(replica))

    def _restart(self, replica: Replica) -> None:
        replica.alive, replica.born = True, self.now
        self._listed(replica, there=True)
        self.balance.up(replica.name)
        self._send()

    def _listed(self, replica: Replica, *, there: bool) -> None:
        """The name of the headless service is looked up again."""
        (self._alive.add if there else self._alive.discard)(replica.name)
        self.balance.update(self._alive)

    def _worker_dies(self, worker: int) -> None:
        """Ray starts another and gives it the same rows; the replicas are its again once it is missed."""
        groups = sorted(self._held.pop(worker))
        another = max(self._held) + 1
        self._held[another] = set()
        self._turn[self._turn.index(worker)] = another
        self._in_hand.difference_update(groups)
        for group in groups:
            if request := self._out.pop(group, None):
                self.replicas[request.replica].at.pop(id(request), None)
                self._after(self.run.silent_s, lambda q=request: self._reclaimed(q))
            self.report.requeued += 1
        self.todo.extendleft(reversed(groups))
        self._send()

    def _reclaimed(self, request: Request) -> None:
        self.balance.give(request.replica, UNUSED, 0.0, self.now, request.ticket)
        self._send()


TWO_HUNDRED = Run(200, 20_000)
SCENARIOS = {
    "all well": TWO_HUNDRED,
    "5 % die and stay dead": replace(TWO_HUNDRED, dying=0.05),
    "5 % die, back after 10 min": replace(TWO_HUNDRED, dying=0.05, restart_s=600),
    "the same, 8 % of workers too": replace(
        TWO_HUNDRED, dying=0.05, restart_s=600, workers_dying=0.08
    ),
    "the same, 5 % thrice as slow": replace(
        TWO_HUNDRED, dying=0.05, restart_s=600, workers_dying=0.08, slow=0.05
    ),
    "1 group per replica": replace(TWO_HUNDRED, per_replica=1, dying=0.05),
    "4 groups per replica": replace(TWO_HUNDRED, per_replica=4, dying=0.05),
    "1,000 replicas, 5 % die": Run(1000, 100_000, dying=0.05),
    "4,000 replicas, 5 % die": Run(4000, 400_000, dying=0.05),
}


HEADINGS = (
    f"{'200 replicas, 20,000 groups':<28}  hours    used  queue  wait p99  again  lost  twice"
)


def replicas_text(hardware: str, times: Times, kept: float) -> str:
    """What a group costs, and the replicas."""
    none, one = times.gpu_s(0), times.gpu_s(1)
    return (
        f"{hardware}: {none:.1f} + {one - none:.1f}·K GPU s per group that keeps K intervals; "
        f"{times.gpu_s(kept):.1f} at {kept}\n\n{replica_table(times.gpu_s(kept))}"
    )


def scenario_line(name: str, times: Times) -> str:
    """One simulated run, under HEADINGS."""
    report = Simulation(SCENARIOS[name], times).simulate()
    return (
        f"{name:<28} {report.seconds / 3600:>6.2f} {report.utilisation:>7.1%} {report.most_pending:>6}"
        f" {report.wait_s(0.99):>7.0f} s {report.requeued:>6} {report.lost:>5} {report.doubled:>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hardware", default="a100_published", help="of capacity.json")
    parser.add_argument(
        "--kept", type=float, default=3.2, help="intervals a group keeps on average"
    )
    options = parser.parse_args()
    times = Times.load(options.hardware)
    print(replicas_text(options.hardware, times, options.kept))
    print(f"\n{HEADINGS}")
    for name in SCENARIOS:
        print(scenario_line(name, times), flush=True)


if __name__ == "__main__":
    main()
