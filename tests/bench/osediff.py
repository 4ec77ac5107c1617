"""OSEDiff's tiles: what they change, what memory they take, and what sharing batches gains.

    python tests/bench/osediff.py                   about 8 minutes on 2 cores
    python tests/bench/osediff.py --full-random     full-size random networks too: 20 minutes, 15 GB of disk

Seams: tiled against untiled, near the tiles' borders and elsewhere. Memory: of the whole server while it
super-resolves, sampled ten times a second. Batches: of the UNet, asked one tile at a time and eight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import counters
import cv2
import numpy as np
import psutil
import script
import tritonclient.grpc as triton
from numpy.typing import NDArray

from panotriton import Client
from panotriton.local import Upscaler
from panotriton.osediff import TileBlend
from panotriton.server import LocalServer
from panotriton.super_resolution import Limits

U8 = NDArray[np.uint8]

UNTILED = 1 << 20  # latents a side, and more than any image here has
BAND_PX = 8  # either side of a border
OSEDIFF = (
    "osediff",
    "osediff_text_encoder",
    "osediff_vae_encoder",
    "osediff_unet",
    "osediff_vae_decoder",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full-random", action="store_true", help="export and run random weights of full size"
    )


def natural(height: int, width: int) -> U8:
    """A panorama, resized."""
    image = cv2.cvtColor(cv2.imread(str(script.PANORAMAS / "city.jpg")), cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def gradient(height: int, width: int) -> U8:
    """Where a seam would be seen first: slow ramps in all directions."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x / width, y / height, (x + y) / (width + height)]
    return (40 + 170 * np.stack(planes, -1)).astype(np.uint8)


@contextlib.contextmanager
def retiled(repository: Path, latent_tile: int) -> Iterator[Path]:
    """The repository with another tile size; the graphs stay where they are."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(repository, copy, symlinks=True, copy_function=_link)
        settings = copy / "osediff" / "1" / "osediff.json"
        content = {**json.loads(settings.read_text()), "latent_tile": latent_tile}
        settings.unlink()
        settings.write_text(json.dumps(content))
        yield copy


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source) if _same_disk(source, target) else shutil.copy2(source, target)


def _same_disk(source: str, target: str) -> bool:
    return Path(source).stat().st_dev == Path(target).parent.stat().st_dev


def upscaled(repository: Path, image: U8, latent_tile: int, limits: Limits) -> U8:
    """One image at upscale 1 through the graphs in this process."""
    with retiled(repository, latent_tile) as folder:
        sharp: U8 = Upscaler(folder, limits=limits).upscale(image, upscale=1).numpy()
    return sharp


def border_mask(height: int, width: int, lines: tuple[set[int], set[int]]) -> NDArray[np.bool_]:
    """Pixels within BAND_PX of a border at the given rows and columns."""
    mask = np.zeros((height, width), bool)
    for y in lines[0]:
        mask[max(y - BAND_PX, 0) : y + BAND_PX] = True
    for x in lines[1]:
        mask[:, max(x - BAND_PX, 0) : x + BAND_PX] = True
    return mask


def latent_borders(shape: tuple[int, int], tile: int, overlap: int, f: int) -> tuple[set[int], ...]:
    """Rows and columns, in pixels, where a latent tile begins or ends inside the image."""
    height, width = (side // f for side in shape)
    blend = TileBlend((1, height, width), tile, overlap)
    return tuple(
        {edge * f for start in starts for edge in (start, start + blend.tile) if 0 < edge < side}
        for starts, side in zip(
            map(set, zip(*blend.positions, strict=True)), (height, width), strict=True
        )
    )


def vae_borders(shape: tuple[int, int]) -> tuple[set[int], ...]:
    """Rows and columns where one VAE tile's pixels follow another's."""
    return tuple(set(range(1024, side, 1024)) for side in shape)


def seam_row(name: str, tiles: str, tiled: U8, whole: U8, lines: Any) -> list[Any]:
    """Mean absolute difference near the borders and elsewhere, the largest, and steps across borders."""
    difference = np.abs(tiled.astype(np.int16) - whole).mean(-1)  # (H, W)
    near = border_mask(difference.shape[0], difference.shape[1], lines)
    return [
        f"{name}, {tiles}",
        f"{difference[near].mean():.4f}",
        f"{difference[~near].mean():.4f}",
        int(np.abs(tiled.astype(np.int16) - whole).max()),
        f"{step(tiled, lines):.3f}",
        f"{step(whole, lines):.3f}",
    ]


def step(image: U8, lines: tuple[set[int], set[int]]) -> float:
    """Mean grey-level step from one side of the border lines to the other: a seam would raise it."""
    grey = image.astype(np.float32).mean(-1)
    rows = [np.abs(grey[y] - grey[y - 1]).mean() for y in lines[0]]
    columns = [np.abs(grey[:, x] - grey[:, x - 1]).mean() for x in lines[1]]
    return float(np.mean(rows + columns))


def seams(repository: Path, quick: bool) -> str:
    """Tiled against untiled on a gradient and on a photograph, 2048×1024."""
    settings = json.loads((repository / "osediff" / "1" / "osediff.json").read_text())
    tile, overlap = 96, settings["latent_overlap"]
    f = settings["vae_scale_factor"]
    shape = (256, 512) if quick else (1024, 2048)
    whole_limits = Limits(images_in_flight=1, vae_untiled_max_pixels=1 << 40)
    rows = []
    for name, make in (("gradient", gradient), ("photograph", natural)):
        image = make(*shape)
        whole = upscaled(repository, image, UNTILED, whole_limits)
        tiled = upscaled(repository, image, tile, whole_limits)
        lines = latent_borders(shape, tile, overlap, f)
        rows.append(seam_row(name, f"UNet tiles of {tile} latents", tiled, whole, lines))
        if not quick:
            by_vae = upscaled(repository, image, UNTILED, Limits(1, 16, 0))
            rows.append(seam_row(name, "VAE tiles of 1024 px", by_vae, whole, vae_borders(shape)))
    headings = [
        "image, tiles",
        "near borders",
        "elsewhere",
        "largest",
        "step, tiled",
        "step, untiled",
    ]
    return script.table(headings, rows)


class Memory:
    """The largest proportional memory of a process tree while the block runs, in MB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_mb = 0.0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.peak_mb = max(self.peak_mb, self._now_mb())

    def _now_mb(self) -> float:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 1e6


