"""What the server counts: Triton's statistics by model, and the processor time of its processes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
import tritonclient.grpc as triton

from panotriton.pipeline.networks import OSEDIFF

NETWORKS = (*OSEDIFF.required, "qwen")
_INSTANCE = re.compile(r"(\w+)_\d+_\d+")  # what a stub is told that it is called


@dataclass
class Counts:
    """A model's statistics. Times are sums over requests: those of one batch count for each of them."""

    requests: int = 0
    calls: int = 0  # of the model's execute, each for a batch
    rows: int = 0
    queue_s: float = 0.0
    input_s: float = 0.0
    compute_s: float = 0.0
    output_s: float = 0.0
    batches: dict[int, int] = field(default_factory=dict)  # rows per call → calls

    def since(self, before: Counts) -> Counts:
        """What was added since an earlier reading."""
        names = (name for name in self.__dataclass_fields__ if name != "batches")
        added = {name: getattr(self, name) - getattr(before, name) for name in names}
        calls = {rows: n - before.batches.get(rows, 0) for rows, n in self.batches.items()}
        return Counts(**added, batches={rows: n for rows, n in sorted(calls.items()) if n})

    @property
    def in_flight_s(self) -> float:
        """Request-seconds in the model and its queue: divided by time, how many were there at once."""
        return self.queue_s + self.input_s + self.compute_s + self.output_s


def read(grpc_url: str) -> dict[str, Counts]:
    """Model → its statistics since the server's start."""
    with triton.InferenceServerClient(grpc_url) as client:
        found = client.get_inference_statistics(as_json=True)
    return {entry["name"]: _counts(entry) for entry in found["model_stats"]}


def since(now: dict[str, Counts], before: dict[str, Counts]) -> dict[str, Counts]:
    """The models that worked between two readings."""
    added = {name: counts.since(before.get(name, Counts())) for name, counts in now.items()}
    return {name: counts for name, counts in added.items() if counts.requests}


def _counts(entry: dict[str, Any]) -> Counts:
    # The server leaves out what is 0.
    stats = entry.get("inference_stats", {})
    seconds = {
        name: int(stats.get(key, {}).get("ns", 0)) / 1e9
        for name, key in (
            ("queue_s", "queue"),
            ("input_s", "compute_input"),
            ("compute_s", "compute_infer"),
            ("output_s", "compute_output"),
        )
    }
    batches = {
        int(batch["batch_size"]): int(batch.get("compute_infer", {}).get("count", 0))
        for batch in entry.get("batch_stats", ())
    }
    return Counts(
        requests=int(stats.get("success", {}).get("count", 0)),
        calls=int(entry.get("execution_count", 0)),
        rows=int(entry.get("inference_count", 0)),
        batches=batches,
        **seconds,
    )


def processor_s(pid: int) -> Counter[str]:
    """Processor seconds, user and system, by model, and of the "server" itself.

    Each instance of a Python model or of an exported network is a process of its own.
    """
    server = psutil.Process(pid)
    seconds = Counter({"server": _used_s(server)})
    for process in server.children(recursive=True):
        seconds[_model(process)] += _used_s(process)
    return seconds


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _model(stub: psutil.Process) -> str:
    names = map(_INSTANCE.fullmatch, stub.cmdline())
    return next((match[1] for match in names if match), "server")
