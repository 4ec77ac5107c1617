"""What the endpoints of all three services share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastapi import Request, Response

from panotriton.client.transports.base import check_url
from panotriton.errors import ConnectError, InvalidInput
from panotriton.groups.folder import JPEG_QUALITY
from panotriton.pipeline.contract import DEFAULTS, Options
from panotriton.web.gateway.connections import Connection
from panotriton.web.gateway.groups import Groups, groups_home
from panotriton.web.gateway.paths import Roots
from panotriton.web.gateway.portions import Portions
from panotriton.web.gateway.tensors import Incoming, TensorOptions, read
from panotriton.web.gateway.workers import Workers

__all__ = ["Context", "Settings"]

O = TypeVar("O", bound=TensorOptions)  # noqa: E741
T = TypeVar("T")


_LIMITS = {
    "seed": (0, 2**62),
    "threads": (1, 256),
    "max_waiting": (0, 65536),
    "max_body_bytes": (1, 1 << 40),
    "jpeg_quality": (1, 100),
}


@dataclass(frozen=True)
class Settings:
    """A gateway's options.

    output: where preprocessing makes group folders; a root as well. seed: group g draws its cameras
    from seed + g; None: a number made of output's path, so that gateways with different outputs draw
    differently and each the same again. wait_s: how long a request waits for a Triton server that is
    away before it is answered 503. max_body_bytes bounds tensor requests; those with paths are bounded
    to 4 MiB.
    shared_memory: the server is on this machine and may map regions of each thread. answer_within_s:
    when a request with a list of images is answered at the latest, with those that are done; None:
    when all are. jpeg_quality: of the .jpg files that are written, 1 to 100.
    Raises InvalidInput for a number out of range.
    """

    output: Path
    roots: tuple[Path, ...] = ()
    url: str = "localhost:8001"
    seed: int | None = None
    crop_size: int = DEFAULTS.crop_size
    upscale: int = DEFAULTS.upscale
    threads: int = 4
    max_waiting: int = 64
    max_body_bytes: int = 512 << 20
    shared_memory: bool = False
    timeout_s: float = 3600.0
    wait_s: float = 5.0
    answer_within_s: float | None = None
    jpeg_quality: int = JPEG_QUALITY
    max_path_body_bytes: int = field(default=4 << 20, init=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        Options(crop_size=self.crop_size, upscale=self.upscale).check()
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidInput(f"{name} is {value}; expected {low} to {high}")
        if self.answer_within_s is not None and not self.answer_within_s > 0:
            raise InvalidInput(f"answer_within_s is {self.answer_within_s}; expected more than 0")

    def first_seed(self) -> int:
        """`seed`, or what output's path makes of it: 0 to 2⁶² - 1."""
        if self.seed is not None:
            return self.seed
        path = os.fsencode(os.path.realpath(self.output))
        return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big") >> 2


class Context:
    """The settings and the resources of a running gateway."""

    def __init__(self, settings: Settings, roots: Roots, workers: Workers) -> None:
        self.settings = settings
        self.roots = roots
        self.groups = Groups(roots, groups_home(settings.output), settings.first_seed())
        self._workers = workers

    async def run(self, work: Callable[[Context, Connection, T], object], request: T) -> object:
        """The answer of one path endpoint's function, on a thread of its own."""
        return await self._workers.run(lambda client: work(self, client, request))

    def portions(self, endpoint: str) -> Portions:
        """The work of a request that has just come in."""
        return Portions(endpoint, self.settings.answer_within_s)

    async def run_tensor(
        self,
        work: Callable[[Context, Connection, Incoming[O]], Response],
        request: Request,
        options: type[O],
        min_side_px: int,
    ) -> Response:
        """Read a tensor request and answer it; both on a thread of its own, since bodies are large."""
        kind = request.headers.get("content-type", "")
        body = await request.body()
        incoming = partial(read, body, kind, request.query_params, options, min_side_px)
        return await self._workers.run(lambda client: work(self, client, incoming()))

    async def check_health(self) -> None:
        """Raise ConnectError unless the server answers and its models are ready."""
        if not await self._workers.ready():
            raise ConnectError(
                f"the Triton server at {self.settings.url} is not ready; start it with `panotriton serve`"
            )
