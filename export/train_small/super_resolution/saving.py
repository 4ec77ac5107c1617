"""The formats of the originals: a diffusers folder, and what osediff.pkl holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from panotriton_export.train_small.super_resolution.adapters import RANK, unet_modules, vae_modules
from panotriton_export.train_small.super_resolution.autoencoder import LATENT_CHANNELS, new_vae
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.unet import new_unet

__all__ = ["save_adapters", "save_base"]


def save_base(model: SmallOsediff, folder: Path) -> None:
    """The diffusers folder, quant_conv scaled for `scaling_factor` (see `super_resolution`) and its variance
    pinned to the least that diffusers knows."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = new_vae(model.scaling_factor)
    vae.load_state_dict(_scaled(model.vae.state_dict(), model.scaling_factor))
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -30
    vae.save_pretrained(folder / "vae")
    model.unet.save_pretrained(folder / "unet")
    model.text_encoder.save_pretrained(folder / "text_encoder")
    model.tokenizer.save_pretrained(folder / "tokenizer")
    model.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_adapters(model: SmallOsediff, folder: Path) -> None:
    """adapters.safetensors, whose keys start with `unet.` or `vae.` and go on as in osediff.pkl,
    and adapters.json, which holds the rest of osediff.pkl."""
    unet = {k: v for k, v in model.unet.state_dict().items() if "lora" in k or "conv_in" in k}
    vae = _scaled(model.vae.state_dict(), model.scaling_factor)
    tensors = {f"unet.{key}": value for key, value in unet.items()}
    tensors |= {f"vae.{key}": value for key, value in vae.items() if "lora" in key}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapters.safetensors")
    modules = _plain_unet_modules()
    rest = {
        "rank_unet": RANK,
        "rank_vae": RANK,
        "unet_lora_encoder_modules": modules["default_encoder"],
        "unet_lora_decoder_modules": modules["default_decoder"],
        "unet_lora_others_modules": modules["default_others"],
        "vae_lora_encoder_modules": vae_modules(new_vae(1.0)),
    }
    (folder / "adapters.json").write_text(json.dumps(rest, indent=1) + "\n")


def _plain_unet_modules() -> dict[str, list[str]]:
    """Names as they are without adapters, which rename the layers that they wrap."""
    return unet_modules(new_unet())


def _scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The VAE's weights with quant_conv's output divided by `factor`."""
    last = ("quant_conv.weight", "quant_conv.bias", "quant_conv.lora_B.default_encoder.weight")
    return {key: value / factor if key in last else value for key, value in state.items()}
