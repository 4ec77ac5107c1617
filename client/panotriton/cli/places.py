"""What a command is to write: asked before any work whether it can be, and written whole or not at all."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from panotriton.errors import InvalidInput, brief
from panotriton.pipeline.channel import MAX_PORT
from panotriton.pipeline.scratch import atomic

__all__ = ["check_file", "check_folder", "check_ports", "is_folder", "save"]


def check_folder(folder: Path) -> None:
    """Raise InvalidInput unless `folder` is one that can be written to, or can be made."""
    there = _nearest(folder)
    if not there.is_dir():
        raise InvalidInput(
            f"{brief(there)} is a file; expected a folder for the results: name another"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InvalidInput(
            f"nothing can be written to {brief(there)} ({error.strerror}); expected a folder for the "
            "results: name another"
        ) from error


def check_file(path: Path, *, makes_folder: bool = False) -> None:
    """Raise InvalidInput unless a file `path` can be written, in a folder that exists or is made."""
    if _nearest(path) == path.absolute() and (path.is_dir() or not os.access(path, os.W_OK)):
        raise InvalidInput(
            f"{brief(path)} is a folder or cannot be written; expected a file: name another"
        )
    if not (makes_folder or path.parent.is_dir()):
        raise InvalidInput(
            f"{brief(path.parent)} is not a folder; expected one for {brief(path.name)}: create it first"
        )
    check_folder(path.parent)


def is_folder(path: Path) -> bool:
    """Whether there is a folder; not where nobody may look, or the name is none that a file can have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def check_ports(options: argparse.Namespace) -> None:
    """Raise InvalidInput unless each option named after a port has one of its own; 0 is any free one."""
    taken: dict[int, str] = {}
    for name, value in vars(options).items():
        if value is None or not (name == "port" or name.endswith("_port")):
            continue
        flag = f"--{name.replace('_', '-')}"
        if not 0 <= value <= MAX_PORT:
            raise InvalidInput(f"{flag} is {brief(value)}; expected 0 to {MAX_PORT}")
        if value and value in taken:
            raise InvalidInput(
                f"{taken[value]} and {flag} are both {value}; expected a port for each"
            )
        taken[value] = flag


def _nearest(path: Path) -> Path:
    """The innermost part of the path that exists."""
    try:
        whole = path.absolute()
        return next(part for part in (whole, *whole.parents) if part.exists())
    except OSError as error:  # no permission to look, or a name that no file can have
        raise InvalidInput(
            f"{brief(path)} cannot be used ({error.strerror}): name another"
        ) from error


def save(image: Image.Image, path: Path, **how: Any) -> None:
    """Write a picture in the format of `path`'s suffix; what was there stays until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        image.save(part, **how)
