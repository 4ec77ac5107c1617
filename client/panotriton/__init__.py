"""Pairs of panoramas → quality-filtered, super-resolved image sequences, served by Triton."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from panotriton.errors import (
    ConnectError,
    ExportError,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    ServerStartError,
    ServerUnavailable,
    SharedMemoryError,
)
from panotriton.pipeline import events
from panotriton.pipeline.camera import Camera, crop, lerp, sample_cameras
from panotriton.pipeline.results import (
    Cropped,
    Description,
    Group,
    Health,
    Interval,
    Model,
    Pair,
    Score,
    Sequence,
    StageTime,
    Timings,
    Upscaled,
)

if TYPE_CHECKING:
    from panotriton.client.aio import AsyncClient
    from panotriton.client.client import Client, Tls
    from panotriton.client.shared_memory import AsyncSharedMemory, SharedMemory

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncSharedMemory",
    "Camera",
    "Client",
    "ConnectError",
    "Cropped",
    "Description",
    "ExportError",
    "Group",
    "Health",
    "InferenceFailed",
    "Interval",
    "InvalidImage",
    "InvalidInput",
    "Model",
    "ModelUnavailable",
    "Pair",
    "PanotritonError",
    "RequestTimeout",
    "Score",
    "Sequence",
    "ServerBusy",
    "ServerStartError",
    "ServerUnavailable",
    "SharedMemory",
    "SharedMemoryError",
    "StageTime",
    "Timings",
    "Tls",
    "Upscaled",
    "crop",
    "events",
    "lerp",
    "sample_cameras",
]

_CLIENT = {
    "AsyncClient": "aio",
    "AsyncSharedMemory": "shared_memory",
    "Client": "client",
    "SharedMemory": "shared_memory",
    "Tls": "client",
}


def __getattr__(name: str) -> Any:
    """The client and the version, which take as long to import as all else and which none of the server's
    dozen processes needs."""
    if name in _CLIENT:
        value = getattr(import_module(f"panotriton.client.{_CLIENT[name]}"), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLIENT, "__version__"})


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415

    try:
        return metadata.version("panotriton")
    except metadata.PackageNotFoundError:  # a source tree that is on the path and not installed
        return "unknown"
