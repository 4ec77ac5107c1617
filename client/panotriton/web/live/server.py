"""Serve the live page until a signal."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from panotriton.web import asgi

__all__ = ["serve"]

_GRACE_S = 1  # a run is cancelled, not waited for


def serve(app: FastAPI, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; running work is cancelled.

    started is called with the page's URL once it listens; port 0 takes a free one. Raises
    ServerStartError where the port cannot be listened on.
    """
    asgi.serve(
        {"page": app},
        host,
        {"page": port},
        lambda urls: started(urls["page"]),
        option="--port",
        grace_s=_GRACE_S,
        cut_off=True,
    )
