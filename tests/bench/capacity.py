"""How many replicas a number of groups a day needs, and a data-set run over them, simulated.

    python tests/bench/capacity.py [--hardware NAME]

Service times come from capacity.json; run.py puts what the bench `pipeline` measured beside them in the docs.
The run is what docker/chart/files/shard.py does: this file imports its `share` and `pick`, so that what is
simulated is what is deployed. A replica is one GPU, which works on one stage of one group at a time, and CPU
steps and transfers, which overlap with the GPU's work on others.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import json
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TIMES = Path(__file__).with_name("capacity.json")

GROUPS_A_DAY = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
INTERVALS, PAIRS = 8, 16
PAIR_MEGAPIXELS = 2048 * 1024 / 1e6  # a pair of 512 px crops, upscaled by 2
VIEW_MEGAPIXELS = 1024 * 1024 / 1e6
RGB_BYTES_PER_MEGAPIXEL = 3e6


def _shard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shard", ROOT / "docker/chart/files/shard.py")
    if spec is None or spec.loader is None:
        raise SystemExit(
            "docker/chart/files/shard.py is missing: run this in the project's own tree"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["shard"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


shard = _shard()


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
    """A data-set run and what befalls it. `restart_s` None: a dead replica stays dead."""

    replicas: int
    shards: int
    groups: int
    per_replica: int = 2
    most: int = 64
    keep_probability: float = 0.4
    spread: float = 0.1  # of service times, as the sigma of a lognormal
    dying: float = 0.0
    restart_s: float | None = None
    detect_s: float = 20.0
    refresh_s: float = 10.0
    seed: int = 0


@dataclass
class Report:
    """What came of a run."""

    run: Run
    finished: Counter[int] = field(default_factory=Counter)
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
    """One group on its way through one replica; `shard` gets it back, finished or not."""

    group: int
    shard: Shard
    steps: Iterator[tuple[str, float]]
    gpu_s: float = 0.0  # of all its steps so far
    step_s: float = 0.0  # of the one that it waits for or is in
    asked_at: float = 0.0
    waited_s: float = 0.0


@dataclass
class Replica:
    name: str
    alive: bool = True
    born: float = 0.0
    at: dict[int, Request] = field(default_factory=dict)
    gpu: Request | None = None
    queue: deque[Request] = field(default_factory=deque)


@dataclass(eq=False)
class Shard:
    """A driver: its groups, and its part of the replicas."""

    index: int
    todo: deque[int]
    load: Counter[str] = field(default_factory=Counter)
    resting: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    in_flight: int = 0


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
        self._alive = sorted(self.replicas)
        groups = range(run.groups)
        self.shards = [Shard(i, deque(groups[i :: run.shards])) for i in range(run.shards)]
        self._unfinished = list(self.shards)

    def simulate(self) -> Report:
        self._plan_deaths()
        for each in self.shards:
            self._refresh(each)
        while self._events and self._unfinished:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.report.seconds = self.now
        for replica in self.replicas.values():
            if replica.alive:
                self.report.alive_s += self.now - replica.born
        return self.report

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), happen))

    # ── the shards: docker/chart/files/shard.py ──

    def _refresh(self, each: Shard) -> None:
        if each not in self._unfinished:
            return
        rank = self._unfinished.index(each)
        each.parts = shard.share(self._alive, rank, len(self._unfinished))
        each.resting = {name: until for name, until in each.resting.items() if until > self.now}
        self._send(each)
        self._after(self.run.refresh_s, lambda: self._refresh(each))

    def _send(self, each: Shard) -> None:
        window = max(1, round(self.run.per_replica * sum(each.parts.values())))
        while each.todo and each.parts and each.in_flight < min(window, self.run.most):
            name = shard.pick(each.parts, each.load, each.resting)
            request = self._request(each, each.todo.popleft())
            each.load[name] += 1
            each.in_flight += 1
            self._arrive(self.replicas[name], request)

    def _request(self, each: Shard, group: int) -> Request:
        chance = random.Random(self.run.seed * 1_000_003 + group)  # the same group costs the same
        kept = sum(chance.random() < self.run.keep_probability for _ in range(INTERVALS))
        steps = [
            (what, seconds * chance.lognormvariate(0, self.run.spread))
            for what, seconds in self.times.steps(kept)
        ]
        return Request(group, each, iter(steps))

    def _returned(self, replica: Replica, request: Request) -> None:
        each = request.shard
        each.load[replica.name] -= 1
        each.in_flight -= 1

    def _failed(self, replica: Replica, request: Request) -> None:
        self._returned(replica, request)
        self.report.requeued += 1
        request.shard.todo.appendleft(request.group)
        request.shard.resting[replica.name] = self.now + self.run.refresh_s
        self._send(request.shard)

    def _succeeded(self, replica: Replica, request: Request) -> None:
        self._returned(replica, request)
        self.report.finished[request.group] += 1
        self.report.useful_s += request.gpu_s
        self.report.waits_s.append(request.waited_s)
        each = request.shard
        self._send(each)
        if not each.todo and not each.in_flight:
            self._unfinished.remove(each)

    # ── a replica ──

    def _arrive(self, replica: Replica, request: Request) -> None:
        if not replica.alive:  # connection refused
            self._after(0.1, lambda: self._failed(replica, request))
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
            self._succeeded(replica, request)
        elif step[0] == "gpu":
            request.asked_at, request.gpu_s = self.now, request.gpu_s + step[1]
            request.step_s = step[1]
            replica.queue.append(request)
            self._work(replica)
        else:
            self._after(step[1], lambda: self._next(replica, request))

    def _work(self, replica: Replica) -> None:
        if replica.gpu is None and replica.queue:
            request = replica.gpu = replica.queue.popleft()
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

    def _die(self, replica: Replica) -> None:
        self.report.deaths += 1
        self.report.alive_s += self.now - replica.born
        replica.alive = False
        lost, replica.at, replica.gpu = list(replica.at.values()), {}, None
        replica.queue.clear()
        for request in lost:
            self._after(self.run.detect_s, lambda q=request: self._failed(replica, q))
        self._after(self.run.detect_s, lambda: self._alive.remove(replica.name))
        if self.run.restart_s is not None:
            self._after(self.run.detect_s + self.run.restart_s, lambda: self._restart(replica))

    def _restart(self, replica: Replica) -> None:
        replica.alive, replica.born = True, self.now
        self._alive.append(replica.name)
        self._alive.sort()


SCENARIOS = {
    "all well": Run(200, 25, 20_000),
    "5 % die and stay dead": Run(200, 25, 20_000, dying=0.05),
    "5 % die, back after 10 min": Run(200, 25, 20_000, dying=0.05, restart_s=600),
    "1 request per replica": Run(200, 25, 20_000, per_replica=1, dying=0.05),
    "4 requests per replica": Run(200, 25, 20_000, per_replica=4, dying=0.05),
    "1,000 replicas, 5 % die": Run(1000, 100, 100_000, dying=0.05),
    "4,000 replicas, 5 % die": Run(4000, 400, 400_000, dying=0.05),
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
