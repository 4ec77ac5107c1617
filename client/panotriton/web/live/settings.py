"""What a live page is started with."""

from __future__ import annotations

from dataclasses import dataclass

from panotriton.client.transports.base import check_url
from panotriton.errors import InvalidInput
from panotriton.pipeline.contract import DEFAULTS, Options

__all__ = ["Settings"]

_LEAST = {"max_upload_bytes": 1, "max_visitors": 1}


@dataclass(frozen=True)
class Settings:
    """url: gRPC, host:port. host: what the page listens on, and is asked for by name.

    max_upload_bytes is for both panoramas of a run together, max_visitors for runs at a time. Raises
    InvalidInput for a number out of range.
    """

    url: str = "localhost:8001"
    host: str = "127.0.0.1"
    crop_size: int = DEFAULTS.crop_size
    upscale: int = DEFAULTS.upscale
    max_upload_bytes: int = 64 << 20
    max_visitors: int = 4

    def __post_init__(self) -> None:
        check_url(self.url)
        Options(crop_size=self.crop_size, upscale=self.upscale).check()
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected {least} or more")
