"""How an encoded image becomes pixels: RGB uint8, (H, W, 3).

Sizes are checked before memory is taken for the pixels. A file becomes what people see when they open it:
upright, and in sRGB.

- Formats: AVIF, BMP, TIFF, JPEG, PNG, WebP; of several pictures in one file the first.
- 16 bits a channel become 8 by round(v / 257). Other depths over 8 are refused.
- An ICC profile, of RGB, grey or CMYK, is converted to sRGB as Pillow does by default (perceptual). One that
  moves no colour by more than 1 of 255, as those of sRGB itself, is left out, and so is one that is
  broken or of another kind of colour than the pixels.
- Transparency is dropped.
- The orientation of EXIF or XMP is applied, all eight values.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageCms, UnidentifiedImageError
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from panotriton.errors import InvalidImage, brief
from panotriton.pipeline.checks import check_size
from panotriton.pipeline.contract import MAX_PIXELS, MIN_SIDE_PX

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "check_encoded",
    "decode_image",
    "images_in",
    "picture_pixels",
]

FORMATS = "AVIF, BMP, TIFF, JPEG, PNG or WebP"
"""The formats that are read, in words."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
"""How the names of such files end, in lower case."""

_PLUGINS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF")
# How other files begin, from byte `offset` on: what people send for a picture, to be called by its name.
_OTHERS = (
    (0, b"GIF8", "GIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "MP4 video"),
    (0, b"8BPS", "Photoshop"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"%PDF", "PDF"),
    (0, b"qoif", "QOI"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"DDS ", "DDS"),
    *((0, b"P%d\n" % kind, "PPM") for kind in range(1, 7)),
    (0, b"P7\n", "PAM"),
    (0, b"PF\n", "PFM"),
    (0, b"Pf\n", "PFM"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
    (0, b"<!DOCTYPE", "HTML"),
    (0, b"<html", "HTML"),
    (0, b"version https://git-lfs", "Git-LFS pointer: run `git lfs pull`"),
)

# A profile's colour space → the mode that holds it.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREYS = ("1", "L", "LA")
# What is taken of Pillow's own pictures, besides grey of 16 bits.
_PICTURES = ("RGB", "RGBA", "CMYK", "YCbCr", "P", "PA", *_GREYS)
# Modes that Pillow turns into RGB by way of another: of a palette it would look for a colour that stands
# for the transparent ones, and of colours that are multiplied by alpha it knows no other way.
_FIRST = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_BITS = (1, 2, 4, 8, 16)  # a channel
_DEPTHS = "expected RGB, grey or CMYK of 8 bits a channel, or of 16, unsigned: convert it first"
_SAMPLE_FORMAT = 339  # of TIFF
_LOGARITHMIC = (34676, 34677)  # compressions of TIFF, of floats
_WHITE_IS_ZERO = 262  # TIFF's PhotometricInterpretation, 0 where it is so
_PNG_COLOUR_AT, _PNG_GREY_ALPHA = 25, 4
# Orientation → steps along rows and columns, after the axes of those from 5 on have been swapped.
_FLIPS = {
    2: (1, -1),
    3: (-1, -1),
    4: (-1, 1),
    5: (1, 1),
    6: (1, -1),
    7: (-1, -1),
    8: (-1, 1),
}

U8 = NDArray[np.uint8]


def images_in(folder: Path) -> list[Path]:
    """The files directly in `folder` that are named like images, none of them hidden, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def decode_image(
    name: str, data: bytes, min_side_px: int = MIN_SIDE_PX, max_aspect: float = math.inf
) -> U8:
    """Decode a whole file of one of `FORMATS` to (H, W, 3) uint8 sRGB, upright, without transparency.

    Raises InvalidImage for other formats, truncated data, pixels of 32 bits or floats and wrong
    sizes, the last before anything is decoded.
    """
    with _opened(name, data, min_side_px, max_aspect) as (image, bits):
        return _shown(image, bits == 16, data)


def picture_pixels(
    name: str,
    image: PILImage.Image,
    min_side_px: int = MIN_SIDE_PX,
    max_aspect: float = math.inf,
) -> U8:
    """A picture that Pillow has opened, (H, W, 3) uint8, as `decode_image` makes it of the same file.

    Of 16-bit colours Pillow has kept the upper halves; those of grey are all there. Raises InvalidImage
    for other modes, wrong sizes, and a file that breaks off.
    """
    is_deep = image.mode.startswith("I;16")
    if not is_deep and image.mode not in _PICTURES:
        fix = "scale it to 0…255 of mode L" if image.mode in ("I", "F") else ".convert('RGB')"
        raise InvalidImage(
            f"{brief(name)} is a picture of mode {image.mode}; expected {', '.join(_PICTURES)} or "
            f"I;16: {fix} first"
        )
    check_size(brief(name), *image.size, min_side_px, max_aspect)
    try:
        with _quiet(), _unmapped(image):
            return _shown(image, is_deep)
    except Exception as error:  # a file that was opened and not yet read
        raise _broken(name, error) from error


@contextlib.contextmanager
def _unmapped(image: PILImage.Image) -> Iterator[None]:
    """Pillow maps a TIFF that it knows the name of into memory, with its sides as if it were upright."""
    if not isinstance(image, TiffImageFile):
        yield
        return
    name, image.filename = image.filename, ""
    try:
        yield
    finally:
        image.filename = name


def _shown(image: PILImage.Image, is_deep: bool, data: bytes = b"") -> U8:
    """(H, W, 3) in sRGB and upright. data: the file, for colours of 16 bits."""
    image.load()
    flat = _in_srgb(_narrowed(image, data) if is_deep else image, image.info.get("icc_profile"))
    return _upright(np.asarray(flat), _orientation(image))


def check_encoded(name: str, data: bytes, min_side_px: int = MIN_SIDE_PX) -> None:
    """Raise InvalidImage for what the header of the bytes already tells: no image, or a wrong size."""
    with _opened(name, data, min_side_px, math.inf):
        pass


@contextlib.contextmanager
def _opened(
    name: str, data: bytes, min_side_px: int, max_aspect: float
) -> Iterator[tuple[PILImage.Image, int]]:
    """The picture, not yet decoded, and its bits a channel: 16, or 8 for all below."""
    name = brief(name)
    with _quiet():  # also what is made of a failure, by Pillow's means
        try:
            with PILImage.open(io.BytesIO(data), formats=_PLUGINS) as image:
                check_size(name, *image.size, min_side_px, max_aspect)
                yield image, _bits(name, image)
        except InvalidImage:
            raise
        except PILImage.DecompressionBombError as error:
            raise _too_large(name, data) from error
        except UnidentifiedImageError as error:
            raise InvalidImage(_unknown(name, data)) from error
        except Exception as error:  # a damaged file: what a plugin then raises has no common base
            raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> InvalidImage:
    return InvalidImage(
        f"{brief(name)} is a broken image ({brief(error)}); expected a whole {FORMATS} file: send it again"
    )


def _too_large(name: str, data: bytes) -> InvalidImage:
    """For what Pillow refuses before it tells the size, which its plugins do tell by themselves."""
    for plugin in _PLUGINS:
        with (
            contextlib.suppress(Exception),
            PILImage.OPEN[plugin][0](io.BytesIO(data), "") as image,
        ):
            try:
                check_size(name, *image.size, 1, math.inf)
            except InvalidImage as error:
                return error
    return InvalidImage(
        f"{name} unpacks to too many pixels; expected at most {MAX_PIXELS / 1e6:.0f} megapixels: "
        "downsize it first"
    )


def _unknown(name: str, data: bytes) -> str:
    start = bytes(data[:64]).removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t")
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return f"{name} is a broken image (AVIF that is cut); expected a whole {FORMATS} file: send it again"
    for at, magic, kind in _OTHERS:
        if start[at:].startswith(magic):
            return f"{name} is {kind}, which is not read; expected the content of an {FORMATS} file"
    if kind := _tiff_samples(data):
        return f"{name} has {kind} pixels; {_DEPTHS}"
    if _is_tga(data):
        return f"{name} is TGA, which is not read; expected the content of an {FORMATS} file"
    return (
        f"{name} holds {len(data)} bytes that are no image; expected the whole content of an "
        f"{FORMATS} file"
    )


def _is_tga(data: bytes) -> bool:
    """By the three bytes of its header that have few values: it begins with no mark of its own."""
    known = len(data) > 18 and data[1] <= 1 and data[2] in (1, 2, 3, 9, 10, 11)
    return known and data[16] in (8, 15, 16, 24, 32)


def _tiff_samples(data: bytes) -> str:
    """What a TIFF's channels are, "32-bit float", where they are of no kind that is read; else ""."""
    if not data.startswith((b"II*\0", b"MM\0*")):
        return ""
    try:
        tags, file = ImageFileDirectory_v2(data[:8]), io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, form = max(tags[ExifTags.Base.BitsPerSample]), max(tags.get(_SAMPLE_FORMAT, (1,)))
    except Exception:  # damaged
        return ""
    if tags.get(ExifTags.Base.Compression) in _LOGARITHMIC:
        return "float (LogLuv)"
    kind = {2: "signed", 3: "float"}.get(form, "unsigned")
    return "" if kind == "unsigned" and bits in _BITS else f"{bits}-bit {kind}"


class _Quiet:
    """Drops Pillow's warnings while any thread decodes; `catch_warnings` by itself serves one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def _bits(name: str, image: PILImage.Image) -> int:
    """8 or 16 a channel; Pillow's mode does not tell: it reads colours of 16 bits by their upper halves."""
    bits = 8
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
    elif isinstance(image, PngImageFile) and ";16" in str(image.tile[0].args):
        bits = 16
    if image.mode in ("I", "F", "LAB") or bits not in _BITS:
        raise InvalidImage(f"{name} has {bits}-bit pixels of mode {image.mode}; {_DEPTHS}")
    return 16 if bits == 16 else 8


def _narrowed(image: PILImage.Image, data: bytes) -> PILImage.Image:
    """A decoded picture of 16 bits a channel as one of 8: round(v / 257), which maps 65535 to 255."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_WHITE_IS_ZERO) == 0:
            deep = np.invert(deep)
    else:
        deep = _deep_colours(image, data)
    return PILImage.fromarray(cv2.convertScaleAbs(deep, alpha=1 / 257))


def _deep_colours(image: PILImage.Image, data: bytes) -> NDArray[np.uint16]:
    """(H, W, 3), or (H, W) of a PNG that is grey and alpha.

    OpenCV reads what Pillow cuts. Where its upper halves are not what Pillow has read, the file's
    layout is beyond one of them, and nothing is guessed.
    """
    is_png = image.format == "PNG"
    file = _bare_png(data) if is_png else data
    read = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    colours = read is not None and read.dtype == np.uint16 and read.ndim == 3
    deep = read[..., 2::-1] if colours else np.empty(0, np.uint16)  # BGR(A) → RGB
    if image.mode == "CMYK" or not np.array_equal(deep >> 8, np.asarray(image)[..., :3]):
        raise ValueError(f"16-bit {image.mode} pixels in a layout that is not read: save 8 bits")
    is_grey = is_png and data[_PNG_COLOUR_AT] == _PNG_GREY_ALPHA
    return np.ascontiguousarray(deep[..., 0] if is_grey else deep)


def _bare_png(data: bytes) -> bytes:
    """A PNG's pixels alone: OpenCV writes to stderr what it thinks of profiles and text."""
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _in_srgb(image: PILImage.Image, profile: bytes | None) -> PILImage.Image:
    """Mode RGB, its colours by the profile, sRGB where there is none that can be used."""
    image = image.convert(_FIRST[image.mode]) if image.mode in _FIRST else image
    plain = image if image.mode == "RGB" else image.convert("RGB")
    if not profile:
        return plain
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[own.profile.xcolor_space.strip()]
        source = plain if mode == "RGB" else image.convert(mode)
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in _GREYS):
            return plain
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = _probe(mode)
        moved = cv2.absdiff(np.asarray(transform.apply(probe)), np.asarray(probe.convert("RGB")))
        return transform.apply(source) if moved.max() > 1 else plain
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return plain


def _probe(mode: str) -> PILImage.Image:
    """Colours all over a mode's range, to see what a profile does to them."""
    channels = len(mode)
    steps = np.linspace(0, 255, {1: 256, 3: 9, 4: 4}[channels]).astype(np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * channels), axis=-1).reshape(-1, channels)  # (n, C)
    return PILImage.frombytes(mode, (len(colours), 1), colours.tobytes())


def _orientation(image: PILImage.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that cannot be read hides no picture
        return 1


def _upright(image: U8, orientation: int) -> U8:
    """(H, W, 3), turned and mirrored as EXIF's orientation, 1 to 8, says; others are taken for 1."""
    if orientation not in range(2, 9):
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    down, right = _FLIPS[orientation]
    return np.ascontiguousarray(image[::down, ::right])
