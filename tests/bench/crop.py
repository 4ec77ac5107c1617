"""How long a crop takes: one on one thread, and the 160 of a panorama on all cores.

python tests/bench/crop.py
"""

import os
import statistics
import time

import cv2
import numpy as np

from panotriton.camera import Camera, Sphere, sample_cameras

RUNS = 50


def median_ms(work, runs=RUNS):
    """Median wall time of one call in ms, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main():
    """Measure and print a Markdown table."""
    cv2.setNumThreads(1)
    cores = os.cpu_count() or 1
    panorama = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    sphere = Sphere(panorama)
    cameras = [
        Camera.from_array(row) for s in range(10) for row in sample_cameras(s)[0].reshape(-1, 5)
    ]
    out = np.empty((len(cameras), 512, 512, 3), np.uint8)
    single = median_ms(lambda: sphere.crops(cameras[:1], out[:1]))
    one = median_ms(lambda: sphere.crops(cameras, out), runs=5)
    all_cores = median_ms(lambda: sphere.crops(cameras, out, threads=cores), runs=5)
    print("| crops of 512×512 | threads | ms | ms a crop |\n|---|---|---|---|")
    print(f"| 1 | 1 | {single:.2f} | {single:.2f} |")
    print(f"| {len(cameras)} | 1 | {one:.0f} | {one / len(cameras):.2f} |")
    print(f"| {len(cameras)} | {cores} | {all_cores:.0f} | {all_cores / len(cameras):.2f} |")


if __name__ == "__main__":
    main()
