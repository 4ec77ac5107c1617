"""The three services of a gateway on three ports of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI

from panotriton.web import asgi

__all__ = ["serve"]

_GRACE_S = 10


def serve(
    apps: Mapping[str, FastAPI],
    host: str,
    ports: Mapping[str, int],
    started: Callable[[dict[str, str]], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests end, for ten seconds at most.

    started is called with each service's URL once all of them listen; port 0 takes a free one.
    Raises ServerStartError where a port cannot be listened on.
    """
    asgi.serve(apps, host, ports, started, option="--{}-port", grace_s=_GRACE_S)
