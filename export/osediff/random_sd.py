"""A diffusers folder and an osediff.pkl with seeded random weights, in the real formats.

`tiny` is for tests. `sd21` has the layers and shapes of Stable Diffusion 2.1-base: what it costs to
export and to run is what the real weights cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from panotriton_export.osediff.base import PROMPT_TOKENS
from panotriton_export.osediff.checkpoint import add_adapters, save_checkpoint

__all__ = ["UNET", "VAE", "adapter_modules", "text_encoder", "vae_blocks", "write_random"]

Size = Literal["tiny", "sd21"]

UNET: dict[Size, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "sd21": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
    },
}
VAE: dict[Size, dict[str, Any]] = {
    "tiny": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "sd21": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}
_TEXT: dict[Size, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 523,
        "projection_dim": 32,
    },
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "vocab_size": 49408,
        "projection_dim": 512,
    },
}
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = ("t h", "th e</w>", "s k", "sk y</w>", "i n", "in g</w>", "t r", "e e</w>", "tr ee</w>")
_UNET_PATTERNS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_in", "proj_out", "ff.net")
_VAE_PATTERNS = ("conv", "to_k", "to_q", "to_v", "to_out.0")


def write_random(folder: Path, size: Size = "tiny", *, seed: int = 0, rank: int = 4) -> Path:
    """Write `folder` (a base) and `folder`/osediff.pkl; returns the latter. sd21 takes 5.4 GB."""
    torch.manual_seed(seed)
    _write_tokenizer(folder / "tokenizer")
    _scheduler().save_pretrained(folder / "scheduler")
    text_encoder(size).save_pretrained(folder / "text_encoder")
    _write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    vae = AutoencoderKL(**vae_blocks(VAE[size]), sample_size=512)
    unet = UNet2DConditionModel(**UNET[size], sample_size=64, use_linear_projection=True)
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    checkpoint = folder / "osediff.pkl"
    _write_adapters(checkpoint, unet, vae, rank)
    return checkpoint


def adapter_modules(unet: nn.Module, vae: nn.Module) -> tuple[dict[str, list[str]], list[str]]:
    """The modules that upstream adapts: by UNet adapter name, and in the VAE."""
    of_unet: dict[str, list[str]] = {
        f"default_{kind}": [] for kind in ("encoder", "decoder", "others")
    }
    for name in _weights(unet, _UNET_PATTERNS):
        of_unet[_adapter(name)].append(name)
    of_vae = [n for n in _weights(vae, _VAE_PATTERNS) if n.startswith(("encoder.", "quant_conv"))]
    return of_unet, of_vae


def _adapter(name: str) -> str:
    if name.startswith(("down_blocks.", "conv_in")):
        return "default_encoder"
    return "default_decoder" if name.startswith(("up_blocks.", "conv_out")) else "default_others"


def _write_adapters(path: Path, unet: Any, vae: Any, rank: int) -> None:
    of_unet, of_vae = adapter_modules(unet, vae)
    add_adapters(unet, rank, of_unet)
    add_adapters(vae, rank, {"default_encoder": of_vae})
    with torch.no_grad():
        for layer in (*unet.modules(), *vae.modules()):
            if isinstance(layer, BaseTunerLayer):
                # Zero before training: no test would see it merged. Merged, W gains about half of itself; of
                # the size of W whatever its width, since values that only grow are none that halves hold.
                std = 0.5 * float(layer.get_base_layer().weight.std())
                for factor in layer.lora_B.values():
                    factor.weight.normal_(std=std)
        unet.conv_in.base_layer.weight.add_(0.01)  # trained too
    save_checkpoint(path, unet, vae)


def _weights(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    names = (name for name, _ in network.named_parameters() if name.endswith(".weight"))
    return [n.removesuffix(".weight") for n in names if "norm" not in n and _has(n, patterns)]


def _has(name: str, parts: Iterable[str]) -> bool:
    return any(part in name for part in parts)


def vae_blocks(config: dict[str, Any]) -> dict[str, Any]:
    """A VAE's config completed with one plain block type per level."""
    levels = len(config["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    return {**config, "down_block_types": down, "up_block_types": up, "latent_channels": 4}


def text_encoder(size: Size) -> CLIPTextModel:
    config = CLIPTextConfig(
        **_TEXT[size],
        hidden_act="gelu",
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=_TEXT[size]["vocab_size"] - 2,
        eos_token_id=_TEXT[size]["vocab_size"] - 1,
    )
    return CLIPTextModel(config)


def _scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
    )


def _write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE with a handful of merges, in the files of Stable Diffusion 2.1.

    There the padding is "<|endoftext|>" in one file and "!" (id 0), which wins, in the other.
    """
    letters = sorted(ByteLevel.alphabet())
    words = [merge.replace(" ", "") for merge in _MERGES]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words, _BEGIN, _END]
    special = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": PROMPT_TOKENS, **special}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES, ""]))
    _write_json(folder / "tokenizer_config.json", {**config, "pad_token": _END})
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": "!"})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
