"""Cold start: from nothing to a server that is ready, then the first request and the second.

    python tests/bench/coldstart.py [--runs 3]

Start is what `panotriton serve` does: find the server, start it and its models' processes, wait until all
are ready. Files are in the page cache from the second run on; the first run's figures are kept apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import script

from panotriton import Client
from panotriton.server.launch import LocalServer

STEPS = (
    "serve to ready",
    "first image",
    "second image",
    "first group",
    "second group",
    "stop",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=3, help="servers started (%(default)s)")


def measure(repository: Path, runs: int) -> list[dict[str, float]]:
    """Seconds per step, for each server in turn."""
    return [once(repository) for _ in range(runs)]


def once(repository: Path) -> dict[str, float]:
    """One server from start to end: small requests, so that what is only slow once shows."""
    began = time.perf_counter()
    with LocalServer(repository) as server:
        times = {"serve to ready": time.perf_counter() - began}
        with Client(server.grpc_url) as client:
            for turn in ("first", "second"):
                times[f"{turn} image"] = seconds(
                    lambda: client.upscale(script.PANORAMAS / "city.jpg")
                )
            small = {"seed": script.SEED, "crop_size": 64, "interpolations": 0}
            for turn in ("first", "second"):
                times[f"{turn} group"] = seconds(lambda: client.process(*script.GROUP, **small))
        began = time.perf_counter()
    times["stop"] = time.perf_counter() - began
    return times


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def markdown(result: dict[str, Any]) -> str:
    """The first run, and the median of the others."""
    first, *others = result["runs"]
    rows = [
        (
            step,
            f"{first[step]:.2f}",
            f"{statistics.median(run[step] for run in others):.2f}" if others else "–",
        )
        for step in STEPS
    ]
    about = "An image is 1024×512 px, super-resolved to 2048×1024; a group has crops of 64 px and no views."
    headings = ("s", "first run", f"median of {len(others)} more")
    return f"{about}\n\n{script.table(headings, rows)}"


def main() -> None:
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, arguments)
    runs = measure(script.exported(chosen.repository), 1 if chosen.quick else chosen.runs)
    result = {"runs": runs}
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
