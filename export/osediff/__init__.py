"""OSEDiff: a Stable Diffusion 2.1-base folder and osediff.pkl → the repository's osediff models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import ExportError
from panotriton.models.input_shapes import input_shapes
from panotriton.models.osediff import Network
from panotriton.models.super_resolution import Limits
from panotriton.pipeline.files import TOKENIZER
from panotriton.pipeline.networks import OSEDIFF
from panotriton.pipeline.sizes import PIPELINE_SIZES, ImageSize
from panotriton.server.engines import CPU, Engine
from panotriton.server.repository import copy_model, copy_models
from panotriton_export.configs import (
    find_engine,
    fit_config,
    name_weights,
    read_config,
    set_engine,
    tiles_a_request,
)
from panotriton_export.front import front_folders, write_settings
from panotriton_export.graph import (
    Component,
    ParityResult,
    export_component,
)
from panotriton_export.half import compare_in_half
from panotriton_export.osediff.checkpoint import Checkpoint, open_checkpoint
from panotriton_export.osediff.fusions import fuse
from panotriton_export.osediff.reference import (
    LATENT_OVERLAP,
    LATENT_TILE,
    PROCESS_SIZE,
    from_checkpoint,
    super_resolve,
)
from panotriton_export.osediff.text_encoder import text_encoder_component
from panotriton_export.osediff.tokenizer import write_tokenizer
from panotriton_export.osediff.unet import unet_component
from panotriton_export.osediff.vae_decoder import vae_decoder_component
from panotriton_export.osediff.vae_encoder import vae_encoder_component
from panotriton_export.osediff.whole_image import check_distinct, psnr_db, run_graphs
from panotriton_export.pickles import CheckpointError

__all__ = [
    "CheckpointError",
    "ParityResult",
    "PlannedNetwork",
    "export_osediff",
    "write_network",
]

_LEAST_PSNR_DB = {"fp32": 50.0, "fp16": 35.0, "bf16": 35.0}
_TRIED = {"fp16": ("fp16", "fp32")}  # for the decoder
_PROMPT = "building, sky, tree, ,"
_HEADER = f"{'component':<22} {'shape':<18} {'differs':>8}  {'limit':>7}"


def export_osediff(
    base: Path,
    checkpoint: Path,
    repository: Path,
    *,
    precision: str = "fp32",
    provider: str = "cpu",
    latent_tile: int = LATENT_TILE,
    sizes: Sequence[ImageSize] = PIPELINE_SIZES,
    with_code: bool = False,
    report: Callable[[str], None] = print,
) -> list[ParityResult]:
    """Write the osediff models into `repository`; every graph is compared with PyTorch first.

    base: a Stable Diffusion 2.1-base folder in diffusers layout; checkpoint: OSEDiff's osediff.pkl.
    precision: fp32, fp16 for the weights (inputs and outputs keep their types; the decoder's only where
    whole pictures, saturated ones too, are finite and 45 dB from fp32, which the report says), or
    bf16, with openvino alone, for the factors of the blocks' products: see `OpenVINOGraph`. provider:
    the name of one of `ENGINES`, which the networks' configs ask the server for.
    latent_tile: side of the UNet's tiles, in latents; upstream's 96 suits latents of 8 px. sizes: of
    images that are to be expected: engines of GPUs have what those need ready at load. with_code: put the
    code of all models there, too, once the files are known to be good. One network is in memory at a time,
    except in the last check. Raises CheckpointError for files that do not fit, and
    ExportError where a graph differs from PyTorch.
    """
    engine = find_engine(provider, precision)
    source = open_checkpoint(base, checkpoint)
    if with_code:
        copy_models(repository)
    report(_HEADER)
    results: list[ParityResult] = []
    settings = _settings(source, precision, latent_tile)
    limits = _limits(repository / "osediff")
    expected = input_shapes(Network(settings, OSEDIFF), limits, sizes)
    for each in _networks(source, engine, precision):
        used = write_network(each, repository, expected, results, report)
    if precision in _TRIED:
        settings["decoder_precision"] = used  # the last one's
    settings["tiles_a_request"] = tiles_a_request(read_config(repository / OSEDIFF.denoiser))
    _write_front(source, repository, settings)
    check_distinct(repository)
    report(_check_whole_image(source, repository, precision))
    return results


@dataclass(frozen=True, slots=True)
class PlannedNetwork:
    """build: reads it in one of `precisions`, of which the first is used in which it passes."""

    build: Callable[[str], Component]
    engine: Engine
    precisions: tuple[str, ...]


def _networks(source: Checkpoint, engine: Engine, precision: str) -> list[PlannedNetwork]:
    """The four; the decoder, which half precision may be too narrow for, last."""
    base = source.base
    text = (CPU, ("fp32",)) if engine.images_only else (engine, (precision,))
    decoder = _TRIED.get(precision, (precision,))
    return [
        PlannedNetwork(lambda each: text_encoder_component(base.load_text_encoder(), each), *text),
        PlannedNetwork(
            lambda each: vae_encoder_component(source.load_vae(), each), engine, (precision,)
        ),
        PlannedNetwork(lambda each: unet_component(source.load_unet(), each), engine, (precision,)),
        PlannedNetwork(
            lambda each: vae_decoder_component(source.load_vae(), each), engine, decoder
        ),
    ]


def write_network(
    network: PlannedNetwork,
    repository: Path,
    expected: Mapping[str, Sequence[Mapping[str, tuple[int, ...]]]],
    results: list[ParityResult],
    report: Callable[[str], None],
) -> str:
    """Write one network, and its config; adds to `results`. The precision that it got."""
    for precision in network.precisions:
        component = network.build(precision)
        try:
            compared = compare_in_half(component, precision)
            fuse(component.module, network.engine.operators)
            compared += export_component(component, repository, network.engine, precision)
        except ExportError as error:
            if precision == network.precisions[-1]:
                raise
            report(f"{component.name} is not safe in {precision}: {error}")
            continue
        for result in compared:
            report(str(result))
        results += compared
        if len(network.precisions) > 1:
            report(f"{component.name} is served in {precision}")
        break
    model = repository / component.name
    copy_model(component.name, repository)
    fit_config(model)
    set_engine(model, network.engine, precision, expected.get(component.name, ()))
    return precision


def _settings(source: Checkpoint, precision: str, latent_tile: int) -> dict[str, Any]:
    """osediff.json."""
    return {
        "alpha_cumprod": source.base.alpha_cumprod,
        "latent_channels": source.base.latent_channels,
        "latent_overlap": LATENT_OVERLAP,
        "latent_tile": latent_tile,
        "precision": precision,
        "process_size": PROCESS_SIZE,
        "vae_scale_factor": source.base.vae_scale_factor,
        "weights_sha256": source.fingerprint(),
    }


def _limits(front: Path) -> Limits:
    """Those of the front's config, which the server reads too."""
    if not (front / "config.pbtxt").is_file():
        return Limits()
    parameters = read_config(front).parameters
    return Limits(**{name: int(parameters[name].string_value) for name in Limits.__slots__})


