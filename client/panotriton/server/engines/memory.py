"""A network's share of a GPU's memory: what its weights take is known before any session is opened."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

from panotriton.errors import EngineError
from panotriton.server.engines.engine import Settings

__all__ = ["FRACTION", "check_share", "total_bytes"]

FRACTION = "gpu_memory_fraction"  # parameter of config.pbtxt


def check_share(path: Path, settings: Settings) -> None:
    """Refuse a graph whose weights, once for each expected shape, are more than its share of the GPU.

    What activations take besides depends on the GPU's libraries, and is not known here. Without the
    parameter, or where the driver does not say what the GPU has, nothing is refused. Raises EngineError.
    """
    text = settings.parameters.get(FRACTION)
    if text is None:
        return
    fraction = _fraction(text)
    total = total_bytes(int(settings.device))
    if total is None:
        return
    weights = sum(each.stat().st_size for each in (path, *path.parent.glob(f"{path.name}.data")))
    sessions = max(1, len(settings.shapes.expected)) if settings.shapes else 1
    if sessions * weights > fraction * total:
        raise EngineError(
            f"{sessions} sessions of {_gb(weights)} of weights each, one for each expected shape, need "
            f"{_gb(sessions * weights)}; GPU {settings.device} has {_gb(total)}, of which this network may "
            f"take {fraction:.0%}, {_gb(fraction * total)}: export with fewer --shapes, or raise {FRACTION} "
            "in its config.pbtxt"
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
