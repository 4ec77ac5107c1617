"""Pairs of panoramas → quality-filtered, super-resolved image sequences, served by Triton."""

from panotriton import events
from panotriton.aio import AsyncClient
from panotriton.camera import Camera, crop, lerp, sample_cameras
from panotriton.client import Client, Tls
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
    SharedMemoryError,
)
from panotriton.results import (
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
from panotriton.shared_memory import AsyncSharedMemory, SharedMemory

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
