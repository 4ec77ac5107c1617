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
from panotriton_export.train_small.super_resolution.codec import hold_carried, start_as_codec
from panotriton_export.train_small.super_resolution.loss import loss
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.saving import save_adapters, save_base
from panotriton_export.train_small.super_resolution.soap import Soap
from panotriton_export.train_small.super_resolution.text import TAGS

__all__ = ["Run", "to_tensor"]

Group = dict[str, Any]  # "params", and "share" of the rate
BASE_SHARE = 0.92  # of the steps; the adapters get the rest
SIZES = (128, 96, 128, 192)  # px of crops, in turn


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
    """Learning rate: a short climb, the peak for 0.6 of the steps, then half a cosine down to a hundredth.

    Up to there a shorter run is the beginning of a longer one.
    """
    warm = min(1.0, (step + 1) / 100)
    left = min(1.0, (1 - step / steps) / 0.4)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left)))


def replicas(model: SmallOsediff, count: int) -> list[SmallOsediff]:
    """The model and copies of it that share its weights but not their gradients."""
    copies = [copy.deepcopy(model) for _ in range(count - 1)]
    for each in copies:
        for own, shared in zip(each.parameters(), model.parameters(), strict=True):
            own.data = shared.data
    return [model, *copies]


def _backward(model: SmallOsediff, part: tuple[Tensor, Tensor, Tensor]) -> float:
    spoilt, prompt, wanted = part
    value = loss(model(spoilt, prompt), wanted)
    torch.autograd.backward(value)
    return value.item()


def _gather(models: list[SmallOsediff]) -> None:
    """Leave the mean of all gradients with the first."""
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        if first.grad is None:
            continue
        for other in others:
            first.grad += other.grad
            other.grad = None
        first.grad /= len(models)


class Stage:
    """One stage's parameters, optimiser, and running average of the weights (what is kept)."""

    def __init__(self, groups: list[Group], peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps
        self.parameters = [each for group in groups for each in group["params"]]
        self.optimiser = Soap(groups, peak)
        self.average: list[Tensor] = [each.detach().clone() for each in self.parameters]

    def step(self, step: int) -> None:
        """Learn from the parameters' gradients, and forget them."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate(step, self.steps, self.peak) * group["share"]
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        decay = min(0.999, (step + 1) / (step + 10))
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
            *batch(self.images, data.CLEAN, 32, 128, (args.seed, -1 % 2**32)),
        )
        self.model.to(memory_format=torch.channels_last)
        self.prompts = prompts(self.model, args.seed)
        self.base_steps = round(args.steps * BASE_SHARE)
        self.step = 0
        self.pool = ThreadPoolExecutor(
            args.threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._begin("base")
        if args.state.exists():
            self._restore(torch.load(args.state, weights_only=True))

    def _begin(self, name: str) -> None:
        """Start a stage from the weights as they are."""
        base = name == "base"
        model = self.model
        groups: list[Group] = (
            [
                {"params": [*model.vae.parameters()], "share": self.args.vae_share},
                {"params": [*model.unet.parameters()], "share": 1.0},
            ]
            if base
            else [{"params": add_adapters(model), "share": 1.0}]
        )
        steps = self.base_steps if base else self.args.steps - self.base_steps
        self.name = name
        self.replicas = replicas(model, self.args.threads)
        if base:
            for each in self.replicas:
                hold_carried(each.vae)
        self.stage = Stage(groups, self.args.rate if base else self.args.rate / 4, steps)

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
            size = SIZES[step % len(SIZES)]
            count = args.threads * max(1, round(args.pixels / args.threads / size**2))
            return batch(self.images, strength, count, size, (args.seed, step))

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
        parts = zip(
            *(each.chunk(self.args.threads) for each in (spoilt, prompt, wanted)), strict=True
        )
        values = list(self.pool.map(_backward, self.replicas, parts))
        _gather(self.replicas)
        self.stage.step(self.step - first)
        return float(np.mean(values))

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
