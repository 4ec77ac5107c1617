"""Serve FastAPI applications until a signal, on sockets of our own, so that port 0 can be told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI

from panotriton.errors import ServerStartError

__all__ = ["serve"]

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the proxies, which else send a request on what is being closed


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`: one Ctrl-C ends all servers, and is not raised again."""
        yield


def serve(
    apps: Mapping[str, FastAPI],
    host: str,
    ports: Mapping[str, int],
    started: Callable[[dict[str, str]], None],
    *,
    option: str,
    grace_s: int,
    cut_off: bool = False,
) -> None:
    """Serve each application on its port until SIGINT or SIGTERM.

    started is called with the URLs once all listen; port 0 takes a free one. option: of the command
    line, which says the port, with {} for an application's name. Running requests get `grace_s` to
    end; with `cut_off` nothing is logged of those that don't. Raises ServerStartError where a port
    cannot be listened on.
    """
    with contextlib.ExitStack() as stack:
        listeners = {
            name: stack.enter_context(_listen(host, ports[name], option.format(name)))
            for name in apps
        }
        servers = {name: _Server(_config(app, grace_s)) for name, app in apps.items()}
        asyncio.run(_serve(servers, listeners, started, cut_off))


def _config(app: FastAPI, grace_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=grace_s,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


def _listen(host: str, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # What it accepts has it, too: callers that vanished without a word are not kept for ever.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerStartError(
            f"cannot listen on {host}:{port}: {reason}; stop what listens there or choose another "
            f"{option}"
        ) from error


async def _serve(
    servers: Mapping[str, _Server],
    listeners: Mapping[str, socket.socket],
    started: Callable[[dict[str, str]], None],
    cut_off: bool,
) -> None:
    def end() -> None:
        if cut_off:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        for server in servers.values():
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
    tasks = [
        asyncio.create_task(server.serve(sockets=[listeners[name]]))
        for name, server in servers.items()
    ]
    while not (up := all(s.started for s in servers.values())) and not any(t.done() for t in tasks):
        await asyncio.sleep(0.01)
    if up:
        started({name: _url(listener) for name, listener in listeners.items()})
    await asyncio.gather(*tasks)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
