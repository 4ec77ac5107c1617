"""Sizes of images that a deployment expects."""

from __future__ import annotations

from dataclasses import dataclass

from panotriton.errors import InvalidInput, quoted
from panotriton.pipeline.contract import DEFAULTS

__all__ = ["PIPELINE_SIZES", "ImageSize"]


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
