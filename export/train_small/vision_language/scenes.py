"""Training material: pairs cut from a few panoramas as the pipeline cuts them, varied and degraded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from panotriton.pipeline.camera import Camera, Sphere, sample_cameras

from .degrade import FAULTS, Scores, degrade, score

__all__ = [
    "HELD_OUT",
    "Sample",
    "Scene",
    "cut",
    "load_panoramas",
    "make_sample",
    "own_sigma",
    "vary",
]

HELD_OUT = ("city", "forest")  # never trained on
PAIR_HEIGHT = 168  # what the processor makes of a 1024 × 2048 pair
VIEW_SIDE = 224  # and of a 1024 × 1024 view

# How often "none" and each of FAULTS is drawn: noise and exposure are easy, mismatch is not.
_SHARES = (0.2, 0.13, 0.1, 0.16, 0.11, 0.3)

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """One pair at the size that the model sees."""

    panorama: str
    pair: Image  # (168, 336, 3), or (512, 1024, 3) where cut whole
    right: Image  # (224, 224, 3)
    sigma: float  # blur from magnifying the panorama, in pixels of `pair`


@dataclass(frozen=True, slots=True)
class Sample:
    pair: Image  # (168, 336, 3), degraded
    scores: Scores
    fault: str  # one of FAULTS or "none"
    strength: float


def load_panoramas(folder: Path, names: Sequence[str] | None = None) -> dict[str, Image]:
    """Read NAME.jpg of a folder as RGB (H, W, 3); all but `HELD_OUT` where no names are given."""
    wanted = names or [p.stem for p in sorted(folder.glob("*.jpg")) if p.stem not in HELD_OUT]
    images = {}
    for name in wanted:
        image = cv2.imread(str(folder / f"{name}.jpg"), cv2.IMREAD_COLOR)
        if image is None:
            raise FileNotFoundError(f"{folder / name}.jpg is not a readable image")
        images[name] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return images


def cut(panoramas: dict[str, Image], seeds: Sequence[int], whole: bool = False) -> list[Scene]:
    """Cut 16 pairs of every panorama for every seed, with the pipeline's own cameras.

    `whole` keeps the pair at 512 × 1024 instead of the size that the model sees.
    """
    spheres = {name: Sphere(image) for name, image in panoramas.items()}
    scenes = []
    for seed in seeds:
        cameras = sample_cameras(seed).reshape(16, 2, 5)
        for name, sphere in spheres.items():
            for row in cameras:
                left, right = (Camera.from_array(camera) for camera in row)
                scenes.append(_scene(name, sphere, left, right, whole))
    return scenes


def _scene(name: str, sphere: Sphere, left: Camera, right: Camera, whole: bool) -> Scene:
    views = [torch.from_numpy(sphere.crop(camera)) for camera in (left, right)]
    halves = [view.numpy() if whole else _shrink(view, PAIR_HEIGHT, PAIR_HEIGHT) for view in views]
    pair = np.concatenate(halves, axis=1)
    sigma = (own_sigma(left) + own_sigma(right)) / 2
    return Scene(name, pair, _shrink(views[1], VIEW_SIDE, VIEW_SIDE), sigma)


def _shrink(view: torch.Tensor, height: int, width: int) -> Image:
    """(H, W, 3) uint8 → (height, width, 3), bicubic and antialiased as the processor does it."""
    planes = view.permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    planes = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return planes[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def own_sigma(camera: Camera, crop_px: int = 512) -> float:
    """Blur in judged pixels of an undegraded view: the panorama's pixel as seen at the view's centre."""
    half = np.sin(np.radians(camera.vfov) / 2)
    focal = 0.5 * (PAIR_HEIGHT / 2) * (camera.xi + np.sqrt(1 - half**2)) / half
    pixels_per_radian = focal / (1 + camera.xi)
    # The panorama is resized to crop_px × crop_px: its pixel is 2π/crop_px wide, π/crop_px high.
    return float(0.45 * pixels_per_radian * np.sqrt(2) * np.pi / crop_px)


def vary(image: Image, rng: np.random.Generator) -> Image:
    """Mirror, tint and sharpen at random: a few panoramas stand in for many."""
    pixels = image[:, ::-1] if rng.random() < 0.5 else image
    pixels = pixels[::-1] if rng.random() < 0.3 else pixels
    if rng.random() < 0.25:
        pixels = pixels[..., rng.permutation(3)]
    pixels = np.ascontiguousarray(pixels)
    if rng.random() < 0.6:  # what super-resolution adds
        amount = rng.uniform(0, 0.8)
        soft = cv2.GaussianBlur(pixels, (0, 0), 1.0)
        pixels = cv2.addWeighted(pixels, 1 + amount, soft, -amount, 0)
    keep = rng.uniform(0.6, 1.4)  # saturation
    mix = np.eye(3) * keep + (1 - keep) / 3
    mix = mix * rng.uniform(0.85, 1.12, (3, 1))
    curve = ((np.arange(256) / 255) ** rng.uniform(0.8, 1.25) * 255).astype(np.uint8)
    return np.asarray(cv2.LUT(cv2.transform(pixels, mix), curve))


def make_sample(
    scenes: Sequence[Scene], rng: np.random.Generator, fault: str | None = None, varied: bool = True
) -> Sample:
    """Draw a pair, vary it and give it one fault, or none."""
    scene = scenes[rng.integers(len(scenes))]
    other = _other(scenes, scene, rng)
    clean, foreign = scene.pair, other.pair
    if varied:
        clean = vary(clean, rng)
    fault = fault or str(rng.choice(["none", *FAULTS], p=_SHARES))
    if varied and fault == "mismatch":
        foreign = vary(foreign, rng)
    if fault == "none":
        if varied:
            clean = _degraded(clean, "blur", 0.0, rng, clean)
        return Sample(clean, score(clean, clean, fault, 0.0, scene.sigma), fault, 0.0)
    strength = float(rng.uniform())
    make = _degraded if varied else degrade
    pair = make(clean, fault, strength, rng, foreign)
    return Sample(pair, score(clean, pair, fault, strength, scene.sigma), fault, strength)


def _degraded(
    clean: Image, fault: str, strength: float, rng: np.random.Generator, foreign: Image
) -> Image:
    """Half the time as it is; half the time enlarged, degraded and reduced, as served pairs are."""
    if rng.random() < 0.5:
        return degrade(clean, fault, strength, rng, foreign)
    large = degrade(_enlarge(clean), fault, strength, rng, _enlarge(foreign))
    return _shrink(torch.from_numpy(large), *clean.shape[:2])


def _enlarge(image: Image) -> Image:
    size = (3 * image.shape[1], 3 * image.shape[0])
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))


def _other(scenes: Sequence[Scene], scene: Scene, rng: np.random.Generator) -> Scene:
    while True:
        other = scenes[rng.integers(len(scenes))]
        if other.panorama != scene.panorama:
            return other
