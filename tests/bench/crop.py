"""How long a crop takes: one on one thread, and the 160 of a panorama on all cores.

"own": cut from a panorama of 4096×2048 at its own resolution (`sphere_size` 0), which is prepared once.

python tests/bench/crop.py
"""

import statistics
import time
from functools import partial

import cv2
import numpy as np
import script

from panotriton.pipeline.camera import Camera, Sphere, sample_cameras


def timed_ms(work, runs):
    """Median and least wall time of one call in ms, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times), min(times)


def measure(runs, cores, many):
    """[crops, threads, median ms, least ms, sphere] a row; `many` crops where it is not one."""
    cv2.setNumThreads(1)
    panorama = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    large = cv2.resize(panorama, (4096, 2048), interpolation=cv2.INTER_CUBIC)
    cameras = [
        Camera.from_array(row) for s in range(10) for row in sample_cameras(s)[0].reshape(-1, 5)
    ][:many]
    out = np.empty((len(cameras), 512, 512, 3), np.uint8)
    few = max(1, runs // 10)
    rows = []
    for name, sphere in (("512", Sphere(panorama)), ("own", Sphere(large, sphere_size=0))):
        for count, threads, times in ((1, 1, runs), (many, 1, few), (many, cores, few)):
            work = partial(sphere.crops, cameras[:count], out[:count], threads=threads)
            rows.append([count, threads, *timed_ms(work, times), name])
    return rows


def markdown(rows):
    """One row per number of crops and threads."""
    cells = [
        (
            sphere,
            n,
            threads,
            f"{ms:.3g}",
            f"{ms / n:.2f}",
            f"{least / n:.2f}",
        )
        for n, threads, ms, least, sphere in rows
    ]
    heads = ("sphere", "crops of 512×512", "threads", "ms", "ms per crop", "the least of all runs")
    return script.table(heads, cells)


def main():
    """Measure and print a Markdown table."""
    chosen = script.options(__doc__)
    rows = measure(*((2, script.cores(), 8) if chosen.quick else (50, script.cores(), 160)))
    script.finish(chosen, {"rows": rows}, markdown(rows))


if __name__ == "__main__":
    script.run(main)
