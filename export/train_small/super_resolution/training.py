"""Stages, up to the base and then the adapters, that can stop and go on."""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panotriton.pipeline.scratch import atomic
from panotriton_export.train_small.super_resolution import data
from panotriton_export.train_small.super_resolution.adapters import add_adapters
from panotriton_export.train_small.super_resolution.autoencoder import Decoder, halve, write_vae
from panotriton_export.train_small.super_resolution.loss import loss
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.saving import save_adapters, save_base
from panotriton_export.train_small.super_resolution.text import TAGS
from panotriton_export.train_small.super_resolution.unet import (
    balance,
    begin_unet,
    new_head,
    new_unet,
    remove_norms,
    speeds,
    write_unet,
)

__all__ = ["Base", "Run", "to_tensor"]

Group = dict[str, Any]  # "params", and "share" of the rate
# Steps of each, for a run of 89,200, and what of the learning rate it reaches.
STAGES = {"head": 24000, "decoder": 2000, "base": 13200, "finish": 48000, "adapters": 2000}
PEAKS = {"head": 1.0, "decoder": 1.0, "base": 0.5, "finish": 0.5, "adapters": 0.03}
TONES = {"adapters": 0.5}  # how much of the loss is that of the smooth alone
SIZES = (96, 128, 96, 192)  # px of crops, in turn
_BEGIN = (32, 128)  # crops that the decoder's first weights are fitted to, and their px


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
    if strength.soft:
        wanted = [
            data.soften(each, rng) if rng.random() < strength.soft else each for each in wanted
        ]
    if strength.recoloured:
        wanted = [
            data.recolour(each, rng) if rng.random() < strength.recoloured else each
            for each in wanted
        ]
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
    """Learning rate: a short climb, the peak for 0.4 of the steps, then half a cosine down to a hundredth.

    Up to there a shorter run is the beginning of a longer one.
    """
    warm = min(1.0, (step + 1) / 100)
    left = min(1.0, (1 - step / steps) / 0.6)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left)))


