"""Sizes of images that a deployment expects, and what OSEDiff works at."""

from __future__ import annotations

from dataclasses import dataclass

from panotriton.errors import InvalidInput, quoted
from panotriton.pipeline.contract import DEFAULTS, INTERVALS, MAX_SR_PIXELS, Options

__all__ = ["PIPELINE_SIZES", "ImageSize", "check_group", "enlarged_size", "network_size"]

_PROCESS_SIZE = 512
_MULTIPLE_PX = 8


@dataclass(frozen=True, slots=True)
class ImageSize:
    """An image of a request, in px, and how many times larger it is to become."""

    height: int
    width: int
    upscale: int = DEFAULTS.upscale

    @classmethod
    def of(cls, text: str) -> ImageSize:
        """512x1024@2: height x width, and upscale, 2 where it is left out. Raises InvalidInput."""
        size, _, upscale = text.partition("@")
        sides = size.split("x")
        words = [*sides, upscale or str(DEFAULTS.upscale)]
        if len(sides) != 2 or not all(each.isdecimal() and int(each) for each in words):
            raise InvalidInput(
                f"{quoted(text)} is no size; expected HxW or HxW@UPSCALE, as 512x1024@2"
            )
        return cls(*map(int, words))


PIPELINE_SIZES = (ImageSize(512, 1024), ImageSize(512, 512))
"""A group's: pairs and in-between views."""


def enlarged_size(
    height: int, width: int, upscale: int, process_size: int = _PROCESS_SIZE
) -> tuple[int, int]:
    """As upstream does before it upscales: a short side below process_size / upscale becomes that long."""
    least = process_size // upscale
    scale = max(1.0, least / min(height, width))
    return int(scale * height), int(scale * width)


def network_size(
    height: int, width: int, upscale: int, process_size: int = _PROCESS_SIZE
) -> tuple[int, int]:
    """What the networks see: the enlarged image, upscaled, its sides rounded down to multiples of 8 px."""
    sides = (upscale * side for side in enlarged_size(height, width, upscale, process_size))
    tall, wide = (side - side % _MULTIPLE_PX for side in sides)
    return tall, wide


def check_group(options: Options) -> Options:
    """Itself; raises InvalidInput for what super-resolution would refuse once all is scored and described.

    Each option may be in range and their product not: pairs and views are a request each, and every interval
    may be kept.
    """
    size, views = options.crop_size, 2 * INTERVALS * options.interpolations
    for count, what, width in (
        (2 * INTERVALS, "pairs", 2 * size),
        (views, "in-between views", size),
    ):
        tall, wide = network_size(size, width, options.upscale)
        if count * tall * wide > MAX_SR_PIXELS:
            raise InvalidInput(
                f"a group may have {count} {what} of {wide}×{tall} px, super-resolved; expected at most "
                f"{MAX_SR_PIXELS / 1e6:.0f} megapixels: lower crop_size, upscale or interpolations, or ask "
                "for the images one by one (stream)"
            )
    return options
