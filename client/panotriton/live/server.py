"""Serve the live page until a signal, on a socket of our own, so that port 0 can be told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from panotriton.errors import ServerStartError

__all__ = ["serve"]

_GRACE_S = 1  # a run is cancelled, not waited for


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`, which ends without raising them again."""
        yield


def serve(app: FastAPI, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; running work is cancelled.

    started is called with the page's URL once it listens; port 0 takes a free one. Raises
    ServerStartError where the port cannot be listened on.
    """
    with _listen(host, port) as listener:
        asyncio.run(_serve(app, listener, lambda: started(_url(listener))))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerStartError(
            f"cannot listen on {host}:{port}: {reason}; stop what listens there or choose another --port"
        ) from error


async def _serve(app: FastAPI, listener: socket.socket, started: Callable[[], None]) -> None:
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    server = _Server(config)

    def end() -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # runs cut off: as intended
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        started()
    await serving


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
