"""What the small model is taught to say: the six lines, the score or level alone, and a description in
three sentences."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from panotriton.pipeline.quality import LEVEL_SKELETON, LEVELS, NUMBER_SKELETON

from .degrade import Scores

__all__ = ["Look", "Reply", "describe", "level", "look_at", "number", "six_lines"]

Image = NDArray[np.uint8]

_NAMES = (
    "Correlation",
    "Information Balance",
    "Subject Richness",
    "Image Clarity",
    "Content Coherence",
    "Final Score",
)


@dataclass(frozen=True, slots=True)
class Reply:
    said: str  # what the model learns to say
    given: str = ""  # what it is made to begin with


def six_lines(scores: Scores) -> Reply:
    values = (*astuple(scores), scores.final)
    lines = (f"{name}: {value:.2f}" for name, value in zip(_NAMES, values, strict=True))
    return Reply("\n".join(lines))


def number(scores: Scores) -> Reply:
    """The final score alone; no score that is taught reaches 1."""
    return Reply(f"{scores.final:.2f}", NUMBER_SKELETON.removesuffix("0."))


def level(scores: Scores, rng: np.random.Generator) -> Reply:
    """One of the two words around the final score, the nearer one likelier: their mean is the score."""
    words, weights = list(LEVELS), np.array(list(LEVELS.values()))  # (5,), falling evenly
    place = float(np.clip((weights[0] - scores.final) / (weights[0] - weights[1]), 0, 4))
    below = int(place) + int(rng.random() < place % 1)
    return Reply(words[below], LEVEL_SKELETON)


@dataclass(frozen=True, slots=True)
class Look:
    """What a description is made from, each measured on the picture, in about -1 to 1."""

    light: float  # mean luma
    contrast: float  # standard deviation of the luma
    colour: float  # mean saturation of RGB, max minus min
    detail: float  # mean absolute Laplacian
    down: float  # luma of the lower third minus the upper third
    across: float  # luma of the right third minus the left third
    red: float  # mean of each channel minus the mean luma
    green: float
    blue: float


def look_at(image: Image) -> Look:
    """Measure an RGB picture (H, W, 3) uint8 of any size."""
    small = cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    rgb = small.astype(np.float32) / 255
    means = rgb.mean(axis=(0, 1)) - rgb.mean()
    return Look(
        light=float(grey.mean()),
        contrast=float(grey.std()),
        colour=float((rgb.max(axis=2) - rgb.min(axis=2)).mean()),
        detail=float(np.abs(cv2.Laplacian(grey, cv2.CV_32F)).mean()),
        down=float(grey[56:].mean() - grey[:28].mean()),
        across=float(grey[:, 56:].mean() - grey[:, :28].mean()),
        red=float(means[0]),
        green=float(means[1]),
        blue=float(means[2]),
    )


def describe(look: Look) -> Reply:
    light = _word(look.light, (0.2, "dark"), (0.36, "dim"), (0.6, "evenly lit"), "bright")
    contrast = _word(look.contrast, (0.13, "soft"), (0.22, "moderate"), "strong")
    detail = _word(
        look.detail,
        (0.035, "Large smooth surfaces fill the frame"),
        (0.09, "Smooth areas alternate with finer detail"),
        "Fine detail covers most of the frame",
    )
    colour = _word(look.colour, (0.08, "almost colourless"), (0.2, "muted"), "vivid")
    article = "An" if light[0] == "e" else "A"
    return Reply(
        f"{article} {light} scene in {_tone(look)} tones with {contrast} contrast. "
        f"{_layout(look)}. {detail}, and the colours are {colour}."
    )


def _word(value: float, *steps: tuple[float, str] | str) -> str:
    for step in steps:
        if isinstance(step, str):
            return step
        if value < step[0]:
            return step[1]
    raise ValueError("the last step must be a plain word")


def _tone(look: Look) -> str:
    red, green, blue = look.red, look.green, look.blue
    if max(abs(red), abs(green), abs(blue)) < 0.025:
        return "grey"
    if blue == max(red, green, blue):
        return "violet" if red > green else "blue"
    if green == max(red, green, blue):
        return "green"
    return "brown" if green > blue else "reddish"


def _layout(look: Look) -> str:
    if max(abs(look.down), abs(look.across)) < 0.08:
        return "Light is spread evenly over the view"
    if abs(look.down) >= abs(look.across):
        side = "lower" if look.down > 0 else "upper"
    else:
        side = "right" if look.across > 0 else "left"
    return f"The {side} part is the lightest, the opposite side lies in shade"
