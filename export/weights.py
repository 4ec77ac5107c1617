"""Files of weights as they come from elsewhere, looked at before anything loads them."""

from __future__ import annotations

import json
from pathlib import Path

from panotriton.errors import ExportError, InvalidInput

__all__ = ["WeightsError", "check_weights"]

_POINTER = b"version https://git-lfs"
_LENGTH_BYTES = 8  # of a safetensors file's header, little-endian
_MOST_HEADER_BYTES = 100_000_000  # what the format's own reader takes


class WeightsError(ExportError, InvalidInput):
    """A folder or file of weights is missing, incomplete, broken or of another kind."""


def check_weights(path: Path, error: type[WeightsError] = WeightsError) -> None:
    """Raise `error` for a Git-LFS pointer in place of a file, and for a safetensors file cut short."""
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise error(
                f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in {path.parent}"
            )
        if path.suffix != ".safetensors":
            return
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = file.read(length) if length < _MOST_HEADER_BYTES else b""
    expected = _LENGTH_BYTES + length + _data_bytes(header)
    size = path.stat().st_size
    if len(header) < length or size != expected:
        raise error(
            f"{path} is truncated or no safetensors file: it has {size:,} bytes, and its header is for "
            f"{expected:,}; download it again"
        )


def _data_bytes(header: bytes) -> int:
    try:
        tensors = json.loads(header)
        return max(
            (
                tensor["data_offsets"][1]
                for name, tensor in tensors.items()
                if name != "__metadata__"
            ),
            default=0,
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return 0