def _write_front(source: Checkpoint, repository: Path, settings: Mapping[str, Any]) -> None:
    """What `SuperResolver` reads: tokenizer.json and osediff.json."""
    for folder in front_folders(repository, "osediff"):
        write_tokenizer(source.base.load_tokenizer(), folder / TOKENIZER)
        write_settings(folder, "osediff", settings)
    name_weights(repository / "osediff", json.dumps(settings, sort_keys=True).encode())


def _check_whole_image(source: Checkpoint, repository: Path, precision: str) -> str:
    """Compare one image from the graphs with the reference's; a line for the report."""
    image = _test_image()
    graphs = run_graphs(repository, image, prompt=_PROMPT)
    reference = super_resolve(from_checkpoint(source), image, prompt=_PROMPT, tiled=False)
    psnr, least = psnr_db(graphs, reference), _LEAST_PSNR_DB[precision]
    if psnr < least:
        raise ExportError(
            f"a whole image from the exported graphs is {psnr:.1f} dB from PyTorch's; expected "
            f"{least:.0f} dB or more"
        )
    return (
        f"whole image, {image.shape[1]}×{image.shape[0]} px ×2: {psnr:.1f} dB (least {least:.0f})"
    )


def _test_image() -> NDArray[np.uint8]:
    """A picture (264, 280, 3) of gradients, an edge and noise."""
    y, x = np.mgrid[0:264, 0:280]
    planes = np.stack([x * 0.8, y * 0.8, (x + y) % 96 * 2.0], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, planes.shape)
    image: NDArray[np.uint8] = np.clip(planes + noise, 0, 255).astype(np.uint8)
    return image
