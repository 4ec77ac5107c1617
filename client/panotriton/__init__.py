"""Pairs of panoramas → quality-filtered, super-resolved image sequences, served by Triton."""

from panotriton.camera import Camera, crop, lerp, sample_cameras
from panotriton.client import Client
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
from panotriton.results import Group, Interval, Pair, Sequence, StageTime

__all__ = [
    "Camera",
    "Client",
    "ConnectError",
    "ExportError",
    "Group",
    "InferenceFailed",
    "Interval",
    "InvalidImage",
    "InvalidInput",
    "ModelUnavailable",
    "Pair",
    "PanotritonError",
    "RequestTimeout",
    "Sequence",
    "ServerBusy",
    "ServerStartError",
    "SharedMemoryError",
    "StageTime",
    "crop",
    "lerp",
    "sample_cameras",
]
