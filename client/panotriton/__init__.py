"""Pairs of panoramas → quality-filtered, super-resolved image sequences, served by Triton."""

from importlib import metadata

from panotriton.client.aio import AsyncClient
from panotriton.client.client import Client, Tls
from panotriton.client.shared_memory import AsyncSharedMemory, SharedMemory
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

try:
    __version__ = metadata.version("panotriton")
except metadata.PackageNotFoundError:  # a source tree that is on the path and not installed
    __version__ = "unknown"
