"""What counts as an image: every format, depth, orientation and colour profile, against Pillow's own way."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

from panotriton.errors import InvalidImage
from panotriton.pipeline.checks import check_images
from panotriton.pipeline.images import check_encoded, decode_image
from tests.pictures import PROFILES, deep_png, deep_tiff, exif, saved

RNG = np.random.default_rng(7)
ORIENTATIONS = range(1, 9)
# Format → the modes that it holds.
KINDS = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
}
SPACES = {"sRGB": "RGB", "wide": "RGB", "grey": "L", "inks": "CMYK"}


def smooth(height: int = 72, width: int = 96) -> NDArray[np.uint8]:
    """(H, W, 4) of gradients, no two corners alike."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height), 200 + 0 * x]
    return np.stack(planes, axis=-1).astype(np.uint8)


def picture(mode: str) -> PILImage.Image:
    if mode == "CMYK":
        return PILImage.frombytes("CMYK", (96, 72), smooth().tobytes())
    return PILImage.fromarray(smooth()).convert(mode)


def float_tiff(compression: int) -> bytes:
    colours = smooth()[..., :3] / np.float32(255)
    done, file = cv2.imencode(".tiff", colours, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    assert done
    return file.tobytes()


def in_srgb(image: PILImage.Image, profile: str) -> NDArray[np.uint8]:
    """By Pillow: the profile where it is of the kind of the pixels, else its plain conversion."""
    rgb = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
    space = SPACES.get(profile)
    greys = image.mode in ("1", "L", "LA")
    if (space == "L" and greys) or (space == "CMYK" and image.mode == "CMYK"):
        source = image.convert(space)
    elif space == "RGB" and image.mode != "CMYK":
        source = rgb
    else:
        return np.asarray(rgb)
    own = ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[profile]))
    made = ImageCms.profileToProfile(source, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert made is not None
    return np.asarray(made)


def differ_at_most(a: NDArray[Any], b: NDArray[Any], levels: int) -> None:
    assert a.shape == b.shape
    assert int(np.abs(a.astype(int) - b).max()) <= levels


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_files_become_what_pillow_itself_makes_of_them(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(KINDS)), "format")
    mode = data.draw(st.sampled_from(KINDS[kind]), "mode")
    profile = data.draw(st.sampled_from(sorted(PROFILES)), "profile")
    turn = data.draw(st.sampled_from([0, *ORIENTATIONS, 9]), "orientation")
    more: dict[str, object] = {}
    if kind != "BMP":  # which has no room for them
        more = {"icc_profile": PROFILES[profile], "exif": exif(turn) if turn else b""}
    if kind in ("PNG", "TIFF", "JPEG"):
        more["dpi"] = data.draw(st.sampled_from([None, (72, 72), (300, 1)]), "dpi")
    if kind in ("JPEG", "WEBP", "AVIF"):
        more["xmp"] = data.draw(st.sampled_from([b"", b"<x:xmpmeta/>", b"\xff<"]), "XMP")
    file = saved(picture(mode), kind, **more)
    got = decode_image("X", file)
    plain = PILImage.open(io.BytesIO(file))
    plain.load()
    used = profile if more and plain.info.get("icc_profile") else "none"
    expected = in_srgb(ImageOps.exif_transpose(plain), used)
    # What calls itself sRGB is left as it is, which rounding makes one level at most.
    differ_at_most(got, expected, 1 if used == "sRGB" else 0)
    assert got.shape[:2] == ((96, 72) if more and turn in (5, 6, 7, 8) else (72, 96))


@settings(max_examples=80, deadline=None)
@given(
    channels=st.sampled_from([1, 2, 3, 4]),
    kind=st.sampled_from(["PNG", "TIFF <", "TIFF >"]),
    turn=st.sampled_from(ORIENTATIONS),
    profile=st.sampled_from(sorted(PROFILES)),
)
def test_16_bits_become_8_by_rounding(channels: int, kind: str, turn: int, profile: str) -> None:
    if kind != "PNG":
        channels = min(channels, 3) | 1
    deep = RNG.integers(0, 65536, (70, 90, channels), np.uint16)
    if kind == "PNG":
        file = deep_png(deep, icc_profile=PROFILES[profile], exif=exif(turn))
    else:
        more = {"orientation": turn, "icc_profile": PROFILES[profile]}
        file = deep_tiff(deep, order=kind[-1], **more)  # type: ignore[arg-type]
    flat = np.rint(deep / 257).astype(np.uint8)
    image = PILImage.fromarray(flat[..., :3] if channels > 2 else flat[..., 0])
    image.getexif()[0x0112] = turn
    expected = in_srgb(ImageOps.exif_transpose(image), profile)
    differ_at_most(decode_image("X", file), expected, 1 if profile == "sRGB" else 0)


@pytest.mark.parametrize("turn", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_picture_stands_upright(kind: str, turn: int) -> None:
    # A dark corner, where the viewer's upper left is for each orientation: (row, column) of the file.
    row, column = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (1, 0), (1, 1), (0, 1)][turn - 1]
    pixels = np.full((96, 160, 3), 230, np.uint8)
    pixels[row * 64 : row * 64 + 32, column * 128 : column * 128 + 32] = 20
    got = decode_image("X", saved(PILImage.fromarray(pixels), kind, exif=exif(turn)))
    assert got.shape == ((160, 96, 3) if turn >= 5 else (96, 160, 3))
    assert got[4:28, 4:28].max() < 60
    assert got[40:, 40:].min() > 190


