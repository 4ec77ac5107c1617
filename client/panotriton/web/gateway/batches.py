"""Images of any sizes as few requests: all of one size go together, and one that fails fails alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InferenceFailed, InvalidInput

__all__ = ["Failure", "by_size"]

U8 = NDArray[np.uint8]
T = TypeVar("T")
Failure = InvalidInput | InferenceFailed

# A request's input is bounded to what makes a result of some 800 MB at upscale 2. Small images
# count as if they had the size to which the model first enlarges them.
_MAX_PIXELS_A_REQUEST = 64 << 20
_LEAST_PIXELS = 256 * 256


def by_size(images: Sequence[U8 | Failure], work: Callable[[U8], Sequence[T]]) -> list[T | Failure]:
    """`work` on stacks (N, H, W, 3) of one size; results and failures in the order of `images`.

    A failure among the images is passed on. What concerns the server and not the images (it is busy,
    unreachable) is raised.
    """
    results: dict[int, T | Failure] = {
        index: image for index, image in enumerate(images) if isinstance(image, Failure)
    }
    for indices in _requests(images):
        outcomes = _attempt(work, [images[index] for index in indices])
        results |= zip(indices, outcomes, strict=True)
    return [results[index] for index in range(len(images))]


def _requests(images: Sequence[U8 | Failure]) -> Iterator[list[int]]:
    """Indices of the images that go together."""
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        if not isinstance(image, Failure):
            sizes[image.shape].append(index)
    for (height, width, _), indices in sizes.items():
        most = max(1, _MAX_PIXELS_A_REQUEST // max(height * width, _LEAST_PIXELS))
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


def _attempt(work: Callable[[U8], Sequence[T]], images: Sequence[Any]) -> Sequence[T | Failure]:
    try:
        return work(np.stack(images))
    except (InvalidInput, InferenceFailed) as error:
        return [error] * len(images)
