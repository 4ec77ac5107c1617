"""What a group costs at real sizes, and how far each network is from the limit of a machine.

    python tests/bench/cost.py

FLOPs are counted, not estimated: the networks of Stable Diffusion 2.1-base and Qwen2.5-VL-7B are built on
torch's meta device, without weights, and run under its FLOP counter. Bytes are each layer's inputs, outputs
and weights, once, in fp16: what moves when no two layers are fused and attention keeps its scores to itself.
The floor is the larger of FLOPs / peak and bytes / bandwidth; no program can be faster without computing
less, fewer bits or fusing layers. The machine's peaks are measured here; those of GPUs are published:

- A100 80 GB SXM: 312 TFLOP/s dense fp16, 2,039 GB/s (NVIDIA A100 datasheet, 2021)
- H100 SXM: 989 TFLOP/s dense fp16, 3,350 GB/s (NVIDIA H100 datasheet, 2023)

For the small preset, the exported networks are run alone, by what serves them, on all cores, one batch
after the other, and compared with the same floor in fp32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import script
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from qwen_vl_utils.vision_process import smart_resize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from panotriton.local import open_network
from panotriton_export.osediff.random_sd import UNET, VAE, vae_blocks
from panotriton_export.presets import LATENT_TILE, SMALL

PUBLISHED = {"A100": (312e12, 2039e9), "H100": (989e12, 3350e9)}

PAIRS, VIEWS = 16, 144
PAIR, VIEW = (1024, 2048), (1024, 1024)  # px, after upscaling by 2
PAIR_TILES, VIEW_TILES = 8, 4  # of the UNet
UNET_BATCH, VAE_BATCH, QWEN_BATCH = 8, 4, 16

# Replies are not counted but assumed: six short lines, and three sentences.
SCORE_TOKENS, DESCRIPTION_TOKENS, DESCRIBED = 60, 80, 8
CHARACTERS_PER_TOKEN = 4.2
# Qwen2.5-VL-7B-Instruct's config.json.
QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes, of a call or of a group."""

    flops: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.nbytes * times)

    def floor_s(self, peak: float, bandwidth: float) -> float:
        """Seconds at least, of FLOP/s and bytes/s."""
        return max(self.flops / peak, self.nbytes / bandwidth)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@torch.no_grad()
