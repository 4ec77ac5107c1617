"""Work on a plane in tiles: windows that fade into each other, and Gaussian-weighted blending."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["TileBlend", "Window", "windows"]

_GAUSSIAN_VARIANCE = 0.01

F32 = NDArray[np.float32]


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
