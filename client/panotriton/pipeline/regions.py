"""Callers' regions of shared memory: where they lie, how they are named, and whether somebody holds one."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

__all__ = ["FOLDER", "NAME", "PREFIX", "held"]

FOLDER = Path("/dev/shm")  # noqa: S108
PREFIX = "panotriton_"
NAME = re.compile(rf"{PREFIX}(\d+)_[0-9a-f]{{32}}$")
"""Of a caller's region; the group is its process."""


def held(path: Path) -> bool:
    """Whether the owner of a file lives: it holds a lock on it as long as it does, in any container.

    So is what cannot be told: another user's file, and one that was removed meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
