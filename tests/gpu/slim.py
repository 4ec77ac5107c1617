"""Drop the kernels of other GPUs from a CUDA library: slim.py LIBRARY ARCHITECTURE, as slim.py lib.so 90.

What nvcc packs is a fat binary for each source file: a header (magic, version, size of header, of content),
then entries (kind, size of header, of content; at 28 bytes the architecture). Contents for other GPUs are
zeroed in place, which compresses to nothing; where none is for the wanted one, all are kept.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"\x50\xed\x55\xba"
_HEADER_BYTES = 16
_MACHINE_CODE = 2

Entry = tuple[int, int, int, int]  # where the content begins, its bytes, kind, architecture


def binaries(image: mmap.mmap) -> Iterator[list[Entry]]:
    """The entries of each fat binary."""
    place = image.find(_MAGIC)
    while place >= 0:
        _, _, header, content = struct.unpack_from("<IHHQ", image, place)
        end = place + header + content
        if header != _HEADER_BYTES or end > len(image):  # not one, by chance the same four bytes
            place = image.find(_MAGIC, place + 4)
            continue
        yield list(_entries(image, place + header, end))
        place = image.find(_MAGIC, end)


def _entries(image: mmap.mmap, place: int, end: int) -> Iterator[Entry]:
    while place < end:
        kind, _, header, content = struct.unpack_from("<HHIQ", image, place)
        (architecture,) = struct.unpack_from("<I", image, place + 28)
        yield place + header, content, kind, architecture
        place += header + content


def slim(path: Path, architecture: int) -> tuple[int, int]:
    """Bytes kept and zeroed."""
    kept = zeroed = 0
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        for entries in list(binaries(image)):
            wanted = [
                (kind, number) == (_MACHINE_CODE, architecture) for *_, kind, number in entries
            ]
            for (start, size, *_), is_wanted in zip(entries, wanted, strict=True):
                if is_wanted or not any(wanted):
                    kept += size
                else:
                    image[start : start + size] = bytes(size)
                    zeroed += size
    return kept, zeroed


if __name__ == "__main__":
    bytes_kept, bytes_zeroed = slim(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"{sys.argv[1]}: {bytes_kept / 1e6:.0f} MB kept, {bytes_zeroed / 1e6:.0f} MB zeroed")
