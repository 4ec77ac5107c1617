"""A server on the GPU: one image, images of several sizes in turn, groups of full size, and how busy it is.

python tests/gpu/serving.py --repository R
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import record
from record import script

from panotriton import Client
from panotriton.server.launch import LocalServer

# (height, width, upscale); the kit's repository expects them.
SIZES = ((512, 512, 1), (512, 512, 2), (512, 1024, 2), (384, 512, 2), (768, 1280, 1))
SMALL_SIZES = ((64, 64, 1), (64, 80, 1), (80, 64, 2), (72, 96, 1), (96, 64, 1))
AT_ONCE = (2, 3, 4)


class Watched:
    """Utilisation and memory of the first GPU while entered, five times a second; nothing without one."""

    def __enter__(self) -> Watched:
        self._rows: list[tuple[float, float]] = []
        self._process: Any = None
        if script.gpus():
            fields = "utilization.gpu,memory.used"
            command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "-lms", "200"]
            command += ["--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            busy, used = line.split(",")
            self._rows.append((float(busy), float(used)))

    def found(self) -> dict[str, Any]:
        """busy: the mean of the utilisation that the driver reports; memory at its highest."""
        if not self._rows:
            return {}
        busy, used = zip(*self._rows, strict=True)
        return {"gpu_busy_%": round(statistics.mean(busy)), "gpu_memory_mib": max(used)}


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_image(client: Client, quick: bool) -> dict[str, float]:
    image = picture(*(SMALL_SIZES if quick else SIZES)[0][:2])
    return record.timed(lambda: client.upscale(image, upscale=1), runs=2 if quick else 20)


def picture(height: int, width: int) -> Any:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def several_sizes(client: Client, quick: bool) -> dict[str, Any]:
    """Each of five sizes alone, then ten images in random order: how much longer each takes."""
    sizes = SMALL_SIZES if quick else SIZES
    images = [picture(height, width) for height, width, _ in sizes]

    def send(index: int) -> float:
        return seconds(lambda: client.upscale(images[index], upscale=sizes[index][2]))

    alone = [statistics.median([send(i) for _ in range(2 if quick else 4)][1:]) for i in range(5)]
    order = np.random.default_rng(0).permutation([*range(5)] * 2)
    ratios = [send(int(index)) / alone[index] for index in order]
    return {
        "alone_ms": {
            f"{h}x{w}@{by}": round(each * 1e3, 1)
            for (h, w, by), each in zip(sizes, alone, strict=True)
        },
        "ratios": [round(each, 2) for each in ratios],
        "worst_ratio": round(max(ratios), 2),
    }


def by_cuda_memory(client: Client) -> Any:
    """One image that stays on the GPU in and out: whether it is what gRPC returns, and ms of both ways."""
    if not script.gpus():
        return "no GPU here"
    import torch  # noqa: PLC0415, of this part alone

    image = picture(512, 512)
    planes = torch.from_numpy(image).cuda().permute(2, 0, 1).float() / 255  # (3, H, W)
    with client.shared_memory(64 << 20, "cuda") as memory:
        through, plain, again = (
            client.upscale(planes, upscale=1, via=memory),
            client.upscale(planes, upscale=1),
            client.upscale(planes, upscale=1),
        )
        ways = {
            "by it": lambda: client.upscale(planes, upscale=1, via=memory),
            "by gRPC": lambda: client.upscale(planes, upscale=1),
        }
        return {
            "on the GPU": bool(through.pixels.is_cuda),
            "equals gRPC": bool(np.array_equal(through.numpy(), plain.numpy())),
            # A GPU's group norm adds in any order: two computations of one image may differ, too.
            "grey levels from gRPC": levels(through.numpy(), plain.numpy()),
            "grey levels between two by gRPC": levels(again.numpy(), plain.numpy()),
            **{name: record.timed(work, runs=10) for name, work in ways.items()},
            "bytes copied here": {name: copied_bytes(traced(work)) for name, work in ways.items()},
        }


def levels(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference."""
    return int(np.abs(one.astype(int) - other).max())


def traced(work: Any) -> dict[str, Any]:
    """What the profiler sees of this process's use of the GPU meanwhile, as a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415, of this part alone

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return dict(json.loads(path.read_text()))


def copied_bytes(trace: dict[str, Any]) -> dict[str, int]:
    """Bytes between this process and the GPU, each way, and inside it: 0, 0 and some where none is copied."""
    found = {"HtoD": 0, "DtoH": 0, "DtoD": 0}
    for event in trace["traceEvents"]:
        if event.get("cat") == "gpu_memcpy":
            found[event["name"].split()[1]] += int(event["args"]["bytes"])
    return found


def groups(client: Client, count: int, quick: bool) -> dict[str, Any]:
    """So many groups at once, all intervals kept: 16 pairs and 144 views each."""
    request = {"crop_size": 64 if quick else 512, "interpolations": 1 if quick else 9}

    def one(seed: int) -> int:
        return int(client.process(*script.GROUP, seed=seed, threshold=0.0, **request).image_count)

    with Watched() as watched, ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        images = list(pool.map(one, range(count)))
        spent = time.perf_counter() - began
    return {"s": round(spent, 2), "groups_a_minute": round(count / spent * 60, 2),
            "images": images, **watched.found()}  # fmt: skip


def main() -> None:
    """Measure what callers see."""
    chosen = record.options(__doc__)
    found = record.Record(chosen.json)
    began = time.perf_counter()
    log = Path(chosen.json).with_suffix(".log") if chosen.json else None
    with LocalServer(chosen.repository, start_timeout_s=240, log_file=log) as server:
        found["ready_s"] = round(time.perf_counter() - began, 1)
        with Client(server.grpc_url, timeout_s=300) as client:
            found.attempt("512 px", lambda: one_image(client, chosen.quick))
            found.attempt("group, first", lambda: groups(client, 1, chosen.quick))
            found.attempt("group, second", lambda: groups(client, 1, chosen.quick))
            found.attempt("sizes in random order", lambda: several_sizes(client, chosen.quick))
            found.attempt("CUDA shared memory", lambda: by_cuda_memory(client))
            for count in AT_ONCE[: 1 if chosen.quick else None]:
                found.attempt(
                    f"{count} groups", lambda count=count: groups(client, count, chosen.quick)
                )
        late = [line for line in server.log_text().splitlines() if "not an expected shape" in line]
        found["shapes opened late"] = [line.split("] ")[-1][:160] for line in late]


if __name__ == "__main__":
    script.run(main)
