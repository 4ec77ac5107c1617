"""Freely licensed photographs and the x2 degradation that the small OSEDiff is trained on.

Images are RGB uint8 (H, W, 3). A degraded image is what the server hands to the VAE encoder: half
the size, spoilt, and brought back to the full size by Pillow's bicubic filter.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

__all__ = [
    "CLEAN",
    "HELD_OUT",
    "SOURCES",
    "STRENGTHS",
    "UNSEEN",
    "Image",
    "Source",
    "Strength",
    "degrade",
    "enlarge",
    "jpeg",
    "load",
    "recolour",
    "sample",
    "soften",
]

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a photograph comes from. `package` is a Debian package or a Python wheel."""

    author: str
    licence: str
    package: str


_LOMIRI = "lomiri-wallpapers-16.04 (Debian)"
_LOMIRI_20 = "lomiri-wallpapers-20.04 (Debian)"
_MATE = "mate-backgrounds (Debian)"
_SKIMAGE = "scikit-image 0.26.0 (PyPI)"
_SKLEARN = "scikit-learn 1.9.1 (PyPI)"
_HAVEN = "Greg Zaal, HDRI Haven"
_BLENDER = "blender-data (Debian), tone-mapped"

# Only CC0, public domain and CC BY: nothing here asks that the weights be shared alike.
SOURCES: dict[str, Source] = {
    "Picture_0B_by_freespace.jpg": Source("Trevor “Freespace”", "CC BY 4.0", _LOMIRI),
    "Picture_1A_by_freespace.jpg": Source("Trevor “Freespace”", "CC BY 4.0", _LOMIRI),
    "Wine_by_Jakkub_Mede.jpg": Source("Jakub Mede", "CC BY 4.0", _LOMIRI),
    "aitzgorri_by_Aitzol_Berasategi.jpg": Source("Aitzol Berasategi", "CC BY 4.0", _LOMIRI),
    "friends_by_Aitzol_Berasategi.jpg": Source("Aitzol Berasategi", "CC BY 4.0", _LOMIRI),
    "life_by_Aitzol_Berasategi.jpg": Source("Aitzol Berasategi", "CC BY 4.0", _LOMIRI),
    "picosdeeuropa_by_Aitzol_Berasategi.jpg": Source("Aitzol Berasategi", "CC BY 4.0", _LOMIRI),
    "sunset_by_Aitzol_Berasategi.jpg": Source("Aitzol Berasategi", "CC BY 4.0", _LOMIRI),
    "seeding_by_Clements_Engelhardt.jpg": Source("Clemens Engelhardt", "CC0 1.0", _LOMIRI),
    "flower.jpg": Source("vultilion", "CC BY 2.0", _SKLEARN),
    "astronaut.png": Source("NASA", "public domain", _SKIMAGE),
    "brick.png": Source("CC0 Textures", "CC0 1.0", _SKIMAGE),
    "camera.png": Source("Lav Varshney", "CC0 1.0", _SKIMAGE),
    "coffee.png": Source("Rachel Michetti, Pikolo Espresso Bar", "CC0 1.0", _SKIMAGE),
    "grass.png": Source("CC0 Textures", "CC0 1.0", _SKIMAGE),
    "gravel.png": Source("CC0 Textures", "CC0 1.0", _SKIMAGE),
    "rocket.jpg": Source("SpaceX", "public domain", _SKIMAGE),
    "courtyard.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
    "interior.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
    "sunrise.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
    "sunset.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
}
# Never trained on, but looked at while the networks were designed: README.md's first table.
HELD_OUT: dict[str, Source] = {
    "city.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
    "forest.jpg": Source(_HAVEN, "CC0 1.0", _BLENDER),
    "china.jpg": Source("danielbuechele", "CC BY 2.0", _SKLEARN),
    "chelsea.png": Source("Stéfan van der Walt", "CC0 1.0", _SKIMAGE),
    "Dragonfly_by_Bolly.jpg": Source("“Bolly”", "CC BY-SA 4.0", _LOMIRI),
}
# Its second table.
UNSEEN: dict[str, Source] = {
    "Bridge_by_Sander_Klootwijk.jpg": Source("Sander Klootwijk", "CC BY-SA 4.0", _LOMIRI),
    "Kleiber_by_Lukas_Baubkus.jpg": Source("Lukas Baubkus", "CC BY-SA 3.0", _LOMIRI_20),
    "motorcycle_left.png": Source("Scharstein et al., Middlebury", "CC0 1.0", _SKIMAGE),
    "Dune.jpg": Source("Marco Cogoni, Hylke Bons", "GPL-2+", _MATE),
    "GreenMeadow.jpg": Source("Timothy Schellhase, Lapo Calamandrei", "GPL-2+", _MATE),
    "LadyBird.jpg": Source("Charles Barbin", "GPL-2+", _MATE),
}


@dataclass(frozen=True, slots=True)
class Strength:
    """How hard `degrade` may hit: chances 0 to 1, blur and magnification in low-resolution pixels,
    noise in grey levels, JPEG quality as Pillow counts it. clean: the chance of halving alone. soft: of a
    target that is out of focus itself. recoloured: of one whose channels are exchanged."""

    clean: float
    blur: float
    blur_sigma: tuple[float, float]
    magnify: float
    magnify_factor: tuple[float, float]
    noise: float
    noise_sigma: tuple[float, float]
    jpeg: float
    jpeg_quality: tuple[int, int]
    soft: float = 0.0
    recoloured: float = 0.0


