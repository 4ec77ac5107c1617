"""The arithmetic of OSEDiff around its networks: sizes, tiles, the one step and colour alignment.

OSEDiff: "One-Step Effective Diffusion Network for Real-World Image Super-Resolution", Wu et al.,
NeurIPS 2024. Everything here is numpy, Pillow and OpenCV; the networks are run by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import InvalidInput

__all__ = [
    "ALIGNMENTS",
    "SizePlan",
    "TileBlend",
    "Window",
    "align",
    "check_options",
    "one_step",
    "plan_size",
    "windows",
]

ALIGNMENTS = ("adain", "wavelet", "nofix")
MAX_UPSCALE = 4
_MULTIPLE_PX = 8
_GAUSSIAN_VARIANCE = 0.01
_WAVELET_LEVELS = 5
_ADAIN_EPSILON = 1e-5

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The (height, width) of an image at each step on its way to the networks and back.

    enlarged: before upscaling, larger than the input only for small inputs; upscaled: × upscale;
    network: rounded down to a multiple of 8; output: what the caller gets.
    """

    enlarged: tuple[int, int]
    upscaled: tuple[int, int]
    network: tuple[int, int]
    output: tuple[int, int]

    def prepare(self, image: U8) -> U8:
        """Resize one (h, w, 3) image to `network` size: bicubic up, then LANCZOS to the multiple."""
        picture = PILImage.fromarray(image)
        bicubic, lanczos = PILImage.Resampling.BICUBIC, PILImage.Resampling.LANCZOS
        steps = ((self.enlarged, bicubic), (self.upscaled, bicubic), (self.network, lanczos))
        for (height, width), resampling in steps:
            if picture.size != (width, height):
                picture = picture.resize((width, height), resampling)
        return np.asarray(picture)

    def finish(self, image: U8) -> U8:
        """Bring a network-sized result to `output` size; only small inputs need it (bicubic)."""
        if image.shape[:2] == self.output:
            return image
        height, width = self.output
        return np.asarray(PILImage.fromarray(image).resize((width, height)))


def check_options(upscale: int, method: str) -> None:
    """Raise InvalidInput unless upscale is 1 to 4 and the colour alignment is a known one."""
    if not 1 <= upscale <= MAX_UPSCALE:
        raise InvalidInput(f"UPSCALE is {upscale}; expected 1 to {MAX_UPSCALE}")
    if method not in ALIGNMENTS:
        raise InvalidInput(f"ALIGN is {method!r}; expected one of {', '.join(ALIGNMENTS)}")


def plan_size(height: int, width: int, upscale: int, process_size: int = 512) -> SizePlan:
    """Upstream's size rules: a short side below process_size/upscale is first enlarged to it."""
    least = process_size // upscale
    enlarged = (height, width)
    if min(enlarged) < least:
        scale = least / min(enlarged)
        enlarged = (int(scale * height), int(scale * width))
    upscaled = (enlarged[0] * upscale, enlarged[1] * upscale)
    network = (_round_down(upscaled[0]), _round_down(upscaled[1]))
    small = enlarged != (height, width)
    return SizePlan(
        enlarged, upscaled, network, (upscale * height, upscale * width) if small else network
    )


def _round_down(side: int) -> int:
    return side - side % _MULTIPLE_PX


def one_step(latent: F32, noise: F32, alpha_cumprod: float) -> F32:
    """x0 = (z - √(1-ᾱ)·ε)/√ᾱ at the last time step, in fp32: an error in ε grows 14.6 times."""
    scale = np.float32(1 / np.sqrt(alpha_cumprod))
    noise_scale = np.float32(np.sqrt(1 - alpha_cumprod) / np.sqrt(alpha_cumprod))
    return latent * scale - noise * noise_scale


@dataclass(frozen=True, slots=True)
class Window:
    """A tile of a plane: `read` slices the plane, `weights` (h, w) are the tile's share of the result.

    The weights of all windows sum to 1 at every place of the plane.
    """

    read: tuple[slice, slice]
    weights: F32


def windows(height: int, width: int, tile: int, pad: int) -> Iterator[Window]:
    """Cover a plane with cores of `tile`, each read with `pad` of context; equal tile shapes.

    Every tile is min(side, tile + 2·pad) long, clamped to the plane, so that all of one plane have
    one shape and can share a batch. Where two overlap, one fades into the other.
    """
    columns = list(_fading(width, tile, pad))
    for y, along_y in _fading(height, tile, pad):
        for x, along_x in columns:
            yield Window((y, x), np.outer(along_y, along_x))


def _fading(side: int, tile: int, pad: int) -> Iterator[tuple[slice, F32]]:
    """Spans of one axis and their weights: ramps over 2·pad from each end that is not the plane's."""
    length = min(side, tile + 2 * pad)
    starts = [min(max(core - pad, 0), side - length) for core in range(0, side, tile)]
    spans = [slice(start, start + length) for start in dict.fromkeys(starts)]
    ramp = (np.arange(length, dtype=np.float32) + 1) / (2 * pad + 1)
    raw = [
        np.minimum(ramp if span.start else 1, ramp[::-1] if span.stop < side else 1).clip(max=1)
        * np.ones(length, np.float32)
        for span in spans
    ]
    total = np.zeros(side, np.float32)
    for span, weights in zip(spans, raw, strict=True):
        total[span] += weights
    for span, weights in zip(spans, raw, strict=True):
        yield span, weights / total[span]


