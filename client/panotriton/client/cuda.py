"""CUDA shared memory: a region on the GPU that client and server both map.

Pixels never visit the client's host memory. The server's Python models, which receive them first, read them
from its own.

Needs the server on the same GPU, in another process, with shared pid and ipc namespaces where it
is in a container, and the `cuda` extra: pip install 'panotriton[cuda]' and torch.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import numpy as np

from panotriton.client.pixels import Images
from panotriton.errors import SharedMemoryError
from panotriton.pipeline.regions import PREFIX

__all__ = ["CudaSlot", "check_cuda"]


def check_cuda(device: int) -> None:
    """Raise SharedMemoryError, with the reason, where CUDA shared memory cannot work."""
    try:
        import torch  # noqa: PLC0415
        import tritonclient.utils.cuda_shared_memory  # noqa: F401, PLC0415
    except (ImportError, RuntimeError) as error:
        raise SharedMemoryError(
            f"CUDA shared memory needs torch and pip install 'panotriton[cuda]' ({error})"
        ) from error
    if not torch.cuda.is_available():
        raise SharedMemoryError(
            "CUDA shared memory needs an NVIDIA GPU that torch can use, and there is none here: use "
            "kind='system'"
        )
    if device >= torch.cuda.device_count():
        raise SharedMemoryError(
            f"device is {device}; expected 0 to {torch.cuda.device_count() - 1}"
        )


class CudaSlot:
    """One allocation on the GPU, exported to the server as an IPC handle."""

    kind = "cuda"

    def __init__(self, nbytes: int, device: int = 0) -> None:
        self.name = f"{PREFIX}{os.getpid()}_{uuid.uuid4().hex}"
        self.nbytes = nbytes
        self._device = device
        self._region: Any = None
        self._bytes: Any = None

    def open(self) -> None:
        """Allocate; raises SharedMemoryError with CUDA's reason."""
        import torch  # noqa: PLC0415
        import tritonclient.utils.cuda_shared_memory as cuda  # noqa: PLC0415

        try:
            region = cuda.create_shared_memory_region(self.name, self.nbytes, self._device)
            view = cuda.as_shared_memory_tensor(region, "UINT8", [self.nbytes])
        except cuda.CudaSharedMemoryException as error:
            raise SharedMemoryError(
                f"cannot allocate {self.nbytes} bytes on GPU {self._device}: {error}"
            ) from error
        self._region, self._bytes = region, torch.utils.dlpack.from_dlpack(view)

    def close(self) -> None:
        """Free the memory. The server has unregistered it, or holds its own mapping."""
        import tritonclient.utils.cuda_shared_memory as cuda  # noqa: PLC0415

        if self._region is not None:
            cuda.destroy_shared_memory_region(self._region)
            self._region = self._bytes = None

    def registration(self) -> tuple[Any, ...]:
        """The arguments of tritonclient's register function."""
        import tritonclient.utils.cuda_shared_memory as cuda  # noqa: PLC0415

        handle = cuda.get_raw_handle(self._region)
        return self.name, handle, self._device, self.nbytes

    def write(self, offset: int, images: Images) -> None:
        """Copy each part to its place: on the GPU for CUDA tensors, to it for arrays."""
        import torch  # noqa: PLC0415

        target = self.read(offset, images.shape, np.uint8)
        for row, part in zip((target,) if images.alone else target, images.parts, strict=True):
            row.copy_(torch.tensor(part) if isinstance(part, np.ndarray) else part)
        torch.cuda.synchronize(self._device)  # the server reads on a stream of its own

    def read(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """A uint8 CUDA tensor that views the slot."""
        if np.dtype(dtype) != np.uint8:
            raise SharedMemoryError(
                f"an output in CUDA memory is {np.dtype(dtype)}; expected uint8"
            )
        nbytes = int(np.prod(shape, dtype=np.int64))
        return self._bytes[offset : offset + nbytes].view(shape)

    def copied(self, view: Any) -> Any:
        """The view's content in memory of its own, on the same GPU."""
        import torch  # noqa: PLC0415

        copy = view.clone()
        torch.cuda.synchronize(self._device)  # before the server may write there again
        return copy
