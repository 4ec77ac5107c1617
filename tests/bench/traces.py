"""Triton's own trace: when each model computed, added up so that no instant counts twice.

Times are ns of CLOCK_MONOTONIC, which time.monotonic_ns() reads too. The server writes the file when it
stops. What models ask of other models is in it only for a repository that was `instrumented`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Span = tuple[int, int]
COMPUTE = ("COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START")  # without the copies in and out
REQUEST = ("REQUEST_START", "REQUEST_END")  # with them, and the time in the queue
CALLS = Path(__file__).with_name("traced_calls.py")


def flags(file: Path) -> list[str]:
    """Arguments that make tritonserver trace every request."""
    settings = (f"triton,file={file}", "level=TIMESTAMPS", "rate=1", "count=-1")
    return [f"--trace-config={setting}" for setting in settings]


def instrumented(repository: Path, target: Path) -> Path:
    """A copy whose models that call others take their request's trace along; weights are linked."""
    shutil.copytree(repository, target, copy_function=_link)
    for model in target.glob("*/1/model.py"):
        code = model.read_text()
        if "respond_async" in code:
            model.unlink()  # the link, so that the original stays as it is
            model.write_text(f"import {CALLS.stem}\n\n{code}")  # before it imports what is wrapped
            shutil.copy(CALLS, model.parent)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def read(file: Path, kind: tuple[str, str]) -> dict[str, list[Span]]:
    """Model → the spans of its requests; ensembles compute nothing and have none of COMPUTE."""
    models: dict[int, str] = {}
    times: dict[int, dict[str, int]] = defaultdict(dict)
    for entry in json.loads(file.read_text()):
        if "model_name" in entry:
            models[entry["id"]] = entry["model_name"]
        for stamp in entry.get("timestamps", ()):
            times[entry["id"]][stamp["name"]] = stamp["ns"]
    spans: dict[str, list[Span]] = defaultdict(list)
    for request, stamps in times.items():
        if kind[0] in stamps and kind[1] in stamps:
            spans[models[request]].append((stamps[kind[0]], stamps[kind[1]]))
    return spans


def within(spans: Iterable[Span], window: Span) -> list[Span]:
    """The parts of spans that lie inside the window."""
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]


def covered_s(spans: Iterable[Span], window: Span) -> float:
    """Seconds of the window in which at least one span runs."""
    total, reached = 0, window[0]
    for start, end in sorted(within(spans, window)):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e9


def partition_s(stages: Mapping[str, Sequence[Span]], window: Span) -> dict[str, float]:
    """The window in seconds per stage; an instant of several counts for the first; and the "rest"."""
    shares: dict[str, float] = {}
    seen: list[Span] = []
    for name, spans in stages.items():
        seen.extend(spans)
        shares[name] = covered_s(seen, window) - sum(shares.values())
    shares["rest"] = (window[1] - window[0]) / 1e9 - sum(shares.values())
    return shares
