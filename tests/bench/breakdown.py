"""Where a group's time goes: queue, input, compute and output by model, and what no network computes.

    python tests/bench/breakdown.py [--crop-size 512]

Two measures of what is not model compute, each of one group on a warm server that does nothing else:
- wall: the time in which no network computes, from Triton's trace. A network computes from the end of a
  request's input to the start of its output. Where another model works meanwhile, it costs no time.
- processor: the processor seconds of all processes but the networks' own, this client's included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import counters
import script
import traces

from panotriton import Client
from panotriton.server.launch import LocalServer


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--crop-size", type=int, default=512, help="px (%(default)s)")
    parser.add_argument("--interpolations", type=int, default=9, help="a sequence (%(default)s)")


def measure(repository: Path, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """One group after another that warms up: shapes compiled, memory touched."""
    trace = work / "trace.json"
    repository = traces.instrumented(repository, work / "repository")
    with (
        LocalServer(repository, extra_args=traces.flags(trace)) as server,
        Client(server.grpc_url) as client,
        client.shared_memory(script.GROUP_BYTES) as memory,
    ):
        client.process(*script.GROUP, **request, via=memory)
        counts = counters.read(server.grpc_url)
        used, mine, began = (
            counters.processor_s(server.pid),
            time.process_time(),
            time.monotonic_ns(),
        )
        group = client.process(*script.GROUP, **request, via=memory)
        window = (began, time.monotonic_ns())
        used = counters.processor_s(server.pid) - used
        used["client"] = time.process_time() - mine
        counts = counters.since(counters.read(server.grpc_url), counts)
    return {
        "seconds": (window[1] - window[0]) / 1e9,
        "kept": list(group.kept),
        "images": group.image_count,
        "models": {name: asdict(each) for name, each in counts.items()},
        "wall": wall(traces.read(trace, traces.COMPUTE), window),
        "processor": processor(used),
        "timeline": timeline(traces.read(trace, traces.COMPUTE), window),
    }


def wall(spans: dict[str, list[traces.Span]], window: traces.Span) -> dict[str, float | None]:
    """Seconds with a network at work, and the share without; None where the trace knows none."""
    busy = [span for name in counters.NETWORKS for span in spans.get(name, ())]
    if not traces.within(busy, window):
        return {"network_s": None, "other_share": None}
    network_s = traces.covered_s(busy, window)
    return {
        "network_s": network_s,
        "other_share": 1 - network_s / ((window[1] - window[0]) / 1e9),
        **{name: traces.covered_s(spans.get(name, ()), window) for name in counters.NETWORKS},
    }


def processor(used: Counter[str]) -> dict[str, Any]:
    """Processor seconds by process, and the share that is not the networks'."""
    network_s = sum(used[name] for name in counters.NETWORKS)
    seconds = {name: round(s, 2) for name, s in used.most_common() if s >= 0.005}
    return {"seconds": seconds, "other_share": 1 - network_s / used.total()}


def timeline(spans: dict[str, list[traces.Span]], window: traces.Span) -> dict[str, list[Any]]:
    """Model → [start, end] in seconds of the group, for the plot; those of one batch only once."""
    return {
        name: [
            [round((start - window[0]) / 1e9, 3), round((end - window[0]) / 1e9, 3)]
            for start, end in sorted(set(traces.within(found, window)))
        ]
        for name, found in spans.items()
        if traces.within(found, window)
    }


def markdown(result: dict[str, Any]) -> str:
    """Both measures, then the table."""
    request, other = result["request"], result["processor"]["other_share"]
    about = (
        f"One group, crops of {request['crop_size']} px, {request['interpolations']} in-between views: "
        f"{len(result['kept'])} of 8 intervals kept, {result['images']} images, {result['seconds']:.1f} s."
    )
    slowest_first = sorted(result["models"], key=lambda name: -result["models"][name]["compute_s"])
    rows = [_row(name, result) for name in slowest_first]
    rows += [
        (name, *("–",) * 8, f"{result['processor']['seconds'].get(name, 0.0):.2f}")
        for name in ("server", "client")
    ]
    headings = ("model", "calls", "rows", "rows per call", "queue s", "input s", "compute s")
    return "\n".join(
        [
            about,
            "",
            f"- {_wall(result)}",
            f"- Processor time that is not a network's: **{other:.1%}**.",
            "",
            script.table([*headings, "output s", "busy s", "processor s"], rows),
            "",
            "Queue, input, compute and output are sums over requests: those that share a batch count each, "
            "and an ensemble and the models that call others include them. Busy is the time in which a "
            "network computes at all.",
        ]
    )


def _wall(result: dict[str, Any]) -> str:
    share = result["wall"]["other_share"]
    if share is None:
        return "Time in which no network computes: unknown, there is no network in the trace."
    return f"Time in which no network computes: **{share:.1%}** of the group's."


def _row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    counts = result["models"][name]
    busy = result["wall"].get(name)
    used = result["processor"]["seconds"].get(name)
    calls = max(1, counts["calls"])
    return (
        f"`{name}`",
        str(counts["calls"]),
        str(counts["rows"]),
        f"{counts['rows'] / calls:.1f}",
        *(f"{counts[key]:.2f}" for key in ("queue_s", "input_s", "compute_s", "output_s")),
        "–" if busy is None else f"{busy:.2f}",
        "–" if used is None else f"{used:.2f}",
    )


def main() -> None:
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, arguments)
    request = {
        "seed": script.SEED,
        "crop_size": 64 if chosen.quick else chosen.crop_size,
        "interpolations": 1 if chosen.quick else chosen.interpolations,
    }
    with tempfile.TemporaryDirectory() as work:
        folder = script.exported(chosen.repository)
        result = measure(folder, request, Path(work))
    result["request"] = request
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