def count(network: nn.Module, run: Callable[[], Any], width: int = 2) -> Work:
    """The work of one call; width: bytes per value."""
    moved = 0

    def layer_done(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        values = [each.numel() for each in (*inputs, output) if isinstance(each, Tensor)]
        moved += width * (sum(values) + sum(p.numel() for p in layer.parameters()))

    leaves = [module for module in network.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(layer_done) for leaf in leaves]
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Work(counter.get_total_flops(), moved)


def super_resolution() -> dict[str, Work]:
    """A group's work of OSEDiff's networks; the text encoder runs once per prompt and is left out."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET["sd21"], use_linear_projection=True)
        vae = AutoencoderKL(**vae_blocks(VAE["sd21"]))
    tiles = PAIRS * PAIR_TILES + VIEWS * VIEW_TILES
    return {
        "vae_encoder": _vae(vae.encoder, 3, 1),
        "unet": count(unet, lambda: _denoise(unet, UNET_BATCH, 96, 1024)) * (tiles / UNET_BATCH),
        "vae_decoder": _vae(vae.decoder, 4, 8),
    }


def _vae(half: nn.Module, channels: int, factor: int) -> Work:
    """Encoder (factor 1) or decoder (8 px per latent) over all pairs and views of a group."""
    total = Work()
    for images, (height, width) in ((PAIRS, PAIR), (VIEWS, VIEW)):
        shape = (VAE_BATCH, channels, height // factor, width // factor)
        total += count(half, lambda shape=shape: half(meta(*shape))) * (images / VAE_BATCH)
    return total


def _denoise(unet: nn.Module, batch: int, tile: int, width: int) -> Any:
    tiles, embeds = meta(batch, unet.config.in_channels, tile, tile), meta(batch, 77, width)
    return unet(tiles, meta(batch), encoder_hidden_states=embeds)


def qwen() -> dict[str, Work]:
    """A group's work of Qwen2.5-VL-7B: 16 pairs scored, 8 views described."""
    config = Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    asked = [
        (PAIR, _prompt_tokens("quality"), SCORE_TOKENS, PAIRS, QWEN_BATCH),
        (VIEW, _prompt_tokens("describe"), DESCRIPTION_TOKENS, DESCRIBED, DESCRIBED),
    ]
    total = {"qwen vision": Work(), "qwen prefill": Work(), "qwen decode": Work()}
    for size, prompt, reply, images, batch in asked:
        patches = patch_count(*size)
        length = patches // 4 + prompt
        total["qwen vision"] += vision(model.model.visual, patches) * images
        first, step = _language(model, batch, length)
        total["qwen prefill"] += first * (images / batch)
        total["qwen decode"] += step * (reply * images / batch)
    return total


def vision(tower: nn.Module, patches: int) -> Work:
    """One image of so many patches. Which patches share a window depends on data, which meta tensors

    lack: the linear layers are counted as all others, attention by its formula, 4 · n · keys · width.
    """

    def run() -> None:
        for layer in tower.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer(meta(patches, layer.in_features))
        for layer in tower.merger.modules():
            if isinstance(layer, nn.Linear):
                layer(meta(patches // 4, layer.in_features))

    config = tower.config
    whole = len(config.fullatt_block_indexes)
    keys = whole * patches + (config.depth - whole) * (config.window_size // config.patch_size) ** 2
    return count(tower, run) + Work(4 * patches * keys * config.hidden_size)


def _language(model: Any, batch: int, length: int) -> tuple[Work, Work]:
    """Prefill of a batch of prompts, and one token more for each: (batch, length) tokens."""
    text, cache = model.model.language_model, []

    def step(tokens: int) -> None:
        embeds, places = meta(batch, tokens, 3584), meta(3, batch, tokens).long()
        past = cache[-1] if cache else None
        out = text(inputs_embeds=embeds, position_ids=places, past_key_values=past, use_cache=True)
        cache.append(out.past_key_values)
        model.lm_head(out.last_hidden_state[:, -1:])

    first = count(model, lambda: step(length))
    read = 2 * batch * length * 2 * 4 * 128 * 28  # keys and values, fp16, 4 heads of 128, 28 layers
    return first, count(model, lambda: step(1)) + Work(0, read)


def patch_count(height: int, width: int) -> int:
    """14 px patches of an image as Qwen's processor resizes it."""
    down, across = smart_resize(height, width, 28)
    return down * across // 14**2


def _prompt_tokens(name: str) -> int:
    text = script.ROOT / "client" / "panotriton" / "prompts" / f"{name}.txt"
    return round(len(text.read_text()) / CHARACTERS_PER_TOKEN)


def peaks(
    size: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Measured FLOP/s of a square matmul and bytes/s of a copy, read and write counted: best of 5."""
    matrix = torch.rand(size, size, device=device).to(dtype)
    source = torch.zeros(1 << 26, device=device)
    target = torch.zeros_like(source)
    matmul_s = _best_s(lambda: matrix @ matrix, device)
    copy_s = _best_s(lambda: target.copy_(source), device)
    return 2 * size**3 / matmul_s, 2 * source.nbytes / copy_s


def _best_s(work: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first warms up


def small(repository: Path, peak: tuple[float, float], runs: int) -> dict[str, dict[str, float]]:
    """The small preset's networks at a batch each: seconds measured and at least, per image or tile."""
    base = SMALL / "osediff" / "base"
    unet = UNet2DConditionModel.from_config(_config(base / "unet"))
    vae = AutoencoderKL.from_config(_config(base / "vae"))
    unet, vae = unet.to("meta"), vae.to("meta")
    height, width, tile, channels = *PAIR, LATENT_TILE, vae.config.latent_channels
    latent = (1, channels, height // 2, width // 2)
    embeds = np.zeros((UNET_BATCH, 77, unet.config.cross_attention_dim), np.float32)
    latents = np.zeros((UNET_BATCH, channels, tile, tile), np.float32)
    plans = {
        "vae_encoder": (
            {"IMAGE": np.zeros((1, height, width, 3), np.uint8)},
            count(vae.encoder, lambda: vae.encoder(meta(1, 3, height, width)), 4),
            1,
        ),
        "unet": (
            {"LATENT": latents, "PROMPT_EMBEDS": embeds},
            count(unet, lambda: _denoise(unet, UNET_BATCH, tile, embeds.shape[2]), 4),
            UNET_BATCH,
        ),
        "vae_decoder": (
            {"LATENT": np.zeros(latent, np.float32)},
            count(vae.decoder, lambda: vae.decoder(meta(*latent)), 4),
            1,
        ),
    }
    return {
        name: {
            "measured_s": _run_s(repository / f"osediff_{name}", feeds, runs) / rows,
            "floor_s": work.floor_s(*peak) / rows,
            "gflops": work.flops / rows / 1e9,
            "gbytes": work.nbytes / rows / 1e9,
        }
        for name, (feeds, work, rows) in plans.items()
    }


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _run_s(model: Path, feeds: dict[str, Any], runs: int) -> float:
    """Best seconds of an exported network on all cores, after a run that warms up."""
    network = open_network(model, script.cores())
    wanted = [network.get_outputs()[0].name]
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        network.run(wanted, feeds)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def measure(repository: Path, quick: bool) -> dict[str, Any]:
    """Both parts: counted at real sizes, and measured for the small preset."""
    torch.set_num_threads(script.cores())
    here = peaks(512 if quick else 2048)
    machines = {f"these {script.cores()} cores, fp32": here}
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, measured"
        machines[name] = peaks(8192, "cuda", torch.float16)
    machines |= PUBLISHED
    works = super_resolution() | qwen()
    return {
        "machines": {name: list(peak) for name, peak in machines.items()},
        "components": {
            name: {
                "tflops": work.flops / 1e12,
                "gbytes": work.nbytes / 1e9,
                "floor_s": {machine: work.floor_s(*peak) for machine, peak in machines.items()},
            }
            for name, work in works.items()
        },
        "small": small(repository, here, 1 if quick else 3),
    }


def markdown(result: dict[str, Any]) -> str:
    """Real sizes by machine, then the small preset."""
    machines = result["machines"]
    rates = [
        f"{peak / 1e12:.3g} TFLOP/s, {rate / 1e9:.0f} GB/s" for peak, rate in machines.values()
    ]
    parts = result["components"]
    rows = [_row(name, part) for name, part in parts.items()]
    total = {
        "tflops": sum(part["tflops"] for part in parts.values()),
        "gbytes": sum(part["gbytes"] for part in parts.values()),
        "floor_s": {
            name: sum(part["floor_s"][name] for part in parts.values()) for name in machines
        },
    }
    rows += [_row("**all**", total), ("peaks", "", "", *rates)]
    real = script.table(("one group", "TFLOP", "GB", *(f"{name}: s" for name in machines)), rows)
    return f"{_assumed()}\n\n{real}\n\n{_small(result['small'])}"


def _row(name: str, part: dict[str, Any]) -> tuple[str, ...]:
    seconds = (
        f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in part["floor_s"].values()
    )
    return (name, f"{part['tflops']:,.0f}", f"{part['gbytes']:,.0f}", *seconds)


def _assumed() -> str:
    tiles = PAIRS * PAIR_TILES + VIEWS * VIEW_TILES
    return (
        f"Real sizes: {PAIRS} pairs of 1024×2048 px, {VIEWS} in-between views of 1024×1024, {tiles} UNet "
        f"tiles of 96×96; all {DESCRIBED} intervals kept; replies of {SCORE_TOKENS} and "
        f"{DESCRIPTION_TOKENS} tokens are assumed. Bytes are of fp16."
    )


def _small(parts: dict[str, dict[str, float]]) -> str:
    rows = [
        (
            name,
            f"{part['gflops']:.2f}",
            f"{part['gbytes']:.2f}",
            f"{part['measured_s'] * 1e3:.0f}",
            f"{part['floor_s'] * 1e3:.0f}",
            f"{part['measured_s'] / part['floor_s']:.1f}",
        )
        for name, part in parts.items()
    ]
    about = "Small preset, a pair of 1024×2048 px or a tile of 288×288 latents, the network alone:"
    headings = ("network", "GFLOP", "GB", "measured ms", "floor ms", "measured / floor")
    return f"{about}\n\n{script.table(headings, rows)}"


def main() -> None:
    """Count, measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__)
    result = measure(script.exported(chosen.repository), chosen.quick)
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
