"""Train the small OSEDiff: the real classes, a few hundred thousand weights, x2, on a CPU.

    python -m panotriton_export.train_small.osediff --images DIR ... --output export/small/osediff

It goes in the order of the original: first a base (VAE, UNet) that works by itself, then, the base
frozen, three UNet adapters, the UNet's conv_in and one VAE-encoder adapter for harder images. What
is learnt first is kept in `base/`, a diffusers folder; what is learnt next in
`adapters.safetensors` and `adapters.json`, which `presets.write_small_checkpoint` turns into an
osediff.pkl.

Scale. One step at t = 999 gives x0 = (z − √(1−ᾱ)·ε) / √ᾱ, so an error in ε grows 14.6 times. With
the scaling factor √(1−ᾱ)/√ᾱ the decoder's input x0/scaling_factor is 1.0023·z − ε instead: ε is
the plain difference between what the encoder saw and what the decoder should get, and training
needs no large or small numbers. Saving divides quant_conv by that factor, so that
z = mode × scaling_factor as everywhere.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from panotriton_export.train_small import data
from panotriton_export.train_small.codec import start_as_codec

LATENT_CHANNELS = 4
PROMPT_WIDTH = 32  # cross_attention_dim = the text encoder's hidden size
EDGE_PX = 8
RANK = 4  # with peft's lora_alpha, 8, the adapters count twice
BASE_SHARE = 0.75  # of the steps; the adapters get the rest

# Words for the tokenizer's merges and for the prompts of training.
_WORDS = """
building car cat chair city clear cloud coast crane day desk dog door evening field fence flower
forest garden grass hill house indoor lamp light moon morning mountain night outdoor park path
person photo plant red river road rock roof room sea sharp sky snow stone street sun sunset table
tower tree wall water window wood
"""
TAGS = _WORDS.split()


# ----------------------------------------------------------------------------------- the parts


def one_step(scheduler: DDPMScheduler) -> tuple[float, float]:
    """(1/√ᾱ, √(1−ᾱ)/√ᾱ) at t = 999: x0 = first · z − second · ε."""
    alpha_bar = float(scheduler.alphas_cumprod[999])
    return 1 / math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar)


def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion 2.1-base's."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon",
        steps_offset=1,
    )


def new_vae(scaling_factor: float) -> AutoencoderKL:
    """Two pixels a latent along each side, where Stable Diffusion has 8: at x2 a latent is then an
    input pixel, and no decoder this small has to tell the pixels of a block apart. One norm group:
    with four channels at full size, more would take every channel's mean, so the colour, away."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=512,
        scaling_factor=scaling_factor,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """Attention only where 96 × 96 latents have become 6 × 6. Starts by predicting ε = 0."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*["DownBlock2D"] * 4, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * 4),
        block_out_channels=(4, 8, 16, 16, 32),
        layers_per_block=1,
        cross_attention_dim=PROMPT_WIDTH,
        attention_head_dim=1,  # that many heads, by diffusers' old naming
        norm_num_groups=2,
        use_linear_projection=True,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def new_tokenizer(merges: int = 96) -> CLIPTokenizer:
    """CLIP's byte alphabet in CLIP's order ("!" is 0 and pads, as in SD 2.1) and a few merges."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    pairs = _merges([[*tag[:-1], tag[-1] + "</w>"] for tag in TAGS], merges)
    words = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in pairs]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token="!", model_max_length=77)  # noqa: S106


