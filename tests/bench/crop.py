"""How long a crop takes: one on one thread, and the 160 of a panorama on all cores.

python tests/bench/crop.py
"""

import statistics
import time

import cv2
import numpy as np
import script

from panotriton.pipeline.camera import Camera, Sphere, sample_cameras


def median_ms(work, runs):
    """Median wall time of one call in ms, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def measure(runs, cores):
    """[crops, threads, ms] a row."""
    cv2.setNumThreads(1)
    panorama = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    sphere = Sphere(panorama)
    cameras = [
        Camera.from_array(row) for s in range(10) for row in sample_cameras(s)[0].reshape(-1, 5)
    ]
    out = np.empty((len(cameras), 512, 512, 3), np.uint8)
    few = max(1, runs // 10)
    return [
        [1, 1, median_ms(lambda: sphere.crops(cameras[:1], out[:1]), runs)],
        [len(cameras), 1, median_ms(lambda: sphere.crops(cameras, out), few)],
        [len(cameras), cores, median_ms(lambda: sphere.crops(cameras, out, threads=cores), few)],
    ]


def markdown(rows):
    """One row per number of crops and threads."""
    cells = [(n, threads, f"{ms:.3g}", f"{ms / n:.2f}") for n, threads, ms in rows]
    return script.table(("crops of 512×512", "threads", "ms", "ms per crop"), cells)


def main():
    """Measure and print a Markdown table."""
    chosen = script.options(__doc__)
    rows = measure(10 if chosen.quick else 50, script.cores())
    script.finish(chosen, {"rows": rows}, markdown(rows))


if __name__ == "__main__":
    script.run(main)
