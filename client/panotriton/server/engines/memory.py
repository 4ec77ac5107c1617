"""A network's share of a GPU's memory: what its weights take is known before any session is opened."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

from panotriton.errors import EngineError
from panotriton.server.engines.engine import Settings

__all__ = ["FRACTION", "Share", "check_share", "share", "total_bytes"]

FRACTION = "gpu_memory_fraction"  # parameter of config.pbtxt


class Share(NamedTuple):
    """fraction: of the GPU's `total` bytes; weights: bytes of one session's."""

    fraction: float
    total: int
    weights: int

    @property
    def sessions(self) -> int:
        """How many there is room for. Without what they compute in, which depends on the GPU's libraries."""
        return int(self.fraction * self.total / self.weights)


def share(path: Path, settings: Settings) -> Share | None:
    """None without the parameter, or where the driver does not say what the GPU has. Raises EngineError."""
    text = settings.parameters.get(FRACTION)
    if text is None:
        return None
    fraction = _fraction(text)
    total = total_bytes(int(settings.device))
    if total is None:
        return None
    weights = sum(each.stat().st_size for each in (path, *path.parent.glob(f"{path.name}.data")))
    return Share(fraction, total, weights)


def check_share(path: Path, settings: Settings) -> None:
    """Refuse a graph whose weights, once for each expected shape, are more than its share of the GPU.

    Raises EngineError.
    """
    found = share(path, settings)
    sessions = max(1, len(settings.shapes.expected)) if settings.shapes else 1
    if found is not None and sessions > found.sessions:
        raise EngineError(
            f"{sessions} sessions of {_gb(found.weights)} of weights each, one for each expected shape, need "
            f"{_gb(sessions * found.weights)}; GPU {settings.device} has {_gb(found.total)}, of which this "
            f"network may take {found.fraction:.0%}, {_gb(found.fraction * found.total)}: export with fewer "
            f"--shapes, or raise {FRACTION} in its config.pbtxt"
        )


def total_bytes(device: int) -> int | None:
    """What the GPU has in all, by its driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, found = ctypes.c_int(), ctypes.c_size_t()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(found), handle)
    )
    return None if failed else found.value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise EngineError(f"parameter {FRACTION} is '{text}', expected more than 0 and at most 1")
    return value


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
