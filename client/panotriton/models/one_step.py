"""What a one-step super-resolution network is: its models, its tiles, its sizes and its step.

Each network NAME is a module `panotriton.models.NAME` with a class `Network`, whose settings NAME.json
its export leaves beside the models that use it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import ServerStartError, quoted
from panotriton.pipeline.files import settings_file
from panotriton.pipeline.networks import NETWORKS, Roles

__all__ = ["TILES_A_REQUEST", "OneStepNetwork", "SizePlan", "read_network"]

TILES_A_REQUEST = 4
"""Of a network whose settings name no number: requests of several images are joined by the server."""

_BAND_PX = 256
_BICUBIC_ROWS = 2  # of the input that a row of a larger image reaches up and down

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The (height, width) of an image at each step on its way to the networks and back.

    enlarged: before upscaling, larger than the input only for small inputs; upscaled: × upscale;
    network: rounded down to what the network can work on; output: what the caller gets.
    """

    enlarged: tuple[int, int]
    upscaled: tuple[int, int]
    network: tuple[int, int]
    output: tuple[int, int]

    def prepare(self, image: U8) -> U8:
        """Resize one (h, w, 3) image to `network` size: bicubic up, then LANCZOS to the multiple.

        The image itself where it has that size.
        """
        if image.shape[:2] == self.network:
            return image
        picture = PILImage.fromarray(image)
        bicubic, lanczos = PILImage.Resampling.BICUBIC, PILImage.Resampling.LANCZOS
        steps = ((self.enlarged, bicubic), (self.upscaled, bicubic), (self.network, lanczos))
        for (height, width), resampling in steps:
            if picture.size != (width, height):
                picture = picture.resize((width, height), resampling)
        return np.asarray(picture)

    def bands(self, image: U8) -> list[slice]:
        """Rows of `prepare`'s result that `prepare_band` makes of a (h, w, 3) image, bit for bit alike.

        One band, of all rows, where that is not so: where it resizes twice, or by a factor whose multiples
        are no exact binary fractions.
        """
        height, width = image.shape[:2]
        times = self.network[0] // height
        alone = self.network == (times * height, times * width) == self.upscaled and times in (2, 4)
        step = _BAND_PX if alone else self.network[0]
        return [slice(y, min(y + step, self.network[0])) for y in range(0, self.network[0], step)]

    def prepare_band(self, image: U8, rows: slice, result: U8) -> None:
        """Write those rows of what `prepare` makes of (h, w, 3) `image` into `result` (rows, W, 3)."""
        height, width = image.shape[:2]
        times = self.network[0] // height
        box = (0, rows.start // times, width, rows.stop // times)
        size = (self.network[1], rows.stop - rows.start)
        reach = 2 * _BICUBIC_ROWS
        first = max(box[1] - reach, 0)  # so that only what is read is copied
        part = PILImage.fromarray(image[first : min(box[3] + reach, height)])
        box = (0, box[1] - first, width, box[3] - first)
        result[...] = part.resize(size, PILImage.Resampling.BICUBIC, box=box)

    def finish(self, image: U8) -> U8:
        """Bring a network-sized result to `output` size; only small inputs need it (bicubic)."""
        if image.shape[:2] == self.output:
            return image
        height, width = self.output
        return np.asarray(PILImage.fromarray(image).resize((width, height)))


class OneStepNetwork(ABC):
    """A network as a value. A subclass adds the arithmetic that is its own, and its settings.

    roles: its models; channels: of a latent; latent_px: pixels that a latent stands for, along a side;
    tile, overlap: of the denoiser's tiles, in latents; tiles_a_request: as many as fill its batch.
    """

    def __init__(self, settings: Mapping[str, Any], roles: Roles) -> None:
        self.roles = roles
        self.channels = int(settings["latent_channels"])
        self.latent_px = int(settings["vae_scale_factor"])
        self.tile = int(settings["latent_tile"])
        self.overlap = int(settings["latent_overlap"])
        self.tiles_a_request = int(settings.get("tiles_a_request", TILES_A_REQUEST))

    @abstractmethod
    def plan(self, height: int, width: int, upscale: int) -> SizePlan:
        """The sizes of an image on its way; those of the network are multiples of `latent_px`."""

    @abstractmethod
    def step(self, latent: F32, noise: F32) -> F32:
        """From an encoded image (C, h, w) and what the denoiser made of it to what is decoded."""


def read_network(folder: Path, name: str) -> OneStepNetwork:
    """The network `name` from the settings that its export left in `folder`.

    Settings that name no models are of an export before they did: they mean those of `NETWORKS`.
    Raises ServerStartError for a network that does not exist, and for settings that are not its.
    """
    kind = _network_class(name)
    path = folder / settings_file(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        roles = Roles(**settings["models"]) if "models" in settings else NETWORKS[name]
        return kind(settings, roles)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServerStartError(
            f"{path} is not as the export of {name} writes it ({type(error).__name__}: {error}); "
            "export the network again"
        ) from error


def _network_class(name: str) -> type[OneStepNetwork]:
    module, kind = f"{__package__}.{name}", None
    try:
        kind = getattr(import_module(module), "Network", None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    if kind is None:
        raise ServerStartError(
            f"no super-resolution network is called {quoted(name)}; expected a class Network in {module}"
        )
    found: type[OneStepNetwork] = kind
    return found
