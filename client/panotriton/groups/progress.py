"""How a run goes and what it costs: on a terminal, as JSON lines, as Prometheus metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, TextIO

from panotriton.client.aio import AsyncClient
from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.dataset import Summary
from panotriton.groups.maker import Outcome
from panotriton.groups.replicas import Servers, addresses
from panotriton.pipeline.networks import NETWORKS, PIPELINE

__all__ = ["Progress", "Usage", "exposed", "told"]

_WINDOW_S = 600.0  # over which the rate is taken
_READ_EVERY_S = 15.0
_NETWORKS = {*NETWORKS[PIPELINE].models, "qwen"}
_NOTHING = Summary(0, 0, 0, 0, complete=False)


class Usage:
    """Seconds that the servers' networks have worked since the run began, on whatever they run on.

    On shared servers that includes what others asked of them.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._clients: dict[str, AsyncClient] = {}
        self._last: dict[str, float] = {}
        self.seconds = 0.0

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[Usage]:
        """Read while a run goes on."""
        task = asyncio.create_task(self._watch())
        try:
            yield self
            await self._read()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for client in self._clients.values():
                await client.close()

    async def _watch(self) -> None:
        while True:
            await self._read()
            await asyncio.sleep(_READ_EVERY_S)

    async def _read(self) -> None:
        found = await asyncio.to_thread(addresses, self._servers.urls)
        await asyncio.gather(*map(self._read_one, found))

    async def _read_one(self, address: str) -> None:
        client = self._clients.setdefault(address, self._servers.client(address))
        try:
            stages = await client.statistics()
        except PanotritonError:
            return
        now = sum(stage.busy_ms for name, stage in stages.items() if name in _NETWORKS) / 1e3
        before = self._last.get(address, now)  # what was done before the run is not its own
        self.seconds += (
            now - before if now >= before else now
        )  # one that has started anew counts from 0
        self._last[address] = now


class Progress:
    """Counts of this session and of the whole run. `update` is called for each pair that is settled."""

    def __init__(self, sample_n: int | None, target_n: int | None) -> None:
        self._sample_n, self._target_n = sample_n, target_n
        self.usage: Usage | None = None
        self.results: Counter[str] = Counter()
        self.summary = _NOTHING
        self.bytes = 0
        self.last_group_at = self._began_at = time.time()
        self._began: int | None = None
        self._times: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def update(self, summary: Summary, outcome: Outcome) -> None:
        if outcome.made:
            self.results["done" if outcome.kept else "dropped"] += 1
            self.bytes += outcome.bytes
            self.last_group_at = time.time()
        else:
            self.results[f"failed_{outcome.trouble}"] += 1
        self.summary = summary
        made = self.results["done"] + self.results["dropped"]
        _, _, kept = self._times[-1]
        self._times.append((time.monotonic(), made, kept + outcome.kept))
        while self._times[-1][0] - self._times[0][0] > _WINDOW_S:
            self._times.popleft()

    @property
    def unit(self) -> str:
        return "groups" if self._sample_n else "intervals kept"

    @property
    def wanted(self) -> int:
        return self._sample_n or self._target_n or 0

    @property
    def reached(self) -> int:
        return self.summary.groups if self._sample_n else self.summary.intervals_kept

    @property
    def made(self) -> int:
        """Groups of this session."""
        return self.results["done"] + self.results["dropped"]

    def _a_second(self, column: int) -> float:
        first, last = self._times[0], self._times[-1]
        seconds = time.monotonic() - first[0]
        return (last[column] - first[column]) / seconds if seconds > 0 else 0.0

    @property
    def groups_an_hour(self) -> float:
        """Over the last ten minutes."""
        return 3600 * self._a_second(1)

    @property
    def eta_s(self) -> float | None:
        """None before there is a rate."""
        rate = self._a_second(1 if self._sample_n else 2)
        return max(0, self.wanted - self.reached) / rate if rate else None

    @property
    def device_s_per_group(self) -> float | None:
        """Seconds of the networks' devices, GPUs where they run on such, for a group of this session."""
        return self.usage.seconds / self.made if self.usage and self.made else None

    @property
    def words(self) -> str:
        """For a line on a terminal."""
        parts = [self.unit, f"{self.groups_an_hour:.0f} groups/h"]
        if self.eta_s is not None:
            parts.append(f"{_clock(self.eta_s)} left")
        if self.device_s_per_group is not None:
            parts.append(f"{self.device_s_per_group:.1f} s of devices a group")
        failed = sum(n for name, n in self.results.items() if name.startswith("failed"))
        return " · ".join([*parts, *([f"{failed} failed"] if failed else [])])

    def as_json(self) -> dict[str, Any]:
        """One line of the log."""
        return {
            "time": round(time.time(), 3),
            "wanted": self.wanted,
            "reached": self.reached,
            "unit": self.unit,
            "groups": {
                name: self.results[name]
                for name in ("done", "dropped", "failed_input", "failed_server")
            },
            "intervals_kept": self.summary.intervals_kept,
            "groups_per_hour": round(self.groups_an_hour, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s),
            "device_s_per_group": _rounded(self.device_s_per_group),
            "bytes": self.bytes,
            "last_group_at": round(self.last_group_at, 3),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


@contextlib.contextmanager
def told(progress: Progress, every_s: float, file: TextIO) -> Iterator[None]:
    """A JSON line now and then, and one at the end."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            print(json.dumps(progress.as_json()), file=file, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        print(json.dumps(progress.as_json()), file=file, flush=True)


@contextlib.contextmanager
def exposed(progress: Progress, port: int) -> Iterator[int]:
    """Serve the run's metrics on every address of this machine, as Prometheus reads them; gives the port."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 an extra's
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
        )
    except ImportError as error:
        raise InvalidInput(
            "--metrics-port needs prometheus-client: pip install 'panotriton[metrics]'"
        ) from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            groups = CounterMetricFamily(
                "panotriton_run_groups", "Pairs settled in this session", labels=["result"]
            )
            for name, count in progress.as_json()["groups"].items():
                groups.add_metric([name], count)
            yield groups
            yield CounterMetricFamily(
                "panotriton_run_bytes", "Bytes of groups made in this session", value=progress.bytes
            )
            gauges = {
                "wanted": ("Groups or kept intervals asked for", progress.wanted),
                "reached": ("Of these, how many there are", progress.reached),
                "groups_per_hour": ("Over ten minutes", progress.groups_an_hour),
                "eta_seconds": ("Until the run is done", progress.eta_s),
                "device_seconds_per_group": ("Of the networks", progress.device_s_per_group),
                "last_group_timestamp_seconds": (
                    "When a group was made, or the run began",
                    progress.last_group_at,
                ),
            }
            for name, (about, value) in gauges.items():
                if value is not None:
                    yield GaugeMetricFamily(f"panotriton_run_{name}", about, value=value)

    registry = CollectorRegistry()
    registry.register(Collector())
    server, thread = start_http_server(port, registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
