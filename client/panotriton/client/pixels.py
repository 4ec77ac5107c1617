"""What callers hold as an image → uint8 RGB pixels (H, W, 3). Layouts are checked, never guessed."""

from __future__ import annotations

import math
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from panotriton.errors import InvalidImage, brief
from panotriton.pipeline.checks import check_panorama
from panotriton.pipeline.contract import MAX_FILE_BYTES, MIN_SIDE_PX
from panotriton.pipeline.images import check_encoded, decode_image, picture_pixels

__all__ = [
    "ImageLike",
    "Images",
    "TorchTensor",
    "encoded_panorama",
    "file_bytes",
    "is_file",
    "pixels",
    "same_size",
]


class TorchTensor(Protocol):
    """A torch.Tensor, named without importing torch: (3, H, W), floating point, in [0, 1]."""

    def aminmax(self) -> Any: ...
    def is_floating_point(self) -> bool: ...


ImageLike = str | Path | PILImage.Image | NDArray[np.uint8] | TorchTensor
"""Path of an image file | PIL image, RGB, CMYK, palette or grey | (H, W, 3) uint8 array | torch tensor."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels that travel as one uint8 tensor, joined only where they are written.

    parts: arrays, or CUDA tensors, of one shape. The tensor is (N, *shape), or the shape itself where
    `alone` says that the one part is the whole tensor.
    """

    parts: tuple[Any, ...]
    alone: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        one = tuple(int(side) for side in self.parts[0].shape)
        return one if self.alone else (len(self.parts), *one)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def joined(self) -> NDArray[np.uint8]:
        """The tensor as one array in host memory."""
        hosts = [
            part if isinstance(part, np.ndarray) else part.cpu().numpy() for part in self.parts
        ]
        if len(hosts) == 1:
            return np.ascontiguousarray(hosts[0] if self.alone else hosts[0][None])
        return np.stack(hosts)


def is_file(image: ImageLike) -> bool:
    """Whether `image` is a path."""
    return isinstance(image, (str, Path))


def file_bytes(path: Any) -> NDArray[np.object_]:
    """A file as a string tensor (1,). Raises InvalidImage where it cannot be read or is over 512 MB."""
    try:
        about = Path(path).stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, and has no size
            raise InvalidImage(f"{brief(path)} is not a file; expected one that holds an image")
        if about.st_size > MAX_FILE_BYTES:
            raise InvalidImage(
                f"{brief(path)} has {about.st_size} bytes; expected at most {MAX_FILE_BYTES}"
            )
        return np.array([Path(path).read_bytes()], np.object_)
    except OSError as error:
        raise InvalidImage(f"cannot read {brief(path)}: {error.strerror}") from error


def encoded_panorama(path: Any) -> NDArray[np.object_]:
    """A file to be decoded by the server, refused here where its header is wrong already."""
    data = file_bytes(path)
    check_encoded(str(path), data.item())
    return data


def pixels(
    name: str,
    image: ImageLike,
    *,
    min_side_px: int = MIN_SIDE_PX,
    max_aspect: float = math.inf,
    cuda: bool = False,
) -> Any:
    """`image` as (H, W, 3) uint8: an array, or with `cuda` a CUDA tensor where it is one already.

    Files and PIL images are turned upright and converted to sRGB by what they say of themselves; arrays
    and tensors are taken as they are.

    Raises InvalidImage, naming `name`, for every other kind, layout, dtype, range or size.
    """
    if isinstance(image, (str, Path)):
        return decode_image(str(image), file_bytes(image).item(), min_side_px, max_aspect)
    if isinstance(image, PILImage.Image):
        return picture_pixels(name, image, min_side_px, max_aspect)
    if isinstance(image, np.ndarray):
        check_panorama(name, image, min_side_px, max_aspect)
        return image
    if _is_torch(image):
        return _torch_pixels(name, image, min_side_px, max_aspect, cuda)
    raise InvalidImage(
        f"{name} is a {type(image).__name__}; expected a path, a PIL image, a (H, W, 3) uint8 array or a "
        "(3, H, W) float torch tensor in [0, 1]"
    )


def same_size(images: list[Any]) -> list[list[int]]:
    """Indices of (H, W, 3) images grouped by size, each group and their order as in `images`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(index)
    return list(groups.values())


def _is_torch(image: object) -> bool:
    torch = sys.modules.get("torch")  # a caller who holds a tensor has imported it
    return torch is not None and isinstance(image, torch.Tensor)


def _torch_pixels(name: str, tensor: Any, min_side_px: int, max_aspect: float, cuda: bool) -> Any:
    if not tensor.is_floating_point():
        raise InvalidImage(
            f"{name} is a torch tensor of {tensor.dtype}; expected floats in [0, 1], (3, H, W): send uint8 "
            "pixels as a (H, W, 3) array"
        )
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise InvalidImage(
            f"{name} has shape {tuple(tensor.shape)}; expected (3, H, W), one RGB image: send several "
            "as a list"
        )
    _check_range(name, tensor)
    torch = sys.modules["torch"]
    scaled = (tensor.detach().float() * 255).round().to(torch.uint8)
    image = scaled.permute(1, 2, 0).contiguous()  # (H, W, 3)
    if not (cuda and image.is_cuda):
        image = image.cpu().numpy()
    # The shape alone is checked here: a stand-in of no memory spares a copy from the GPU.
    shape = np.broadcast_to(np.uint8(0), tuple(image.shape))
    check_panorama(name, shape, min_side_px, max_aspect)
    return image


def _check_range(name: str, tensor: Any) -> None:
    if not tensor.numel():
        return
    low, high = (float(value) for value in tensor.detach().aminmax())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise InvalidImage(
            f"{name} has values from {low:g} to {high:g}; expected [0, 1]: divide 0…255 by 255, map "
            "[-1, 1] by (x + 1) / 2"
        )
