"""What recording a group costs as a run grows, and how soon a killed run of 100,000 groups goes on.

    python tests/bench/records.py [--groups 100000] [FOLDER]

Records are those of real groups in size (`--kept` intervals of 8, 9 views between). The resumed run is the
command itself, with a stand-in server; it is timed from its start to its first new record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from panotriton.groups.plan import Plan, digests, find_panoramas
from panotriton.groups.records import BLOCK, Memory, Records
from panotriton.groups.store import FolderStore
from tests.groups import write_example
from tests.replica import Replica
from tests.server.cluster import free_port, write_panoramas

MEASURED = 200
OPTIONS = {
    "crop_size": 64,
    "upscale": 1,
    "align": "adain",
    "prompt": "",
    "threshold": 0.7,
    "interpolations": 9,
}
WEIGHTS = dict.fromkeys(("osediff", "osediff_tagger", "qwen"), "sha256:stand-in")


def example() -> dict[str, Any]:
    """A record as it is."""
    with tempfile.TemporaryDirectory() as place:
        write_example(Path(place), [0.9] * 16, [1, 3, 5], crop_size=64)
        (entry,) = json.loads((Path(place) / "results.json").read_text())
    for score in entry["scores"]:
        score["raw"] = "Correlation: 0.8\nInformation: 0.7\nSubject: 0.9\nFinal Score: 0.82\n" * 4
    return {"key": "0" * 32, "bytes": 30_000_000, **entry}


def grow(records: Records, memory: Memory, record: dict[str, Any], until: int) -> Iterator[float]:
    """Record up to group `until` as a run does; seconds of each."""
    for index in range(len(memory.made), until):
        record["group_id"] = index + 1
        began = time.perf_counter()
        records.made(index, record)
        memory.made[index] = (3, record["bytes"])
        if (index + 1) % BLOCK == 0:
            records.close(index // BLOCK, memory)
        yield time.perf_counter() - began


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def resume(folder: Path, panoramas: Path, groups: int) -> tuple[float, float]:
    """Seconds to the first new record, and to the end of a run of a few groups more."""
    new = folder / "records" / f"{groups // BLOCK:06d}" / f"{groups + 1:09d}.json"
    server = Replica(free_port(), "--seconds", 0.01)
    words = [sys.executable, "-m", "panotriton", "dataset", str(panoramas), "-o", str(folder)]
    words += ["--url", server.url, "--sample-n", str(groups + 5), "--json"]
    words += ["--crop-size", "64", "--upscale", "1"]
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as run:
        while not new.exists():
            if run.poll() is not None:
                raise SystemExit(f"the resumed run ended with {run.returncode}")
            time.sleep(0.01)
        first = time.perf_counter() - began
    server.kill()
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/records"))
    parser.add_argument("--groups", type=int, default=100_000)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    panoramas = write_panoramas(options.folder / "in", int((2 * options.groups) ** 0.5) + 3)
    output = options.folder / "out"
    names = find_panoramas([panoramas])
    plan = Plan(names, digests(names), 0, OPTIONS, WEIGHTS, str(output))
    store = FolderStore(output)
    store.write_json("dataset.json", plan.manifest())
    records, memory, record = Records(store), Memory(), example()
    print(f"a record has {len(json.dumps(record)):,} bytes of JSON\n")
    print("groups recorded  median ms to record one  mean ms, closing a thousand included")
    for size in (100, 10_000, options.groups):
        every = list(grow(records, memory, record, size))
        last = every[-MEASURED:]
        mean_ms = statistics.mean(every[-BLOCK:]) * 1e3
        print(f"{size:>15,} {median_ms(last):>24.2f} {mean_ms:>40.2f}", flush=True)
    first, whole = resume(output, panoramas, options.groups)
    print(f"\nresumed: first new group after {first:.1f} s; results.json whole after {whole:.1f} s")
    for path in (output / "records").glob("*.closed.json"):
        path.unlink()
    (output / "summary.json").unlink()
    first, whole = resume(output, panoramas, options.groups + 5)
    print(f"the same without what sums thousands up: {first:.1f} s; {whole:.1f} s")


if __name__ == "__main__":
    main()