CLEAN = Strength(1, 0, (0, 0), 0, (1, 1), 0, (0, 0), 0, (1, 1))
STRENGTHS = {
    "base": Strength(0.3, 0.65, (0.2, 1.3), 0.1, (1.1, 2.5), 0.7, (0.5, 12), 0.7, (35, 96)),
    # Whoever has learnt from much noise and blur takes fine texture for noise, and sharpens what never was.
    "finish": Strength(
        0.35, 0.55, (0.2, 1.1), 0.1, (1.1, 2.5), 0.75, (0.5, 9), 0.8, (40, 96), 0.25
    ),
    # Views cut from panoramas are magnified more often than photographs.
    # Colours that none of the photographs has, such as a meadow's, come out no worse.
    "adapters": Strength(
        0.35, 0.5, (0.2, 1.0), 0.2, (1.1, 2.5), 0.75, (0.5, 6), 0.8, (50, 96), 0.25, 0.5
    ),
}


def load(folders: Sequence[Path], names: Iterable[str], longest_px: int = 2200) -> list[Image]:
    """Find each name anywhere under the folders. Large photographs are halved by area averaging
    until they fit, which also rids them of their own noise and JPEG.

    Raises FileNotFoundError for a name that no folder holds.
    """
    found: list[Image] = []
    for name in names:
        path = next((hit for folder in folders for hit in sorted(folder.rglob(name))), None)
        if path is None:
            raise FileNotFoundError(f"no {name} under {', '.join(map(str, folders))}")
        pixels = np.asarray(PilImage.open(path).convert("RGB"))
        while max(pixels.shape[:2]) > longest_px:
            height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        found.append(pixels)
    return found


def sample(images: Sequence[Image], size_px: int, rng: np.random.Generator) -> Image:
    """One (size, size, 3) crop, larger photographs likelier, turned and mirrored at random; of
    three candidates the one with most detail, since skies teach little."""
    areas = np.sqrt([image.shape[0] * image.shape[1] for image in images])
    image = images[rng.choice(len(images), p=areas / areas.sum())]
    tops = rng.integers(0, image.shape[0] - size_px + 1, 3)
    lefts = rng.integers(0, image.shape[1] - size_px + 1, 3)
    crops = [image[y : y + size_px, x : x + size_px] for y, x in zip(tops, lefts, strict=True)]
    detail = [float(np.abs(np.diff(crop[::2, ::2, 1].astype(np.int16))).mean()) for crop in crops]
    crop = crops[int(np.argmax(detail)) if rng.random() < 0.7 else 0]
    crop = np.rot90(crop, int(rng.integers(4)))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def soften(image: Image, rng: np.random.Generator) -> Image:
    """A photograph whose focus lies elsewhere: blurred by a sigma of 0.6 to 2 px."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 2.0)), np.uint8)


def recolour(image: Image, rng: np.random.Generator) -> Image:
    """The same with its channels in another order, or in the same."""
    return np.ascontiguousarray(image[..., rng.permutation(3)])


_SHRINKS = (
    *[PilImage.Resampling.BICUBIC] * 4,
    PilImage.Resampling.BILINEAR,
    PilImage.Resampling.LANCZOS,
    PilImage.Resampling.BOX,
)


def degrade(image: Image, strength: Strength, rng: np.random.Generator) -> Image:
    """Blur, halve, magnify, add noise, JPEG, then double by bicubic: (H, W, 3) to the same shape.
    H and W are even."""
    height, width = image.shape[:2]
    is_clean = rng.random() < strength.clean
    small = image
    if not is_clean and rng.random() < strength.blur:
        small = _blur(small, strength.blur_sigma, rng)
    shrink = _SHRINKS[int(rng.integers(len(_SHRINKS)))]
    small = np.asarray(PilImage.fromarray(small).resize((width // 2, height // 2), shrink))
    if is_clean:
        return enlarge(small)
    if rng.random() < strength.magnify:
        small = _magnify(small, float(rng.uniform(*strength.magnify_factor)))
    if rng.random() < strength.noise:
        small = _noise(small, float(rng.uniform(*strength.noise_sigma)), rng)
    if rng.random() < strength.jpeg:
        small = jpeg(small, int(rng.integers(*strength.jpeg_quality)))
    return enlarge(small)


def enlarge(small: Image) -> Image:
    """(h, w, 3) → (2h, 2w, 3), the server's own first step and the baseline to beat."""
    height, width = small.shape[:2]
    doubled = (width * 2, height * 2)
    return np.array(PilImage.fromarray(small).resize(doubled, PilImage.Resampling.BICUBIC))


def _blur(image: Image, sigma: tuple[float, float], rng: np.random.Generator) -> Image:
    """Gaussian, one sigma per axis; doubled since `image` isn't halved yet."""
    x, y = 2 * rng.uniform(*sigma, 2)
    return np.asarray(cv2.GaussianBlur(image, (0, 0), x, sigmaY=y), np.uint8)


def _magnify(small: Image, factor: float) -> Image:
    """Lose detail as a panorama crop with a narrow view does: bilinear magnification."""
    height, width = small.shape[:2]
    inner = (max(8, round(width / factor)), max(8, round(height / factor)))
    tiny = cv2.resize(small, inner, interpolation=cv2.INTER_AREA)
    large = cv2.resize(tiny, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(large, np.uint8)


def _noise(small: Image, sigma: float, rng: np.random.Generator) -> Image:
    """Gaussian, in colour or (one time in three) the same in all channels."""
    channels = 1 if rng.random() < 1 / 3 else 3
    grain = rng.standard_normal((*small.shape[:2], channels), dtype=np.float32) * sigma
    return np.clip(np.rint(small + grain), 0, 255).astype(np.uint8)


def jpeg(image: Image, quality: int) -> Image:
    """The image after a JPEG file of this quality (4:2:0)."""
    memory = io.BytesIO()
    PilImage.fromarray(image).save(memory, "JPEG", quality=quality)
    return np.asarray(PilImage.open(memory).convert("RGB"))