class TileBlend:
    """Gaussian-weighted blending of overlapping latent tiles, accumulated in fp32.

    Tiles are square, `tile` latents a side (less where the latent is smaller), at steps of
    tile - overlap, the last one clamped to the edge.
    """

    def __init__(self, shape: tuple[int, int, int], tile: int, overlap: int) -> None:
        channels, height, width = shape
        self.tile = min(tile, height, width)
        self.positions = [
            (y, x)
            for y in _starts(height, self.tile, overlap)
            for x in _starts(width, self.tile, overlap)
        ]
        self._weights = _gaussian_weights(self.tile)
        self._sum = np.zeros((channels, height, width), np.float32)
        self._total = np.zeros((height, width), np.float32)

    def cut(self, latent: F32, positions: list[tuple[int, int]]) -> F32:
        """Stack the tiles at `positions` of latent (C, h, w) → (T, C, tile, tile)."""
        t = self.tile
        return np.stack([latent[:, y : y + t, x : x + t] for y, x in positions])

    def add(self, tiles: F32, positions: list[tuple[int, int]]) -> None:
        """Add network outputs (T, C, tile, tile) where their tiles were cut."""
        t = self.tile
        for result, (y, x) in zip(tiles, positions, strict=True):
            self._sum[:, y : y + t, x : x + t] += result * self._weights
            self._total[y : y + t, x : x + t] += self._weights

    def result(self) -> F32:
        """The blended (C, h, w)."""
        return self._sum / self._total


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    count = 1 if side <= tile else -(-(side - tile) // (tile - overlap)) + 1
    return [min(i * (tile - overlap), side - tile) for i in range(count)]


def _gaussian_weights(tile: int) -> F32:
    # Upstream's midpoints differ: (tile-1)/2 along x, tile/2 along y. Kept, to match its images.
    index = np.arange(tile, dtype=np.float64)
    along_x = _gaussian(index - (tile - 1) / 2, tile)
    along_y = _gaussian(index - tile / 2, tile)
    return np.outer(along_y, along_x).astype(np.float32)


def _gaussian(offset: NDArray[np.float64], tile: int) -> NDArray[np.float64]:
    norm = np.sqrt(2 * np.pi * _GAUSSIAN_VARIANCE)
    return np.asarray(np.exp(-(offset**2) / tile**2 / (2 * _GAUSSIAN_VARIANCE)) / norm)


def align(image: U8, reference: U8, method: str) -> U8:
    """Give `image` (H, W, 3) the colours of `reference`, its upscaled input of the same size.

    method is one of `ALIGNMENTS`; `nofix` leaves the image alone.
    """
    if method == "adain":
        return _adain(image, reference)
    return _wavelet(image, reference) if method == "wavelet" else image


def _adain(image: U8, reference: U8) -> U8:
    """Match each channel's mean and deviation.

    The input has 256 values per channel, so the formula is evaluated 256 times, not once per pixel.
    """
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    table = np.empty((1, 256, 3), np.uint8)
    for c in range(3):
        mean, deviation = _mean_and_deviation(image, c)
        target_mean, target_deviation = _mean_and_deviation(reference, c)
        moved = (values - mean) / deviation * target_deviation + target_mean
        table[0, :, c] = _to_uint8(moved)
    return np.asarray(cv2.LUT(image, table))


def _mean_and_deviation(image: U8, channel: int) -> tuple[np.float32, np.float32]:
    """Mean and √(unbiased variance + 1e-5) of a channel in [0, 1], from its exact histogram."""
    counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.float64)
    values = np.arange(256) / 255
    n = counts.sum()
    mean = (counts * values).sum() / n
    variance = (counts * (values - mean) ** 2).sum() / (n - 1)
    return np.float32(mean), np.float32(np.sqrt(variance + _ADAIN_EPSILON))


def _wavelet(image: U8, reference: U8) -> U8:
    """High frequencies of the image on the low ones of the reference."""
    own = image.astype(np.float32) / np.float32(255)
    high = own - _low_band(own)
    return _to_uint8(high + _low_band(reference.astype(np.float32) / np.float32(255)))


def _low_band(image: F32) -> F32:
    # Five 3×3 blurs [1 2 1]ᵀ[1 2 1]/16 whose taps lie 1, 2, 4, 8 and 16 px apart.
    for level in range(_WAVELET_LEVELS):
        taps = np.zeros(2 * 2**level + 1, np.float32)
        taps[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        image = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    return image


def _to_uint8(image: F32) -> U8:
    # Truncates, as torchvision's ToPILImage does.
    return (np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)
