"""What the parts of the GPU check share: results that survive being stopped, and how time is taken."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import script

from panotriton.server.engines import CPU, CUDA, Engine

__all__ = ["Record", "engine", "options", "timed"]


class Record:
    """Figures by name, printed and written one by one: a part that is stopped keeps what it had."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        print(f"{name}: {value}", flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self.values, indent=1) + "\n")

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """`work`'s result under `name`, or why there is none; the rest goes on."""
        try:
            self[name] = work()
        except Exception as error:  # whatever a library of this machine raises
            self[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


def options(doc: str, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """--repository, --json and --quick."""
    return script.options(doc, add)


def engine() -> Engine:
    """What the networks run on here: the GPU, or the CPU in its place."""
    return CUDA if script.gpus() else CPU


def timed(run: Callable[[], Any], *, runs: int, budget_s: float = 4.0) -> dict[str, float]:
    """ms of the first run, which plans and searches, and the median of the later ones."""
    spent = []
    began = time.perf_counter()
    while len(spent) < 3 or (len(spent) < runs + 1 and time.perf_counter() - began < budget_s):
        start = time.perf_counter()
        run()
        spent.append((time.perf_counter() - start) * 1e3)
    return {"ms": round(statistics.median(spent[1:]), 2), "first_ms": round(spent[0], 1)}