def test_a_wide_profile_moves_colours_and_that_of_srgb_none() -> None:
    pixels = np.full((64, 64, 3), (30, 200, 60), np.uint8)
    image = PILImage.fromarray(pixels)
    for kind in ("PNG", "TIFF"):
        same = decode_image("X", saved(image, kind, icc_profile=PROFILES["sRGB"]))
        np.testing.assert_array_equal(same, pixels)
        moved = decode_image("X", saved(image, kind, icc_profile=PROFILES["wide"]))[0, 0]
        assert moved[0] == 0  # a green that sRGB has no red for
        assert moved[1] > 200


def test_of_16_bit_grey_white_may_be_zero() -> None:
    deep = RNG.integers(0, 65536, (64, 64, 1), np.uint16)
    got = decode_image("X", deep_tiff(deep, photometric=0))
    np.testing.assert_array_equal(got[..., :1], np.rint((65535 - deep) / 257).astype(np.uint8))


def test_metadata_that_cannot_be_read_hides_no_picture() -> None:
    image = picture("RGB")
    for garbage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:-4]):
        got = decode_image("X", saved(image, "JPEG", exif=garbage, quality=100))
        assert {*got.shape} == {72, 96, 3}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (saved(picture("RGB"), "GIF"), "X is GIF, which is not read; expected"),
        (saved(picture("RGB"), "JPEG2000"), "X is JPEG 2000"),
        (saved(picture("RGB"), "PDF"), "X is PDF"),
        (
            saved(picture("RGB"), "PPM"),
            "X is PPM, which is not read; expected the content of an AVIF",
        ),
        (saved(picture("L"), "PPM"), "X is PPM"),
        (saved(picture("RGB"), "TGA"), "X is TGA, which is not read; expected"),
        (saved(picture("L"), "TGA", compression="tga_rle"), "X is TGA"),
        (saved(picture("RGB"), "ICO"), "X is ICO, which is not read; expected"),
        (float_tiff(cv2.IMWRITE_TIFF_COMPRESSION_NONE), "X has 32-bit float pixels; expected RGB"),
        (float_tiff(cv2.IMWRITE_TIFF_COMPRESSION_SGILOG), "X has float .LogLuv. pixels"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "X is HEIC"),
        (b"8BPS\0\x01" + bytes(30), "X is Photoshop"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>404", "X is HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89JFIF", "X holds 5 bytes that are no image"),
        (saved(picture("F"), "TIFF"), "X has 32-bit pixels of mode F"),
        (saved(picture("I"), "TIFF"), "X has 32-bit pixels of mode I"),
        (saved(picture("RGB"), "TIFF")[:3000], "X is a broken image"),
        *((saved(picture("RGB"), "AVIF")[:end], "X is a broken image") for end in (40, 200, 400)),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "X is MP4 video"),
    ],
)
def test_what_is_refused_is_called_by_its_name(data: bytes, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        decode_image("X", data)


def test_what_pillow_itself_calls_too_large_is_told_in_our_words() -> None:
    file = bytearray(deep_png(np.zeros((64, 64, 3), np.uint16)))
    file[16:24] = struct.pack(">2I", 30000, 30000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    for check in (check_encoded, decode_image):
        with pytest.raises(InvalidImage) as told:
            check("X", bytes(file))
        assert str(told.value) == (
            "X is 30000×30000 px, 900 megapixels; expected at most 134: downsize it first"
        )


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    places=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    end=st.integers(1, 1 << 16),
)
def test_damage_never_crashes(kind: str, places: list[tuple[int, int]], end: int) -> None:
    file = bytearray(saved(picture("RGB"), kind))
    for place, value in places:
        file[place % len(file)] = value
    try:
        image = decode_image("X", bytes(file[: max(end % (2 * len(file)), 1)]))
    except InvalidImage as error:
        assert "\n" not in str(error)
    else:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


def test_pillows_warnings_reach_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    file = saved(picture("RGB").resize((64, 65)), "PNG")
    palette = picture("P")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        ready = threading.Barrier(4)

        def work(_: int) -> None:
            ready.wait()
            for _ in range(20):
                check_encoded("X", file)
                decode_image("X", file)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        decode_image("X", saved(palette, "PNG", transparency=bytes(range(256))))
        # Of a TIFF whose compression has three values, which is looked at to say what is wrong.
        tags = struct.pack("<HHII", 258, 3, 1, 32) + struct.pack("<HHII", 259, 3, 3, 38)
        file = b"II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I3H", 0, 1, 1, 1)
        with pytest.raises(InvalidImage, match="X has 32-bit unsigned pixels"):
            decode_image("X", file)
        assert warnings.filters == filters
    assert not caught


def test_the_longer_side_is_bounded_for_models_that_bound_it() -> None:
    for check in (
        lambda h, w: check_images("X", np.zeros((1, h, w, 3), np.uint8), 28, 200),
        lambda h, w: decode_image("X", saved(PILImage.new("RGB", (w, h)), "PNG"), 28, 200),
    ):
        check(28, 5600)
        with pytest.raises(InvalidImage, match=r"X is 5601×28 px; expected one side at most 200"):
            check(28, 5601)
        with pytest.raises(InvalidImage, match=r"X is 28×5880 px"):
            check(5880, 28)
