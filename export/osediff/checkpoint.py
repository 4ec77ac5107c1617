"""Upstream's osediff.pkl: reading, checking, merging into a base, and writing.

The file is a torch.save'd dict: rank_unet, rank_vae, the module names of three UNet adapters
(encoder, decoder, others) and one VAE adapter, state_dict_unet (their LoRA weights and the whole
conv_in, which replaces the base's) and state_dict_vae (LoRA weights alone).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from panotriton.pipeline.scratch import atomic
from panotriton_export.osediff.base import Base, open_base
from panotriton_export.pickles import CheckpointError, read_pickle

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Lora",
    "add_adapters",
    "open_checkpoint",
    "save_checkpoint",
]

LORA_ALPHA = 8  # peft's default, which upstream leaves: at rank 4 the update counts twice
_UNET_ADAPTERS = ("encoder", "decoder", "others")
_KEYS = (
    "rank_unet",
    "rank_vae",
    "unet_lora_encoder_modules",
    "unet_lora_decoder_modules",
    "unet_lora_others_modules",
    "vae_lora_encoder_modules",
    "state_dict_unet",
    "state_dict_vae",
)


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters of one network. modules: adapter name → full names of the modules it changes."""

    rank: int
    modules: Mapping[str, Sequence[str]]
    state: Mapping[str, Tensor]
    replaced: tuple[
        str, ...
    ] = ()  # parameters stored whole: those whose name contains one of these


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base and the adapters that were checked against it. load_* return plain merged modules."""

    base: Base
    path: Path
    unet: Lora
    vae: Lora

    def load_unet(self) -> nn.Module:
        return _merge(self.base.load_unet(), self.unet)

    def load_vae(self) -> nn.Module:
        """The decoder is the base's: only encoder and quant_conv have adapters."""
        return _merge(self.base.load_vae(), self.vae)

    def fingerprint(self) -> str:
        """SHA-256 over the contents of every source file, in a fixed order."""
        total = hashlib.sha256()
        for path in (*self.base.source_files(), self.path):
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    total.update(block)
        return total.hexdigest()


def open_checkpoint(base: Path, checkpoint: Path) -> Checkpoint:
    """Open both and check every adapter against the base's shapes; large weights stay on disk.

    Raises CheckpointError for whatever would fail later; its message says what to do.
    """
    opened = open_base(base)
    content = _read(checkpoint)
    unet_modules = {
        f"default_{kind}": content[f"unet_lora_{kind}_modules"] for kind in _UNET_ADAPTERS
    }
    unet = Lora(content["rank_unet"], unet_modules, content["state_dict_unet"], ("conv_in",))
    vae_modules = {"default_encoder": content["vae_lora_encoder_modules"]}
    vae = Lora(content["rank_vae"], vae_modules, content["state_dict_vae"])
    _check(opened.outline_unet(), unet, "state_dict_unet", checkpoint)
    _check(opened.outline_vae(), vae, "state_dict_vae", checkpoint)
    return Checkpoint(opened, checkpoint, unet, vae)


def _read(path: Path) -> dict[str, Any]:
    content = read_pickle(path, "OSEDiff's osediff.pkl")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(map(str, sorted(content)[:8]))}. "
            "Expected OSEDiff's osediff.pkl"
        )
    return content


def _check(outline: nn.Module, lora: Lora, key: str, path: Path) -> None:
    """Compare the stored weights with those that the adapters would have on this base."""
    known = {name for name, _ in outline.named_modules()}
    absent = [name for names in lora.modules.values() for name in names if name not in known]
    if absent:
        raise CheckpointError(
            f"{path} adapts {absent[0]} (and {len(absent) - 1} more modules) that the base lacks: "
            "it was made for another base model"
        )
    add_adapters(outline, lora.rank, lora.modules)
    for name, parameter in _stored(outline, lora):
        _check_tensor(name, parameter.shape, lora, key, path)


def _check_tensor(name: str, expected: torch.Size, lora: Lora, key: str, path: Path) -> None:
    if name not in lora.state:
        raise CheckpointError(f"{path}: {key} lacks {name}; the file is incomplete")
    got = lora.state[name].shape
    if "lora_A" in name and got[0] != lora.rank:
        raise CheckpointError(
            f"{path}: {key}[{name}] has rank {got[0]} but the file says rank {lora.rank}"
        )
    if got != expected:
        raise CheckpointError(
            f"{path}: {key}[{name}] is {tuple(got)}; the base needs {tuple(expected)}: "
            "the checkpoint was made for another base model"
        )


def _stored(network: nn.Module, lora: Lora) -> list[tuple[str, nn.Parameter]]:
    wanted = ("lora", *lora.replaced)
    return [(n, p) for n, p in network.named_parameters() if any(part in n for part in wanted)]


def add_adapters(network: Any, rank: int, modules: Mapping[str, Sequence[str]]) -> None:
    """Add one LoRA adapter per entry, all active, initialised as upstream does before training."""
    for name, targets in modules.items():
        config = LoraConfig(
            r=rank,
            lora_alpha=LORA_ALPHA,
            init_lora_weights="gaussian",
            target_modules=sorted(set(targets)),  # upstream's VAE list names modules repeatedly
        )
        with warnings.catch_warnings():  # of a second adapter, which is what we want
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            network.add_adapter(config, adapter_name=name)
    network.set_adapter(list(modules))


def _merge(network: Any, lora: Lora) -> nn.Module:
    """W + 8/r · B·A in every adapted module; returns the network without any trace of peft."""
    add_adapters(network, lora.rank, lora.modules)
    with torch.no_grad():
        for name, parameter in _stored(network, lora):
            parameter.copy_(lora.state[name])
    _check_scale(network, lora.rank)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
    merged: nn.Module = network.requires_grad_(False).eval()
    return merged


def _check_scale(network: nn.Module, rank: int) -> None:
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            scales = set(layer.scaling.values())
            if scales != {LORA_ALPHA / rank}:
                raise CheckpointError(f"LoRA scale is {scales}; expected {LORA_ALPHA / rank}")


def save_checkpoint(path: Path, unet: Any, vae: Any) -> Path:
    """Write an osediff.pkl from networks that carry upstream's adapters (see `add_adapters`)."""
    content = {
        "rank_unet": unet.peft_config["default_others"].r,
        "rank_vae": vae.peft_config["default_encoder"].r,
        "vae_lora_encoder_modules": _targets(vae, "default_encoder"),
        "state_dict_unet": _state(unet, "lora", "conv_in"),
        "state_dict_vae": _state(vae, "lora"),
    }
    for kind in _UNET_ADAPTERS:
        content[f"unet_lora_{kind}_modules"] = _targets(unet, f"default_{kind}")
    with atomic(path) as part:
        torch.save(content, part)
    return path


def _targets(network: nn.Module, adapter: str) -> list[str]:
    # Not peft_config's target_modules: peft shortens that list to ambiguous endings of names.
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer.scaling
    ]


def _state(network: nn.Module, *parts: str) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: state[name] for name in state if any(part in name for part in parts)}
