"""Image files of kinds that Pillow does not write, and colour profiles, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageCms

__all__ = ["PROFILES", "deep_png", "deep_tiff", "exif", "saved"]


def _icc(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.1: header, tag table, tags."""
    head = bytes(8) + b"\x02\x10\0\0" + (b"prtr" if space == b"CMYK" else b"mntr") + space + pcs
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    whole = head + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def _text() -> dict[bytes, bytes]:
    name = b"test\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    return {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(0.9642, 1, 0.8249)}


def _wide() -> bytes:
    """RGB with the primaries of Adobe RGB (1998) and its gamma of 2.2."""
    primaries = {
        b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
    }
    return _icc(
        b"RGB ",
        b"XYZ ",
        _text() | primaries | {b"rTRC": _gamma(2.2), b"gTRC": _gamma(2.2), b"bTRC": _gamma(2.2)},
    )


def _inks() -> bytes:
    """CMYK by a table of the 16 full overprints in Lab."""
    table = bytearray()
    for overprint in range(16):
        c, m, y, k = (overprint >> shift & 1 for shift in (3, 2, 1, 0))
        light = round(255 * (0.1 if k else 1 - 0.28 * (c + m + y)))
        table += bytes((light, 128 + 50 * m - 40 * c, 128 + 60 * y - 40 * c))
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + bytes(table) + ramp * 3
    return _icc(b"CMYK", b"Lab ", _text() | {b"A2B0": lut})


PROFILES = {
    "none": b"",
    "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "wide": _wide(),
    "grey": _icc(b"GRAY", b"XYZ ", _text() | {b"kTRC": _gamma(1.0)}),
    "inks": _inks(),
    "broken": b"no profile at all",
}


def exif(orientation: int) -> bytes:
    """EXIF that holds an orientation alone."""
    found = PILImage.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def saved(image: PILImage.Image, kind: str, **more: object) -> bytes:
    """The picture as a file; what is empty is left out."""
    memory = io.BytesIO()
    image.save(memory, kind, **{name: value for name, value in more.items() if value})
    return memory.getvalue()


def deep_png(pixels: NDArray[np.uint16], *, icc_profile: bytes = b"", exif: bytes = b"") -> bytes:
    """(H, W, C) as a PNG of 16 bits a channel: 1 grey, 2 and alpha, 3 RGB, 4 and alpha."""
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 16, colour, 0, 0, 0))]
    if icc_profile:
        chunks.append((b"iCCP", b"icc\0\0" + zlib.compress(icc_profile)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def deep_tiff(
    pixels: NDArray[np.uint16],
    *,
    order: str = "<",
    photometric: int | None = None,
    orientation: int = 1,
    icc_profile: bytes = b"",
) -> bytes:
    """(H, W, 1 or 3) as a TIFF of 16 bits a channel, one strip, in byte order `order`."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    kind = photometric if photometric is not None else {1: 1, 3: 2}[channels]
    count = 11 if icc_profile else 10
    after = 8 + 2 + 12 * count + 4
    bits_at, strip_at = after, after + 8
    icc_at = strip_at + len(data)

    def entry(tag: int, form: int, number: int, value: int) -> bytes:
        short = form == 3 and number == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        return struct.pack(f"{order}HHI", tag, form, number) + packed

    entries = [
        entry(256, 4, 1, width),
        entry(257, 4, 1, height),
        entry(258, 3, channels, bits_at if channels > 1 else 16),
        entry(259, 3, 1, 1),
        entry(262, 3, 1, kind),
        entry(273, 4, 1, strip_at),
        entry(274, 3, 1, orientation),
        entry(277, 3, 1, channels),
        entry(278, 4, 1, height),
        entry(279, 4, 1, len(data)),
    ]
    if icc_profile:
        entries.append(entry(34675, 7, len(icc_profile), icc_at))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    bits = struct.pack(f"{order}4H", 16, 16, 16, 0)
    return head + b"".join(entries) + bytes(4) + bits + data + icc_profile
