"""A Stable Diffusion 2.1-base folder in diffusers layout, checked before anything large is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils import logging as transformers_logging

from panotriton.errors import brief, quoted
from panotriton_export.pickles import CheckpointError
from panotriton_export.weights import check_weights

__all__ = ["PROMPT_TOKENS", "TIMESTEP", "Base", "open_base"]

TIMESTEP = 999  # OSEDiff takes one step, from the last of 1000
PROMPT_TOKENS = 77

_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(-\d+-of-\d+)?\.(safetensors|bin)"
)


_HALF = ".fp16"


@dataclass(frozen=True, slots=True)
class Base:
    """An opened folder. Each load_* reads one network anew, in fp32, so that it can be freed."""

    folder: Path
    configs: dict[str, dict[str, Any]]

    @property
    def latent_channels(self) -> int:
        return int(self.configs["vae"]["latent_channels"])

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def alpha_cumprod(self) -> float:
        """ᾱ at t = 999."""
        scheduler = DDPMScheduler.from_config(self.configs["scheduler"])
        return float(scheduler.alphas_cumprod[TIMESTEP])

    def load_unet(self) -> UNet2DConditionModel:
        return self._load_network(UNet2DConditionModel, "unet", torch_dtype=torch.float32)

    def load_vae(self) -> AutoencoderKL:
        return self._load_network(AutoencoderKL, "vae", torch_dtype=torch.float32)

    def load_text_encoder(self) -> CLIPTextModel:
        with _no_progress_bar():
            return self._load_network(CLIPTextModel, "text_encoder", dtype=torch.float32)

    def load_tokenizer(self) -> Any:
        return self._load(AutoTokenizer, "tokenizer")

    def outline_unet(self) -> UNet2DConditionModel:
        """The UNet's modules and shapes without weights."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(self.configs["unet"])

    def outline_vae(self) -> AutoencoderKL:
        """The VAE's modules and shapes without weights."""
        with torch.device("meta"):
            return AutoencoderKL.from_config(self.configs["vae"])

    def source_files(self) -> list[Path]:
        """What the export depends on: configs, vocabulary and the weights that are loaded."""
        return [path for part in _CONFIGS for path in _sources(self.folder / part)]

    def _load(self, kind: Any, part: str, **options: Any) -> Any:
        try:
            loaded = kind.from_pretrained(
                self.folder, subfolder=part, local_files_only=True, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder / part} cannot be loaded: {error}") from error
        return loaded

    def _load_network(self, kind: Any, part: str, **options: Any) -> Any:
        variant = _variant(self.folder / part)
        network, loading = self._load(
            kind, part, variant=variant, output_loading_info=True, **options
        )
        if missing := sorted(loading["missing_keys"]):  # which would be random numbers
            raise CheckpointError(
                f"{self.folder / part} lacks the weights of {missing[0]} and {len(missing) - 1} more; "
                "expected all of the network's: download it again"
            )
        return network.requires_grad_(False).eval()


def open_base(folder: Path) -> Base:
    """Read the folder's configs and check that OSEDiff can work on it.

    Raises CheckpointError for a folder that is not in diffusers layout, lacks a part or its
    weights, predicts v instead of noise, or whose parts do not fit each other.
    """
    parts = [part for part in _CONFIGS if (folder / part).is_dir()]
    if len(parts) < len(_CONFIGS) and not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{brief(folder)} is not a diffusers folder: it has neither model_index.json nor all parts; "
            f"expected the whole Stable Diffusion 2.1-base folder ({', '.join(_CONFIGS)}), not "
            "a single .ckpt file"
        )
    configs = {part: _read_config(folder / part, name) for part, name in _CONFIGS.items()}
    for part in ("unet", "vae", "text_encoder"):
        if not any(_weight_files(folder / part)):
            raise CheckpointError(
                f"{folder / part} has no weights: expected *.safetensors or *.bin"
            )
    base = Base(folder, configs)
    for path in base.source_files():
        check_weights(path, CheckpointError)
    _check_scheduler(base)
    _check_parts(base)
    return base


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _read_config(part: Path, name: str) -> dict[str, Any]:
    if not part.is_dir():
        raise CheckpointError(f"{part.parent} lacks the subfolder {part.name}: copy it whole")
    try:
        config = json.loads((part / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{part / name} cannot be read: {error}") from error
    return dict(config)


def _weight_files(part: Path) -> Iterator[Path]:
    """Files that from_pretrained reads, no EMA variants: the first there are of these kinds."""
    files = sorted(path for path in part.iterdir() if _WEIGHTS.fullmatch(path.name))
    for suffix in (".safetensors", ".bin"):
        for half in (False, True):
            found = [f for f in files if f.suffix == suffix and (_HALF in f.suffixes) == half]
            if found:
                yield from found
                return


def _variant(part: Path) -> str | None:
    """fp16 where only such weights are there; they are read as fp32 like the others."""
    return "fp16" if any(_HALF in path.suffixes for path in _weight_files(part)) else None


def _sources(part: Path) -> Iterator[Path]:
    yield from sorted(p for p in part.iterdir() if p.suffix in (".json", ".txt"))
    yield from _weight_files(part)


def _check_scheduler(base: Base) -> None:
    config, path = base.configs["scheduler"], base.folder / "scheduler" / "scheduler_config.json"
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise CheckpointError(
            f"{path} says prediction_type {quoted(prediction)}; OSEDiff needs 'epsilon'. This looks like "
            "Stable Diffusion 2.1 (768 px): use stable-diffusion-2-1-base (512 px)"
        )
    steps = config.get("num_train_timesteps", 1000)
    if steps != TIMESTEP + 1:
        raise CheckpointError(f"{path} says num_train_timesteps {steps}; expected {TIMESTEP + 1}")


def _check_parts(base: Base) -> None:
    unet, vae, text = (base.configs[part] for part in ("unet", "vae", "text_encoder"))
    pairs = (
        ("the UNet's in_channels", unet["in_channels"], "the VAE's", vae["latent_channels"]),
        ("the UNet's cross_attention_dim", unet["cross_attention_dim"], "the text encoder's",
         text["hidden_size"]),
        ("the text encoder's positions", text["max_position_embeddings"], "a prompt's tokens,",
         PROMPT_TOKENS),
    )  # fmt: skip
    for what, got, other, expected in pairs:
        if got != expected:
            raise CheckpointError(
                f"{base.folder}: {what} is {got} but {other} {expected}; the parts are of "
                "different models"
            )
