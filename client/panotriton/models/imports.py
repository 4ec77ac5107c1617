"""Large libraries, imported without looking for garbage among what stays."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["uncollected"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Around imports of PyTorch and transformers: their million objects all stay.

    Python would look through them again and again, for a third of the time that the import takes.
    Afterwards they are left out of every later search for garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