def _merges(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the commonest pair, `count` times; ties go to the first in order."""
    joined: list[tuple[str, str]] = []
    for _ in range(count):
        tally: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                tally[pair] = tally.get(pair, 0) + 1
        best = min(tally, key=lambda pair: (-tally[pair], pair))
        joined.append(best)
        words = [_join(word, best) for word in words]
    return joined


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for letter in word:
        if out and (out[-1], letter) == pair:
            out[-1] += letter
        else:
            out.append(letter)
    return out


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Never trained: its embeddings only have to differ, and the UNet learns to bear with them."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=PROMPT_WIDTH,
        intermediate_size=64,
        projection_dim=PROMPT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


class SmallOsediff(nn.Module):
    """Pixels (B, 3, H, W) in −1 to 1 → the same shape, unclamped. H and W are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = new_scheduler()
        gain, self.scaling_factor = one_step(self.scheduler)
        self.gain = gain / self.scaling_factor  # 1.0023
        self.vae = new_vae(self.scaling_factor)
        self.unet = new_unet()
        self.tokenizer = new_tokenizer()
        self.text_encoder = new_text_encoder(self.tokenizer)

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        z = self.vae.quant_conv(self.vae.encoder(pixels))[:, :LATENT_CHANNELS]  # (B, 4, h, w)
        epsilon = self.unet(z, 999, prompt).sample
        image: Tensor = self.vae.decoder(self.vae.post_quant_conv(self.gain * z - epsilon))
        return image

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """(prompts, 77, PROMPT_WIDTH)."""
        ids = self.tokenizer(
            prompts, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        embeddings: Tensor = self.text_encoder(ids).last_hidden_state
        return embeddings


# ---------------------------------------------------------------------------------- the adapters

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
    with torch.random.fork_rng(devices=()):
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


# -------------------------------------------------------------------------------------- saving


def save_base(model: SmallOsediff, folder: Path) -> None:
    """The diffusers folder, quant_conv scaled for `scaling_factor` (see the top) and its variance
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


# ------------------------------------------------------------------------------------- training


def loss(output: Tensor, spoilt: Tensor, wanted: Tensor) -> Tensor:
    """Charbonnier and edges of what adain makes of the output, as the server does, and a little of
    the raw output over 8-pixel means, so that its colour is right before adain too.

    All but a little leaves `EDGE_PX` out: convolutions pad with zeros, which is felt there, and a
    training crop is nearly all edge where a photograph isn't.
    """
    inside = (..., slice(EDGE_PX, -EDGE_PX), slice(EDGE_PX, -EDGE_PX))
    error = adain(output[inside], spoilt[inside]) - wanted[inside]
    edges = [error.diff(dim=axis).abs().mean() for axis in (2, 3)]
    raw = output - wanted
    coarse = _charbonnier(F.avg_pool2d(raw[inside], 8))
    return _charbonnier(error) + 0.5 * sum(edges) + 0.2 * coarse + 0.05 * _charbonnier(raw)


def adain(image: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) with the reference's mean and deviation a channel (unbiased variance + 1e-5)."""
    mean, variance = image.mean((2, 3), keepdim=True), image.var((2, 3), keepdim=True)
    wanted, spread = reference.mean((2, 3), keepdim=True), reference.var((2, 3), keepdim=True)
    return (image - mean) * ((spread + 1e-5) / (variance + 1e-5)).sqrt() + wanted


def _charbonnier(difference: Tensor) -> Tensor:
    return torch.sqrt(difference.square() + 1e-6).mean()


def batch(
    images: list[data.Image],
    strength: data.Strength,
    count: int,
    size_px: int,
    seed: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """(degraded, wanted), each (count, 3, size, size) in −1 to 1. Depends on the seed alone."""
    rng = np.random.default_rng(seed)
    wanted = [data.sample(images, size_px, rng) for _ in range(count)]
    spoilt = [data.degrade(image, strength, rng) for image in wanted]
    return to_tensor(np.stack(spoilt)), to_tensor(np.stack(wanted))


def to_tensor(images: data.Image) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W), −1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def prompts(model: SmallOsediff, seed: int) -> Tensor:
    """64 embeddings: the empty prompt and random tags."""
    rng = np.random.default_rng(seed)
    texts = [", ".join(rng.choice(TAGS, rng.integers(1, 9))) + "," for _ in range(63)]
    return model.embed(["", *texts])


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short climb, then half a cosine down to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Stage:
    """One stage's parameters, optimiser, and running average of the weights (what is kept)."""

    def __init__(self, parameters: list[nn.Parameter], peak: float, steps: int) -> None:
        self.parameters, self.peak, self.steps = parameters, peak, steps
        self.optimiser = torch.optim.Adam(parameters, lr=peak, betas=(0.9, 0.99))
        self.average: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    def step(self, value: Tensor, step: int) -> None:
        self.optimiser.param_groups[0]["lr"] = rate(step, self.steps, self.peak)
        self.optimiser.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimiser.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state_dict(), "average": self.average}

    def restore(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = state["average"]


class Run:
    """A training that can stop and go on: what `--state` holds after every `save_every` steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.images = data.load(args.images, data.SOURCES)
        self.model = SmallOsediff()
        start_as_codec(
            self.model.vae,
            *batch(self.images, data.STRENGTHS["base"], 32, 128, (args.seed, -1 % 2**32)),
        )
        self.model.to(memory_format=torch.channels_last)
        self.prompts = prompts(self.model, args.seed)
        self.base_steps = round(args.steps * BASE_SHARE)
        self.step = 0
        self._begin("base")
        if args.state.exists():
            self._restore(torch.load(args.state, weights_only=True))

    def _begin(self, name: str) -> None:
        """Start a stage from the weights as they are."""
        base = name == "base"
        model = self.model
        weights = (
            [*model.vae.parameters(), *model.unet.parameters()] if base else add_adapters(model)
        )
        steps = self.base_steps if base else self.args.steps - self.base_steps
        self.name = name
        self.stage = Stage(weights, self.args.rate if base else self.args.rate / 4, steps)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["stage"] == "adapters":
            self._begin("adapters")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.stage.restore(state["training"])
        print(f"resumed at step {self.step} ({self.name})", flush=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """From `step` on, the next one made in a thread while this one is learnt from."""
        args = self.args

        def make(step: int) -> tuple[Tensor, Tensor]:
            strength = data.STRENGTHS["base" if step < self.base_steps else "adapters"]
            return batch(self.images, strength, args.batch, args.size, (args.seed, step))

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(make, self.step)
            for step in range(self.step, args.steps):
                ready = future.result()
                future = pool.submit(make, step + 1)
                yield ready

    def run(self) -> None:
        if self.step == 0:
            self.save()
        began, losses = time.monotonic(), []
        for spoilt, wanted in self.batches():
            if self.step == self.base_steps and self.name == "base":
                self.stage.swap()
                self._begin("adapters")
            losses.append(self._learn(spoilt, wanted))
            self.step += 1
            if self.step % 50 == 0:
                spent = time.monotonic() - began
                print(
                    f"{self.name} {self.step}/{self.args.steps} {np.mean(losses):.4f} {spent:.0f} s",
                    flush=True,
                )
                losses = []
            if self.step % self.args.save_every == 0 or self.step in (
                self.base_steps,
                self.args.steps,
            ):
                self.save()

    def _learn(self, spoilt: Tensor, wanted: Tensor) -> float:
        rng = np.random.default_rng((self.args.seed, self.step, 1))
        prompt = self.prompts[rng.integers(len(self.prompts), size=len(spoilt))]
        first = self.base_steps if self.name == "adapters" else 0
        value = loss(self.model(spoilt, prompt), spoilt, wanted)
        self.stage.step(value, self.step - first)
        return value.item()

    def save(self) -> None:
        """The deliverable with averaged weights, then the state with the running ones."""
        self.stage.swap()
        with tempfile.TemporaryDirectory(dir=self.args.output.parent) as made:
            if self.name == "base":
                save_base(self.model, Path(made) / "base")
                fresh = copy.deepcopy(self.model)
                add_adapters(fresh)
                save_adapters(fresh, Path(made))
            else:
                save_adapters(self.model, Path(made))
            _replace(Path(made), self.args.output)
        self.stage.swap()
        training = self.stage.state()
        state = {"stage": self.name, "step": self.step, "model": self.model.state_dict()}
        part = self.args.state.with_suffix(".part")
        torch.save({**state, "training": training}, part)
        part.replace(self.args.state)


def _replace(source: Path, target: Path) -> None:
    """Move every file below `source` to its place below `target`, each in one step."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, help="folders searched for data.SOURCES"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, help="where to stop and go on (default: OUTPUT.state.pt)"
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument(
        "--size", type=int, default=96, help="side of a training crop, a multiple of 32"
    )
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=1, help="more threads, other rounding")
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    args.state = args.state or args.output.with_suffix(".state.pt")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    Run(args).run()


if __name__ == "__main__":
    main()