class Base(nn.Module):
    """What the first stages train: a UNet without norms, and the decoder's three convolutions.

    Pixels (B, 3, H, W) in −1 to 1 → the same shape, unclamped, as the saved networks do. First a `head`
    stands in the decoder's place that gives the four pixels of each latent from the UNet's last planes,
    and learns several times as soon; then the decoder and the UNet's own last convolution learn it.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.decoder = Decoder()
        self.unet = new_unet()
        remove_norms(self.unet)
        begin_unet(self.unet)
        self.last = self.unet.conv_out
        self.head = new_head(self.unet)

    def forward(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        latents = halve(pixels).contiguous(memory_format=torch.channels_last)
        made = self.unet(latents, 999, prompt).sample
        if self.unet.conv_out is self.head:
            return pixels + F.pixel_shuffle(made, 2)
        image: Tensor = self.decoder(self.gain * latents - made)
        return image

    def groups(self, stage: str) -> list[Group]:
        """The weights that learn in this stage, each as fast as it is large."""
        self.unet.conv_out = self.head if stage == "head" else self.last
        body, ends = speeds(self.unet)
        decoder = (
            [] if stage == "head" else [{"params": [*self.decoder.parameters()], "share": 0.5}]
        )
        return [*(body if stage != "decoder" else []), *ends, *decoder]

    def write(self, model: SmallOsediff) -> None:
        """Make the networks of `model` do the same."""
        write_vae(model.vae, self.decoder)
        write_unet(model.unet, self.unet)


class Stage:
    """One stage's parameters, optimiser, and running average of the weights (what is kept)."""

    def __init__(self, groups: list[Group], peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps
        self.parameters = [each for group in groups for each in group["params"]]
        self.optimiser = torch.optim.Adam(groups, peak, betas=(0.9, 0.99), fused=True)
        self.average: list[Tensor] = [each.detach().clone() for each in self.parameters]

    def step(self, step: int) -> None:
        """Learn from the parameters' gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate(step, self.steps, self.peak) * group["share"]
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimiser.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

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
        self.base = Base(self.model.gain)
        if not args.state.exists():
            begin = batch(self.images, data.CLEAN, *_BEGIN, (args.seed, -1 % 2**32))
            self.base.decoder.begin(*begin)
        self.base.to(memory_format=torch.channels_last)
        self.prompts = prompts(self.model, args.seed)
        ends = np.cumsum([*STAGES.values()]) / sum(STAGES.values()) * args.steps
        self.ends = dict(zip(STAGES, ends.round().astype(int).tolist(), strict=True))
        self.step = 0
        self._begin("head")
        if args.state.exists():
            self._restore(torch.load(args.state, weights_only=True))

    def _begin(self, name: str) -> None:
        """Start a stage from the weights as they are."""
        self.name, self.first = name, self.step
        steps, peak = self.ends[name] - self.step, self.args.rate * PEAKS[name]
        if name == "adapters":
            self.base.write(self.model)
            self.trained: nn.Module = self.model
            groups = [{"params": add_adapters(self.model), "share": 1.0}]
        else:
            self.trained = self.base
            groups = self.base.groups(name)
        self.stage = Stage(groups, peak, steps)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["first"]
        self._begin(state["stage"])
        self.step = state["step"]
        self.trained.load_state_dict(state["model"])
        self.stage.restore(state["training"])
        print(f"resumed at step {self.step} ({self.name})", flush=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """From `step` on, the next one made in a thread while this one is learnt from."""
        args = self.args

        def make(step: int) -> tuple[Tensor, Tensor]:
            strength = data.STRENGTHS.get(self._stage_at(step), data.STRENGTHS["base"])
            size = SIZES[step % len(SIZES)]
            count = max(1, round(args.pixels / size**2))
            return batch(self.images, strength, count, size, (args.seed, step))

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(make, self.step)
            for step in range(self.step, args.steps):
                ready = future.result()
                future = pool.submit(make, step + 1)
                yield ready

    def _stage_at(self, step: int) -> str:
        return next(name for name, end in self.ends.items() if step < end)

    def run(self) -> None:
        began, losses = time.monotonic(), []
        for spoilt, wanted in self.batches():
            name = self._stage_at(self.step)
            if name != self.name:
                self.stage.swap()
                self._begin(name)
            losses.append(self._learn(spoilt, wanted))
            self.step += 1
            if self.step % 50 == 0:
                spent = time.monotonic() - began
                print(
                    f"{self.name} {self.step}/{self.args.steps} {np.mean(losses):.4f} {spent:.0f} s",
                    flush=True,
                )
                losses = []
            if self.step % self.args.save_every == 0 or self.step in self.ends.values():
                self.save()

    def _learn(self, spoilt: Tensor, wanted: Tensor) -> float:
        rng = np.random.default_rng((self.args.seed, self.step, 1))
        prompt = self.prompts[rng.integers(len(self.prompts), size=len(spoilt))]
        value = loss(self.trained(spoilt, prompt), wanted, TONES.get(self.name, 0.0))
        torch.autograd.backward(value)
        self.stage.step(self.step - self.first)
        self.trained.zero_grad()  # also of what learns only in other stages
        if self.name != "adapters":
            balance(self.base.unet)
        return value.item()

    def save(self) -> None:
        """The state, and from the base on the deliverable, with averaged weights."""
        if self.name in ("base", "finish", "adapters"):
            self.stage.swap()
            with tempfile.TemporaryDirectory(dir=self.args.output.parent) as made:
                self._write(Path(made))
                _replace(Path(made), self.args.output)
            self.stage.swap()
        state = {"stage": self.name, "first": self.first, "step": self.step}
        state |= {"model": self.trained.state_dict(), "training": self.stage.state()}
        with atomic(self.args.state) as part:
            torch.save(state, part)

    def _write(self, folder: Path) -> None:
        if self.name == "adapters":
            save_adapters(self.model, folder)
            return
        self.base.write(self.model)
        save_base(self.model, folder / "base")
        fresh = copy.deepcopy(self.model)
        add_adapters(fresh)
        save_adapters(fresh, folder)


def _replace(source: Path, target: Path) -> None:
    """Move every file below `source` to its place below `target`, each in one step."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
