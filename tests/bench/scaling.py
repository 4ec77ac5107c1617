"""Groups at once: throughput, batches, tiles in flight, and how full the cores are.

    python tests/bench/scaling.py [--groups 1 2 4 8 16] [--crop-size 256] [--interpolations 3]

Every group is the same one, so that the work is the same at every step; no cache is on. Each is a request of
its own from a thread of its own, all sent at once, to one server. "Cores busy" is the whole machine, with
whatever else runs on it; "by it" is the processor time of the server, its models and this client.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import counters
import psutil
import script

from panotriton import Client
from panotriton.pipeline.networks import OSEDIFF
from panotriton.server.launch import LocalServer

TILES = OSEDIFF.denoiser
BATCHING = (OSEDIFF.encoder, TILES, OSEDIFF.decoder, "qwen")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="at once (%(default)s)"
    )
    parser.add_argument("--crop-size", type=int, default=256, help="px (%(default)s)")
    parser.add_argument("--interpolations", type=int, default=3, help="a sequence (%(default)s)")


def measure(repository: Path, request: dict[str, Any], steps: list[int]) -> list[dict[str, Any]]:
    """A step for each number of groups, after one group that warms up."""
    with LocalServer(repository) as server, Client(server.grpc_url) as client:
        client.process(*script.GROUP, **request)
        return [step(server, client, request, groups) for groups in steps]


def step(
    server: LocalServer, client: Client, request: dict[str, Any], groups: int
) -> dict[str, Any]:
    """So many groups at once, until all are done."""
    counts, used = counters.read(server.grpc_url), counters.processor_s(server.pid)
    mine, cores, began = time.process_time(), psutil.cpu_times(), time.perf_counter()
    with ThreadPoolExecutor(groups) as pool:
        sent = [pool.submit(client.process, *script.GROUP, **request) for _ in range(groups)]
        done = [each.result() for each in sent]
    seconds = time.perf_counter() - began
    busy = busy_share(cores, psutil.cpu_times())
    used = counters.processor_s(server.pid) - used
    used["client"] = time.process_time() - mine
    counts = counters.since(counters.read(server.grpc_url), counts)
    return {
        "groups": groups,
        "seconds": seconds,
        "groups_a_minute": groups / seconds * 60,
        "slowest_s": max(group.seconds for group in done),
        "images": sum(16 + group.image_count for group in done),
        "busy_share": busy,
        "own_share": used.total() / seconds / script.cores(),
        "network_share": sum(used[name] for name in counters.NETWORKS) / used.total(),
        "tiles_in_flight": tiles_in_flight(counts[TILES], seconds),
        "batching": {name: asdict(counts[name]) for name in BATCHING},
    }


def busy_share(before: Any, after: Any) -> float:
    """The share of the machine's processor time between two readings that was not idle."""
    spent = [now - was for was, now in zip(before, after, strict=True)]
    names = before._fields
    idle = spent[names.index("idle")] + spent[names.index("iowait")]
    # Guests' time is part of user and nice.
    guests = sum(spent[names.index(name)] for name in ("guest", "guest_nice"))
    return float(1 - idle / (sum(spent) - guests))


def tiles_in_flight(counts: counters.Counts, seconds: float) -> float:
    """Mean tiles in the UNet and its queue, by Little's law: request-seconds × tiles per request / s."""
    return counts.in_flight_s * counts.rows / counts.requests / seconds


def markdown(result: dict[str, Any]) -> str:
    """One row per step; and how the 8-fold compares with one."""
    steps = result["steps"]
    request = result["request"]
    base = steps[0]["groups_a_minute"]
    about = (
        f"Crops of {request['crop_size']} px, {request['interpolations']} in-between views; every group the "
        f"same, {steps[0]['images']} images."
    )
    headings = (
        "groups at once",
        "s",
        "groups a minute",
        "ratio",
        "cores busy",
        "by it",
        "networks' part",
    )
    batches = [f"rows per call, `{name}`" for name in BATCHING]
    rows = [_row(each, base) for each in steps]
    return "\n".join(
        [
            about,
            "",
            script.table([*headings, "tiles in flight", *batches], rows),
            "",
            verdict(steps),
        ]
    )


def _row(each: dict[str, Any], base: float) -> tuple[str, ...]:
    sizes = (each["batching"][name] for name in BATCHING)
    return (
        str(each["groups"]),
        f"{each['seconds']:.1f}",
        f"{each['groups_a_minute']:.2f}",
        f"{each['groups_a_minute'] / base:.2f}",
        f"{each['busy_share']:.0%}",
        f"{each['own_share']:.0%}",
        f"{each['network_share']:.0%}",
        f"{each['tiles_in_flight']:.0f}",
        *(f"{size['rows'] / size['calls']:.1f}" for size in sizes),
    )


def verdict(steps: list[dict[str, Any]]) -> str:
    """What many at once gain, and why not more: cores that are full already have nothing to gain."""
    one, most = steps[0], max(steps, key=lambda each: each["groups_a_minute"])
    gain = most["groups_a_minute"] / one["groups_a_minute"]
    return (
        f"At most {gain:.2f} times the throughput of {one['groups']} at once, with {most['groups']}. "
        f"{one['groups']} at once keeps {one['own_share']:.0%} of the cores busy, so that at most "
        f"{1 / one['own_share']:.2f} times is there to be had without cheaper work."
    )


def main() -> None:
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, arguments)
    request = {
        "seed": script.SEED,
        "crop_size": 64 if chosen.quick else chosen.crop_size,
        "interpolations": 1 if chosen.quick else chosen.interpolations,
        "threshold": 1.0 if chosen.quick else 0.7,
    }
    steps = [1, 2] if chosen.quick else chosen.groups
    result: dict[str, Any] = {"request": request}
    result["steps"] = measure(script.exported(chosen.repository), request, steps)
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
