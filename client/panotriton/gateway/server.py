"""The three services of a gateway on three ports of one process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI

from panotriton.errors import ServerStartError

__all__ = ["serve"]

_GRACE_S = 10


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`: one Ctrl-C ends all three."""
        yield


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
    with contextlib.ExitStack() as stack:
        listeners = {name: stack.enter_context(_listen(host, ports[name], name)) for name in apps}
        asyncio.run(_serve(apps, listeners, started))


def _listen(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerStartError(
            f"cannot listen on {host}:{port}: {reason}; stop what listens there or choose another "
            f"--{name}-port"
        ) from error


async def _serve(
    apps: Mapping[str, FastAPI],
    listeners: Mapping[str, socket.socket],
    started: Callable[[dict[str, str]], None],
) -> None:
    servers = {name: _Server(_config(app)) for name, app in apps.items()}
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, list(servers.values()))
    tasks = [
        asyncio.create_task(server.serve(sockets=[listeners[name]]))
        for name, server in servers.items()
    ]
    while not all(server.started for server in servers.values()):
        await asyncio.sleep(0.01)
    started({name: _url(listener) for name, listener in listeners.items()})
    await asyncio.gather(*tasks)


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app, lifespan="off", log_level="warning", timeout_graceful_shutdown=_GRACE_S
    )


def _stop(servers: list[_Server]) -> None:
    for server in servers:
        server.should_exit = True


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
