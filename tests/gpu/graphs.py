"""A repository of full size for a GPU whose weights are left out: 1 MB instead of 2.6 GB.

    python tests/gpu/graphs.py OUTPUT          the four networks in half precision: minutes, 15 GB
    python tests/gpu/graphs.py OUTPUT --tiny   of a few layers, and no encoder or decoder, to try it

OUTPUT/repository is what `panotriton export osediff --preset full-random --precision fp16 --provider cuda`
writes, the Qwen of the small preset included; OUTPUT/plain has the graphs with group norms in pieces. By each
model.onnx lies a manifest.json: places, types and statistics of the weights, which fill.py makes again.
Nothing is compared with PyTorch here: the check does that where the weights are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import gpu

from panotriton.models.input_shapes import input_shapes
from panotriton.models.osediff import Network
from panotriton.models.super_resolution import Limits
from panotriton.pipeline.files import TOKENIZER
from panotriton.pipeline.networks import OSEDIFF
from panotriton.pipeline.sizes import ImageSize
from panotriton.server.engines import CUDA
from panotriton.server.repository import copy_model, copy_models
from panotriton_export import graph
from panotriton_export.configs import fit_config, read_config, set_engine, tiles_a_request
from panotriton_export.front import front_folders, write_settings
from panotriton_export.gpu_operators import for_gpu, portable
from panotriton_export.osediff import random_sd, text_encoder, unet, vae_decoder, vae_encoder
from panotriton_export.osediff.base import PROMPT_TOKENS
from panotriton_export.osediff.fusions import fuse
from panotriton_export.presets import SMALL
from panotriton_export.qwen import export_qwen

_LEAST_BYTES = 1024  # smaller constants stay in the graph
_PAGE = 4096
_WEIGHTS = "model.onnx.data"
_PLAIN = CUDA.operators - {"GroupNorm"}
# Of stable-diffusion-2-1-base, as the export finds them.
SETTINGS = {
    "alpha_cumprod": 0.004660095,
    "latent_channels": 4,
    "latent_overlap": 32,
    "latent_tile": 96,
    "precision": "fp16",
    "decoder_precision": "fp16",
    "process_size": 512,
    "vae_scale_factor": 8,
}


def components(size: str) -> Iterator[graph.Component]:
    """The four, with random weights, one in memory at a time; tiny, the VAE's two are left out."""
    for module in (text_encoder, vae_encoder, unet):  # no comparison, which takes minutes
        for name in ("PROBED", "PROBED_BATCHES"):
            if hasattr(module, name):
                setattr(module, name, ())
    vae_decoder.PROBED, vae_decoder.checked_images = ((1, 4, 4),), lambda vae: []
    torch.manual_seed(0)
    yield text_encoder.text_encoder_component(random_sd.text_encoder(size), "fp16")
    yield unet.unet_component(
        UNet2DConditionModel(**random_sd.UNET[size], sample_size=64, use_linear_projection=True),
        "fp16",
    )
    if size == "tiny":
        return
    for make in (vae_encoder.vae_encoder_component, vae_decoder.vae_decoder_component):
        vae = AutoencoderKL(**random_sd.vae_blocks(random_sd.VAE[size]), sample_size=512)
        yield make(vae, "fp16")


def write(component: graph.Component, folder: Path, names: frozenset[str]) -> None:
    """The graph with these operators, and its manifest; the portable twin where that differs."""
    fuse(component.module, names)
    model = graph.to_onnx(component)
    version = folder / component.name / "1"
    version.mkdir(parents=True, exist_ok=True)
    manifest = leave_out(model, version)
    (version / "manifest.json").write_text(json.dumps(manifest))
    if portable(model):
        (version / "portable.onnx").write_bytes(ir.to_proto(model).SerializeToString())
        for_gpu(model)
    (version / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    print(
        component.name,
        folder.name,
        f"{manifest['total'] / 1e6:.0f} MB of weights left out",
        flush=True,
    )


def leave_out(model: ir.Model, version: Path) -> dict[str, Any]:
    """Have the weights lie in a file of their own; what is to be in it."""
    tensors, end = [], 0
    for name, value in model.graph.initializers.items():
        weight = value.const_value
        if weight is None or weight.nbytes < _LEAST_BYTES:
            continue
        array, start = weight.numpy(), -(-end // _PAGE) * _PAGE
        statistics = {
            "mean": float(np.mean(array, dtype=np.float64)),
            "std": float(np.std(array, dtype=np.float64)),
        }
        place = {"offset": start, "nbytes": int(array.nbytes)}
        kind = {"dtype": str(array.dtype), "shape": list(array.shape)}
        tensors.append({"name": name, **kind, **statistics, **place})
        value.const_value = ir.ExternalTensor(
            _WEIGHTS,
            start,
            array.nbytes,
            weight.dtype,
            name=name,
            shape=weight.shape,
            base_dir=str(version),
        )
        end = start + array.nbytes
    return {"total": end, "tensors": tensors}


def configure(repository: Path, networks: Iterable[str]) -> None:
    """Configs as the export writes them, and what the other models need."""
    settings = Network(SETTINGS, OSEDIFF)
    expected = input_shapes(settings, Limits(), [ImageSize.of(e) for e in gpu.SHAPES.split(",")])
    for name in networks:
        copy_model(name, repository)
        fit_config(repository / name)
        set_engine(repository / name, CUDA, "fp16", expected.get(name, ()))
    tiles = tiles_a_request(read_config(repository / OSEDIFF.denoiser))
    copy_models(repository)
    tokenizer = Tokenizer.from_file(str(SMALL / "osediff" / "base" / "tokenizer" / TOKENIZER))
    tokenizer.enable_truncation(PROMPT_TOKENS)
    tokenizer.enable_padding(length=PROMPT_TOKENS)
    for folder in front_folders(repository, "osediff"):
        tokenizer.save(str(folder / TOKENIZER))
        write_settings(folder, "osediff", SETTINGS | {"tiles_a_request": tiles})
    export_qwen(SMALL / "qwen", repository, copy=True)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    size = "tiny" if chosen.tiny else "sd21"
    networks = []
    for component in components(size):
        write(component, chosen.output / "repository", CUDA.operators)
        networks.append(component.name)
    for component in components(size):
        fused = chosen.output / "repository" / component.name
        if (fused / "1" / "portable.onnx").is_file():
            write(component, chosen.output / "plain", _PLAIN)
        else:  # no group norm in it
            shutil.copytree(fused, chosen.output / "plain" / component.name)
    configure(chosen.output / "repository", networks)
    for model in networks:
        config = (chosen.output / "repository" / model / "config.pbtxt").read_text()
        (chosen.output / "plain" / model / "config.pbtxt").write_text(config)


if __name__ == "__main__":
    main()
