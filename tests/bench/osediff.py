"""OSEDiff's tiles: what they change, what memory they take, and what sharing batches gains.

    python tests/bench/osediff.py    about 8 minutes on 2 cores

Seams: tiled against untiled, near the tiles' borders and elsewhere. Memory: of the whole server while it
super-resolves, sampled ten times a second. Batches: of the UNet, asked one tile at a time and eight.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import counters
import cv2
import numpy as np
import script
import tritonclient.grpc as triton
from memory_use import Memory
from numpy.typing import NDArray

from panotriton import Client
from panotriton.local import Upscaler
from panotriton.models.super_resolution import Limits
from panotriton.models.tiles import TileBlend
from panotriton.pipeline.networks import OSEDIFF
from panotriton.server.launch import LocalServer

U8 = NDArray[np.uint8]

UNTILED = 1 << 20  # latents a side, and more than any image here has
BAND_PX = 8  # either side of a border
MODELS = ("osediff", *OSEDIFF.required)


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
        "more, bytes per pixel",
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
        LocalServer(folder, load_models=list(MODELS)) as server,
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
    with LocalServer(repository, load_models=[OSEDIFF.denoiser]) as server:
        for side in (96, settings["latent_tile"]):
            rates = {}
            for in_flight in (1, 8):
                rates[in_flight], sizes = unet_rate(server, settings, side, in_flight, quick)
                ratio = rates[in_flight] / rates[1]
                rows.append(
                    [f"{side}×{side}", in_flight, f"{rates[in_flight]:.1f}", f"{ratio:.2f}", sizes]
                )
    return script.table(
        ["tile, latents", "in flight", "tiles/s", "ratio", "rows per call: calls"], rows
    )


def unet_rate(
    server: LocalServer, settings: dict[str, Any], side: int, in_flight: int, quick: bool
) -> tuple[float, str]:
    """Tiles a second over some seconds, and the sizes of the batches that the network saw."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config(OSEDIFF.denoiser, as_json=True)["config"]
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
            client.infer(OSEDIFF.denoiser, inputs)

        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(ask, range(2 * in_flight)))  # warm
            before = counters.read(server.grpc_url)
            count = in_flight if quick else measured_count(ask, in_flight)
            began = time.perf_counter()
            list(pool.map(ask, range(count)))
            seconds = time.perf_counter() - began
    sizes = counters.since(counters.read(server.grpc_url), before)[OSEDIFF.denoiser].batches
    text = ", ".join(f"{rows}: {calls}" for rows, calls in sorted(sizes.items()) if calls)
    return count / seconds, text


def measured_count(ask: Callable[[int], None], in_flight: int) -> int:
    """As many calls as take about ten seconds, a multiple of what is in flight."""
    began = time.perf_counter()
    ask(0)
    return max(2, round(10 / (time.perf_counter() - began) / in_flight)) * in_flight


def main() -> None:
    """Measure and print."""
    chosen = script.options(__doc__ or "")
    repository = script.exported(chosen.repository)
    parts = {"Seams": seams, "Memory": memory, "Batches": batches}
    texts = {name: part(repository, chosen.quick) for name, part in parts.items()}
    markdown = "\n\n".join(f"### {name}\n\n{text}" for name, text in texts.items())
    script.finish(chosen, {"machine": script.machine(), "tables": texts}, markdown)


if __name__ == "__main__":
    script.run(main)
