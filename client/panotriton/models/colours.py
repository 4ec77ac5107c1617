"""Give a super-resolved image the colours of what it was made from, by numpy and OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["align_colours"]

_WAVELET_LEVELS = 5
_ADAIN_EPSILON = 1e-5

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def align_colours(image: U8, reference: U8, align: str) -> U8:
    """Give `image` (H, W, 3) the colours of `reference`, its upscaled input of the same size.

    align is one of `contract.ALIGNMENTS`; `nofix` leaves the image alone.
    """
    if align == "adain":
        return _adain(image, reference)
    return _wavelet(image, reference) if align == "wavelet" else image


def _adain(image: U8, reference: U8) -> U8:
    """Match each channel's mean and deviation.

    The input has 256 values a channel, so the formula is evaluated 256 times, not once a pixel.
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
