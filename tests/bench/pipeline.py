"""A whole group, file hops against the ensemble: same weights, same cameras, same machine, in turns.

    python tests/bench/pipeline.py                        about 5 minutes on 2 idle cores
    python tests/bench/pipeline.py --interpolations 1     about 2

filehop/__init__.py says what the two have in common and what not. Both read the panoramas from files. The
ensemble's group is also written to the files that the services leave behind, and that time counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import script
import traces
from filehop.client import Outcome, Run, Services

from panotriton import Client
from panotriton.client.shared_memory import SharedMemory
from panotriton.groups.folder import write_group
from panotriton.server.launch import LocalServer

# In this order an instant in which several run counts: what holds the others up comes first.
STAGES = {
    "super-resolution": ("osediff",),
    "scoring": ("qwen_scorer",),
    "describing": ("qwen_describer",),
    "preprocessing": ("decode", "preprocess"),
    "interpolating": ("interpolate",),
}
WAYS = ("file hops", "ensemble")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--crop-size", type=int, default=512, help="px (%(default)s)")
    parser.add_argument("--interpolations", type=int, default=9, help="a sequence (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.7, help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="of both, in turns (%(default)s)")


def by_files(services: Services, request: dict[str, Any], folder: Path) -> tuple[float, Outcome]:
    """Seconds and outcome of a group through the services."""
    began = time.perf_counter()
    outcome = Run(services, script.GROUP, folder).process(**request)
    return time.perf_counter() - began, outcome


def by_ensemble(
    client: Client, memory: SharedMemory, request: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """A group through the server, images by shared memory: its seconds, those of writing it, when it
    was, and its outcome."""
    began = time.monotonic_ns()
    group = client.process(*script.GROUP, **request, via=memory)
    ended = time.monotonic_ns()
    write_group(group, folder, ("sunset", "city"), {}, group_id=1)
    return {
        "seconds": (ended - began) / 1e9,
        "write_s": (time.monotonic_ns() - ended) / 1e9,
        "window": (began, ended),
        "kept": list(group.kept),
        "scores": [pair.quality.final_score for pair in group.pairs],
        "images": group.image_count,
    }


def measure(repository: Path, request: dict[str, Any], runs: int, work: Path) -> dict[str, Any]:
    """Both ways in turns, after a group that warms up each: shapes, pools and memory as in service."""
    trace = work / "trace.json"
    old: list[tuple[float, Outcome]] = []
    new: list[dict[str, Any]] = []
    with (
        LocalServer(repository, extra_args=traces.flags(trace)) as server,
        Client(server.grpc_url) as client,
        client.shared_memory(script.GROUP_BYTES) as memory,
        Services() as services,
    ):
        by_ensemble(client, memory, request, work / "warm")
        by_files(services, request, work / "warm-files")
        for turn in range(runs):
            new.append(by_ensemble(client, memory, request, work / f"ensemble-{turn}"))
            old.append(by_files(services, request, work / f"files-{turn}"))
    return compare(old, new, traces.read(trace, traces.REQUEST))


def compare(
    old: list[tuple[float, Outcome]],
    new: list[dict[str, Any]],
    spans: dict[str, list[traces.Span]],
) -> dict[str, Any]:
    """Medians, their ratio, and whether both came to the same; stages are the last run's."""
    seconds = {
        WAYS[0]: statistics.median(s for s, _ in old),
        WAYS[1]: statistics.median(run["seconds"] for run in new),
    }
    written = statistics.median(run["seconds"] + run["write_s"] for run in new)
    outcome, group = old[-1][1], new[-1]
    served = {
        stage: [span for model in models for span in spans.get(model, ())]
        for stage, models in STAGES.items()
    }
    rest = old[-1][0] - sum(outcome.seconds.values())
    return {
        "seconds": seconds,
        "written_s": written,
        "ratio": seconds[WAYS[0]] / seconds[WAYS[1]],
        "ratio_written": seconds[WAYS[0]] / written,
        "stages": {
            WAYS[0]: {**outcome.seconds, "rest": rest},
            WAYS[1]: traces.partition_s(served, group["window"]),
        },
        "kept": {WAYS[0]: outcome.kept, WAYS[1]: group["kept"]},
        "images": {WAYS[0]: outcome.images, WAYS[1]: group["images"]},
        "score_difference": max(
            abs(a - b) for a, b in zip(outcome.scores, group["scores"], strict=True)
        ),
    }


def markdown(result: dict[str, Any]) -> str:
    """The stages side by side, and what the two have come to."""
    old, new = (result["stages"][way] for way in WAYS)
    names = dict.fromkeys([*STAGES, "filtering and splitting", "rest"])
    rows = [(name, _seconds(old.get(name)), _seconds(new.get(name))) for name in names]
    rows.append(("**whole group**", *(f"**{result['seconds'][way]:.1f}**" for way in WAYS)))
    rows.append(
        ("its files too", f"{result['seconds'][WAYS[0]]:.1f}", f"{result['written_s']:.1f}")
    )
    kept = "; ".join(f"{way} kept {result['kept'][way]}" for way in WAYS)
    return "\n".join(
        [
            _about(result["request"]),
            "",
            script.table(["s", *WAYS], rows),
            "",
            f"The ensemble is **{result['ratio']:.1f} times** as fast, {result['ratio_written']:.1f} times "
            f"when its images are written to files too. {kept}; scores differ by at most "
            f"{result['score_difference']:.2f}: JPEG at every hop changes the pixels that are scored.",
        ]
    )


def _about(request: dict[str, Any]) -> str:
    return (
        f"Crops of {request['crop_size']} px, {request['interpolations']} in-between views, seed "
        f"{request['seed']}, threshold {request['threshold']:g}. Stages of the ensemble overlap; an instant "
        "counts for the uppermost."
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, arguments)
    request = {
        "seed": script.SEED,
        "crop_size": 64 if chosen.quick else chosen.crop_size,
        "interpolations": 1 if chosen.quick else chosen.interpolations,
        "threshold": 0.5 if chosen.quick else chosen.threshold,
    }
    with tempfile.TemporaryDirectory() as work:
        folder = script.exported(chosen.repository)
        result = measure(folder, request, chosen.runs, Path(work))
    result["request"] = request
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
