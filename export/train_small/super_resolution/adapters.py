"""OSEDiff's adapters: three in the UNet, one in the VAE's encoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from panotriton_export.train_small.super_resolution.model import SmallOsediff

__all__ = ["RANK", "add_adapters", "unet_modules", "vae_modules"]

RANK = 4  # with peft's lora_alpha, 8, the adapters count twice
_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_shortcut", "conv_out")
_VAE_PATTERNS = (*_CONVOLUTIONS, *_ATTENTION)
_UNET_PATTERNS = (*_VAE_PATTERNS, "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")


def _adapted(names: list[str], patterns: Sequence[str]) -> list[str]:
    """Modules whose weight's name holds one of the patterns, norms left out."""
    weights = [name for name in names if "bias" not in name and "norm" not in name]
    hits = [name for name in weights if any(pattern in name for pattern in patterns)]
    return [name.removesuffix(".weight") for name in hits]


def unet_modules(unet: UNet2DConditionModel) -> dict[str, list[str]]:
    """Adapter name → module names, split as OSEDiff splits them."""
    modules = _adapted([name for name, _ in unet.named_parameters()], _UNET_PATTERNS)
    encoder = [name for name in modules if "down_blocks" in name or "conv_in" in name]
    decoder = [name for name in modules if "up_blocks" in name or "conv_out" in name]
    others = [name for name in modules if name not in encoder and name not in decoder]
    return {"default_encoder": encoder, "default_decoder": decoder, "default_others": others}


def vae_modules(vae: AutoencoderKL) -> list[str]:
    """The encoder's and quant_conv. OSEDiff lists a module once for each pattern that hits; so do
    we, for the loader to meet what the original's file holds."""
    found: list[str] = []
    for name, _ in vae.named_parameters():
        if "bias" in name or "norm" in name:
            continue
        quant = "quant_conv" in name and "post_quant_conv" not in name
        times = sum((p in name and "encoder" in name) or quant for p in _VAE_PATTERNS)
        found += [name.removesuffix(".weight")] * times
    return found


def add_adapters(model: SmallOsediff) -> list[nn.Parameter]:
    """Freeze the base, add the four adapters (the same start every time), return what is to be
    trained."""
    model.requires_grad_(False)
    targets = vae_modules(model.vae)
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        # That there are several is as it should be.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        torch.manual_seed(0)
        for name, modules in unet_modules(model.unet).items():
            lora = LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=modules)
            model.unet.add_adapter(lora, adapter_name=name)
        lora = LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=targets)
        model.vae.add_adapter(lora, adapter_name="default_encoder")
    model.unet.set_adapter(["default_encoder", "default_decoder", "default_others"])
    for part in (model.unet, model.vae):
        for name, parameter in part.named_parameters():
            parameter.requires_grad_("lora" in name)
    model.unet.conv_in.base_layer.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
