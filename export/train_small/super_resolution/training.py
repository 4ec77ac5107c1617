"""Two stages, base and adapters, that can stop and go on."""

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
from torch import Tensor, nn

from panotriton_export.train_small.super_resolution import data
from panotriton_export.train_small.super_resolution.adapters import add_adapters
from panotriton_export.train_small.super_resolution.codec import start_as_codec
from panotriton_export.train_small.super_resolution.loss import loss
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.saving import save_adapters, save_base
from panotriton_export.train_small.super_resolution.text import TAGS

__all__ = ["Run", "to_tensor"]

BASE_SHARE = 0.75  # of the steps; the adapters get the rest


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
