"""One opened graph for each shape of its inputs: libraries plan, fuse and search anew for every other one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["PerShape"]

Key = TypeVar("Key", bound=Hashable)
Opened = TypeVar("Opened")


class PerShape(Generic[Key, Opened]):
    """What was opened, by shape: at most `limit`; the one longest unused makes room. For one thread.

    open_one: opens for a shape that is not there.
    """

    def __init__(self, open_one: Callable[[Key], Opened], limit: int) -> None:
        self._open = open_one
        self._limit = limit
        self._opened: OrderedDict[Key, Opened] = OrderedDict()

    def __len__(self) -> int:
        return len(self._opened)

    def clear(self) -> None:
        """Close them all."""
        self._opened.clear()

    def __getitem__(self, key: Key) -> Opened:
        if key not in self._opened:
            while len(self._opened) >= self._limit:  # before: both at once may not fit
                self._opened.popitem(last=False)
            self._opened[key] = self._open(key)
        self._opened.move_to_end(key)
        return self._opened[key]
