"""Files of torch.save, read without running anything that is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from panotriton.errors import brief
from panotriton_export.weights import WeightsError, check_weights

__all__ = ["CheckpointError", "read_pickle"]


class CheckpointError(WeightsError):
    """A base folder or an osediff.pkl is broken, incomplete or made for another model."""


_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


def read_pickle(path: Path, expected: str) -> dict[str, Any]:
    """The dict in `path`; its tensors stay on disk until they are used.

    expected: what the file should be, for the errors. Raises CheckpointError for a file that is
    missing, truncated, damaged, wants to run code on loading, or holds no dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{brief(path)} not found; expected {expected}")
    check_weights(path, CheckpointError)
    legacy = _starts_as_before_zip(path)
    if not (legacy or zipfile.is_zipfile(path)):
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no torch checkpoint: torch.save "
            "writes a zip file and its end is missing; download it again"
        )
    try:
        if not legacy:
            _refuse_code(path, expected)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch meets in a damaged archive
        raise CheckpointError(f"{path} is damaged: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; expected a dict: {expected}"
        )
    return content


def _starts_as_before_zip(path: Path) -> bool:
    """Whether it is a file of torch before 1.6: pickles one after the other, the first a number."""
    with path.open("rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _refuse_code(path: Path, expected: str) -> None:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if names:
        raise CheckpointError(
            f"{path} wants to run code on loading ({', '.join(sorted(names))}), which is refused; "
            f"{expected} needs numbers, names and tensors alone: save those without the rest"
        )
