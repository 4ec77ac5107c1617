"""Synthetic faults of a pair image and the scores that a pair with such a fault should get.

Images are RGB uint8, (H, W, 3), a pair being left half | right half. A strength is 0 (untouched)
to 1. Lengths are in units of H / 168: the fault looks the same at every size once the processor
has brought the pair to 168 × 336.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["FAULTS", "Scores", "degrade", "score"]

Image = NDArray[np.uint8]

FAULTS = ("blur", "noise", "blocking", "exposure", "mismatch")
_JUDGED_HEIGHT = 168
_MAX_SIGMA = 4.5  # blur at strength 1, in judged pixels
_MAX_NOISE = 80.0  # standard deviation at strength 1, in grey levels


@dataclass(frozen=True, slots=True)
class Scores:
    """The five sub-scores, each 0 to 1, in the order of the reply."""

    correlation: float
    balance: float
    richness: float
    clarity: float
    coherence: float

    @property
    def final(self) -> float:
        """Half the mean of the five, half the lowest: one serious fault is enough to sink a pair."""
        five: tuple[float, ...] = astuple(self)
        return 0.5 * sum(five) / 5 + 0.5 * min(five)


def degrade(
    pair: Image, fault: str, strength: float, rng: np.random.Generator, other: Image
) -> Image:
    """Return the pair with one fault of `FAULTS`. `other`, a pair of another scene and of the same
    shape, is what `mismatch` borrows from."""
    if strength <= 0:
        return pair
    if fault == "blur":
        return _blur(pair, strength)
    if fault == "noise":
        return _noise(pair, strength, rng)
    if fault == "blocking":
        return _blocking(pair, strength)
    if fault == "exposure":
        return _exposure(pair, strength, over=bool(rng.random() < 0.5))
    if fault == "mismatch":
        return _mismatch(pair, strength, rng, other)
    raise ValueError(f"fault is {fault!r}; expected one of {', '.join(FAULTS)}")


def score(clean: Image, degraded: Image, fault: str, strength: float, own_sigma: float) -> Scores:
    """The scores that the degraded pair should get.

    `own_sigma` is the blur, in judged pixels, that the undegraded pair has because its camera
    magnifies the panorama. What the eye can measure is measured: exposure on the degraded
    pair, variety and likeness of the halves on the clean one.
    """
    hurt = {name: strength if name == fault else 0.0 for name in FAULTS}
    sigma = float(np.hypot(own_sigma, _MAX_SIGMA * hurt["blur"]))
    texture = max(hurt["blur"], hurt["noise"], hurt["blocking"])
    torn, light = hurt["mismatch"], hurt["exposure"]
    seen = 0.4 * _balance(degraded) + 0.6 * _balance(clean)
    return Scores(
        correlation=_likeness(clean) * (1 - 0.85 * torn) * (1 - 0.25 * texture),
        balance=seen * (1 - 0.75 * light) * (1 - 0.1 * texture),
        richness=_richness(clean) * (1 - 0.4 * texture) * (1 - 0.55 * light),
        clarity=math.exp(-sigma / 3.4)
        * (1 - 0.9 * hurt["noise"] ** 0.8)
        * (1 - 0.9 * hurt["blocking"])
        * (1 - 0.5 * light),
        coherence=0.95 * (1 - 0.85 * torn) * (1 - 0.45 * texture) * (1 - 0.3 * light),
    )


def _blur(image: Image, strength: float) -> Image:
    sigma = _MAX_SIGMA * strength * image.shape[0] / _JUDGED_HEIGHT
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma))


def _noise(image: Image, strength: float, rng: np.random.Generator) -> Image:
    height, width = image.shape[:2]
    small = (_JUDGED_HEIGHT, round(width * _JUDGED_HEIGHT / height), 3)
    grain = rng.standard_normal(small, dtype=np.float32) * (_MAX_NOISE * strength)
    if (height, width) != small[:2]:
        grain = cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _blocking(image: Image, strength: float) -> Image:
    """JPEG at the judged size, so that its 8 × 8 blocks can be seen there; finer detail is lost."""
    height, width = image.shape[:2]
    small = _resize(image, _JUDGED_HEIGHT, round(width * _JUDGED_HEIGHT / height))
    quality = round(60 * (1 - strength) ** 2) + 2
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
    blocks = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if (height, width) != small.shape[:2]:
        blocks = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(blocks)


def _exposure(image: Image, strength: float, over: bool) -> Image:
    pixels = image.astype(np.float32)
    if over:
        pixels = pixels * (1 + 1.2 * strength) + 90 * strength
    else:
        pixels *= (1 - strength) ** 1.5 + 0.02
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _mismatch(pair: Image, strength: float, rng: np.random.Generator, other: Image) -> Image:
    """Exchange that share of the tiles, H / 12 a side on a grid laid at random, for tiles taken
    anywhere from another scene."""
    height, width = pair.shape[:2]
    side = height // 12
    top, left = rng.integers(1 - side, 1, size=2)
    cells = [(y, x) for y in range(top, height, side) for x in range(left, width, side)]
    out = pair.copy()
    for i in rng.permutation(len(cells))[: max(1, round(strength * len(cells)))]:
        y, x = (max(0, edge) for edge in cells[i])
        bottom, right = min(height, cells[i][0] + side), min(width, cells[i][1] + side)
        v, u = rng.integers(height - side + 1), rng.integers(width - side + 1)
        out[y:bottom, x:right] = other[v : v + bottom - y, u : u + right - x]
    return out


def _resize(image: Image, height: int, width: int) -> Image:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def _thumbnail(image: Image) -> Image:
    return _resize(image, 56, round(56 * image.shape[1] / image.shape[0]))


def _likeness(pair: Image) -> float:
    """0.65 to 0.97 by how far the colour histograms (6 × 6 × 6) of the halves overlap."""
    small = _thumbnail(pair)
    middle = small.shape[1] // 2
    left, right = (_histogram(half) for half in (small[:, :middle], small[:, middle:]))
    shared = float(np.minimum(left, right).sum())
    return 0.68 + 0.29 * math.pow(shared, 0.6)


def _histogram(image: Image) -> NDArray[np.float64]:
    bins = (image.reshape(-1, 3) // 43).astype(np.int64)
    counts = np.bincount(bins @ np.array([36, 6, 1]), minlength=216)
    return np.asarray(counts / counts.sum())


def _balance(pair: Image) -> float:
    """Falls as the mean leaves mid-grey, as pixels clip, and as one half is flatter than it should be."""
    grey = cv2.cvtColor(_thumbnail(pair), cv2.COLOR_RGB2GRAY) / 255.0
    middle = grey.shape[1] // 2
    halves = [_half_balance(grey[:, :middle]), _half_balance(grey[:, middle:])]
    return 0.6 * min(halves) + 0.4 * max(halves)


def _half_balance(grey: NDArray[np.float64]) -> float:
    off = max(0.0, abs(float(grey.mean()) - 0.45) - 0.12)
    clipped = float(((grey < 0.05) | (grey > 0.95)).mean())
    return max(0.03, 0.96 - 1.3 * off - 0.6 * clipped)


def _richness(pair: Image) -> float:
    """Entropy of the grey levels and colourfulness (Hasler and Süsstrunk, 2003), and edges."""
    small = _thumbnail(pair)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    shares = np.bincount(grey.ravel() // 8, minlength=32) / grey.size
    entropy = -float((shares[shares > 0] * np.log2(shares[shares > 0])).sum()) / 5
    red, green, blue = (small[..., i].astype(np.float32) for i in range(3))
    a, b = red - green, (red + green) / 2 - blue
    colour = np.hypot(a.std(), b.std()) + 0.3 * np.hypot(a.mean(), b.mean())
    edges = float(np.abs(cv2.Laplacian(grey.astype(np.float32), cv2.CV_32F)).mean())
    variety = 0.3 * entropy + 0.15 * min(1.0, colour / 50) + 0.2 * min(1.0, edges / 25)
    return float(np.clip(1.9 * variety - 0.20, 0.05, 0.95))
