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

if TYPE_CHECKING:
    from panotriton.client.aio import AsyncClient
    from panotriton.client.client import Client, Tls
    from panotriton.client.shared_memory import AsyncSharedMemory, SharedMemory
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

_MODULES = {
    "client.aio": ("AsyncClient",),
    "client.client": ("Client", "Tls"),
    "client.shared_memory": ("AsyncSharedMemory", "SharedMemory"),
    "pipeline.camera": ("Camera", "crop", "lerp", "sample_cameras"),
    "pipeline.results": (
        "Cropped",
        "Description",
        "Group",
        "Health",
        "Interval",
        "Model",
        "Pair",
        "Score",
        "Sequence",
        "StageTime",
        "Timings",
        "Upscaled",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for: most of the server's two dozen processes need neither the client nor OpenCV
    and Pillow, which take longer to import than all else."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"panotriton.{_MODULE_OF[name]}"), name)
    elif name == "events":
        value = import_module("panotriton.pipeline.events")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415

    try:
        return metadata.version("panotriton")
    except metadata.PackageNotFoundError:  # a source tree that is on the path and not installed
        return "unknown"
