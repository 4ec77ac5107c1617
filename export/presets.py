"""Presets: repositories that can be built without any download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from panotriton.pipeline.networks import OSEDIFF
from panotriton.pipeline.scratch import PREFIX, Scratch
from panotriton_export.configs import find_engine, set_instances
from panotriton_export.osediff import export_osediff
from panotriton_export.osediff.random_sd import write_random
from panotriton_export.qwen import export_qwen

__all__ = ["export_full_random", "export_small", "write_small_checkpoint"]

SMALL = Path(__file__).parent / "small"
# The small VAE halves each side once, so its latents are 2 px: with this tile a pair has 8 tiles and an
# in-between view 4, as with Stable Diffusion's 8 px and 96.
LATENT_TILE = 288


def export_small(
    repository: Path, provider: str = "openvino", report: Callable[[str], None] = print
) -> None:
    """The small trained networks that come with the project, through the same code as real ones.

    provider: openvino, in bf16 where this CPU multiplies it, cpu, for servers without OpenVINO, or cuda; in
    the precision that is quickest here.
    Their model cards, export/small/*/README.md, say what they are and are not.
    """
    with Scratch(f"{PREFIX}small-") as work:
        checkpoint = write_small_checkpoint(work / "osediff.pkl")
        base = SMALL / "osediff" / "base"
        export_osediff(
            base,
            checkpoint,
            repository,
            provider=provider,
            precision=find_engine(provider).best_precision(),
            latent_tile=LATENT_TILE,
            with_code=True,
            report=report,
        )
    if not find_engine(provider).on_gpu:
        for model in (OSEDIFF.encoder, OSEDIFF.denoiser, OSEDIFF.decoder):
            set_instances(repository / model, 2)
    export_qwen(SMALL / "qwen", repository, copy=True, report=report)


def export_full_random(
    repository: Path, *, report: Callable[[str], None] = print, **options: Any
) -> None:
    """Stable Diffusion 2.1-base's architecture with seeded random weights: its cost, no pictures.

    options: of `export_osediff`. Takes 6 GB of disk beside the repository meanwhile.
    """
    repository.mkdir(parents=True, exist_ok=True)
    with Scratch(".full-random-", repository.parent) as work:
        report("writing random weights, 5.4 GB ...")
        checkpoint = write_random(work, "sd21")
        export_osediff(work, checkpoint, repository, with_code=True, report=report, **options)


def write_small_checkpoint(target: Path, folder: Path = SMALL / "osediff") -> Path:
    """The small adapters, kept as safetensors and JSON, as an osediff.pkl like the original's."""
    content: dict[str, Any] = json.loads((folder / "adapters.json").read_text())
    for name, tensor in load_file(folder / "adapters.safetensors").items():
        network, _, key = name.partition(".")  # unet.… or vae.…
        content.setdefault(f"state_dict_{network}", {})[key] = tensor
    torch.save(content, target)
    return target