def memory(repository: Path, quick: bool) -> str:
    """Of a fresh server for each image and tile size, so that nothing is left from the one before."""
    sizes = [(256, 512)] if quick else [(1024, 2048), (1024, 4096), (2048, 4096)]
    settings = json.loads((repository / "osediff" / "1" / "osediff.json").read_text())
    tile = settings["latent_tile"]
    rows = []
    for size, side in [*((size, tile) for size in sizes), (sizes[-1], 96)]:
        rows.append(memory_row(repository, size, side, settings))
    headings = [
        "input, upscale 2",
        "UNet tiles",
        "before, MB",
        "peak, MB",
        "more, bytes a pixel",
        "s",
    ]
    return script.table(headings, rows)


def memory_row(
    repository: Path, size: tuple[int, int], tile: int, settings: dict[str, Any]
) -> list[Any]:
    """One image through a server of its own."""
    height, width = (2 * side // settings["vae_scale_factor"] for side in size)
    tiles = len(TileBlend((1, height, width), tile, settings["latent_overlap"]).positions)
    with (
        retiled(repository, tile) as folder,
        LocalServer(folder, load_models=list(OSEDIFF)) as server,
        Client(server.grpc_url) as client,
    ):
        client.upscale(natural(64, 128))  # the networks' own memory
        with Memory(server.pid) as idle:
            time.sleep(0.5)
        with Memory(server.pid) as busy:
            began = time.perf_counter()
            client.upscale(natural(*size))
            seconds = time.perf_counter() - began
    more = (busy.peak_mb - idle.peak_mb) * 1e6 / (4 * size[0] * size[1])
    name = f"{size[1]}×{size[0]}"
    return [
        name,
        tiles,
        f"{idle.peak_mb:.0f}",
        f"{busy.peak_mb:.0f}",
        f"{more:.0f}",
        f"{seconds:.0f}",
    ]


def batches(repository: Path, quick: bool) -> str:
    """Tiles a second through the server's UNet, one in flight and eight."""
    settings = json.loads((repository / "osediff" / "1" / "osediff.json").read_text())
    rows = []
    with LocalServer(repository, load_models=["osediff_unet"]) as server:
        for side in (96, settings["latent_tile"]):
            rates = {}
            for in_flight in (1, 8):
                rates[in_flight], sizes = unet_rate(server, settings, side, in_flight, quick)
                ratio = rates[in_flight] / rates[1]
                rows.append(
                    [f"{side}×{side}", in_flight, f"{rates[in_flight]:.1f}", f"{ratio:.2f}", sizes]
                )
    return script.table(
        ["tile, latents", "in flight", "tiles/s", "ratio", "rows a call: calls"], rows
    )


def unet_rate(
    server: LocalServer, settings: dict[str, Any], side: int, in_flight: int, quick: bool
) -> tuple[float, str]:
    """Tiles a second over some seconds, and the sizes of the batches that the network saw."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config("osediff_unet", as_json=True)["config"]
        width = int(next(io for io in config["input"] if io["name"] == "PROMPT_EMBEDS")["dims"][1])
        inputs = []
        for name, shape in (
            ("LATENT", (1, settings["latent_channels"], side, side)),
            ("PROMPT_EMBEDS", (1, 77, width)),
        ):
            inputs.append(triton.InferInput(name, shape, "FP32"))
            noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            inputs[-1].set_data_from_numpy(noise)

        def ask(_: int) -> None:
            client.infer("osediff_unet", inputs)

        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(ask, range(2 * in_flight)))  # warm
            before = counters.read(server.grpc_url)
            count = in_flight if quick else measured_count(ask, in_flight)
            began = time.perf_counter()
            list(pool.map(ask, range(count)))
            seconds = time.perf_counter() - began
    sizes = counters.since(counters.read(server.grpc_url), before)["osediff_unet"].batches
    text = ", ".join(f"{rows}: {calls}" for rows, calls in sorted(sizes.items()) if calls)
    return count / seconds, text


def measured_count(ask: Callable[[int], None], in_flight: int) -> int:
    """As many calls as take about ten seconds, a multiple of what is in flight."""
    began = time.perf_counter()
    ask(0)
    return max(2, round(10 / (time.perf_counter() - began) / in_flight)) * in_flight


def full_random(quick: bool) -> str:
    """Export the architecture of Stable Diffusion 2.1-base and super-resolve one 512×512 image."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        command = [sys.executable, "-m", "panotriton", "export", "osediff"]
        command += ["--preset", "full-random", "--output", str(repository)]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        rows.append(["export and comparison with PyTorch", f"{seconds:.0f}", f"{peak:.1f}"])
        weights = sum(path.stat().st_size for path in repository.rglob("*.data")) / 1e9
        with Memory(psutil.Process().pid) as used:
            began = time.perf_counter()
            with LocalServer(repository, load_models=list(OSEDIFF), start_timeout_s=600) as server:
                rows.append(
                    [
                        "start of the server",
                        f"{time.perf_counter() - began:.0f}",
                        f"{used.peak_mb / 1e3:.1f}",
                    ]
                )
                with Client(server.grpc_url, timeout_s=1800) as client:
                    for run in ("first", "second"):
                        began = time.perf_counter()
                        client.upscale(natural(512, 512), upscale=1)
                        seconds = time.perf_counter() - began
                        rows.append(
                            [f"512×512, {run}", f"{seconds:.1f}", f"{used.peak_mb / 1e3:.1f}"]
                        )
    text = script.table(["step", "s", "peak so far, GB"], rows)
    return f"{text}\n\nWeights beside the graphs: {weights:.1f} GB."


def main() -> None:
    """Measure and print."""
    chosen = script.options(__doc__ or "", arguments)
    repository = script.exported(chosen.repository)
    parts = {"Seams": seams, "Memory": memory, "Batches": batches}
    texts = {name: part(repository, chosen.quick) for name, part in parts.items()}
    if chosen.full_random:
        texts["Full size"] = full_random(chosen.quick)
    markdown = "\n\n".join(f"### {name}\n\n{text}" for name, text in texts.items())
    script.finish(chosen, {"machine": script.machine(), "tables": texts}, markdown)


if __name__ == "__main__":
    script.run(main)
