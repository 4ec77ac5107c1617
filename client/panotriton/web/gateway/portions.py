"""A request's list of images, some at once: how far it is, in the log, and what is done in time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from panotriton.client.calls import Failure
from panotriton.errors import InferenceFailed, InvalidInput
from panotriton.web.gateway.files import Decode, read_portions
from panotriton.web.gateway.paths import Roots

__all__ = ["Image", "Portions"]

_LOG = logging.getLogger(__name__)
# Where an answer is due, the last portion that fits should leave little time over.
_MOST_IN_TIME = 4

T = TypeVar("T")
Image = NDArray[np.uint8] | InvalidInput


class Portions:
    """The work of one request, whose time begins now.

    within_s: when to answer at the latest, as far as the portions so far tell how long the next one
    takes; None: when all is done.
    """

    def __init__(self, endpoint: str, within_s: float | None) -> None:
        self._endpoint = endpoint
        self._within_s = within_s
        self._began = time.monotonic()

    def outcomes(
        self,
        roots: Roots,
        sources: Sequence[str | InvalidInput],
        most: int,
        decode: Decode,
        work: Callable[[list[Image]], Sequence[T | Failure]],
    ) -> list[T | Failure]:
        """What `work` makes of the image of each source, up to `most` at once, or why there is nothing.

        Raises ForbiddenPath for a source outside the roots, before any work.
        """
        most = most if self._within_s is None else min(most, _MOST_IN_TIME)
        done: list[T | Failure] = []
        began = before = time.monotonic()
        for images in read_portions(roots, sources, most, decode):
            done += work(images)
            now = time.monotonic()
            self._log(len(done), len(sources), now - began)
            if len(done) < len(sources) and not self._has_time(now + (now - before)):
                break
            before = now
        return done + [self._late() for _ in sources[len(done) :]]

    def _has_time(self, until: float) -> bool:
        return self._within_s is None or until <= self._began + self._within_s

    def _late(self) -> Failure:
        return InferenceFailed(
            f"not done within {self._within_s:g} s, when this gateway answers (--answer-within); send "
            "it again"
        )

    def _log(self, done: int, count: int, seconds: float) -> None:
        left_s = seconds / done * (count - done)
        _LOG.info(
            "%s: %d of %d images in %.0f s, about %.0f s to go",
            *(self._endpoint, done, count, seconds, left_s),
        )
