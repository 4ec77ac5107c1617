"""The wire protocols. A third one is a module beside `grpc` and `http`, and its entry here."""

from __future__ import annotations

from importlib import import_module

from panotriton.client.transports.base import Transport
from panotriton.errors import InvalidInput, quoted

__all__ = ["TRANSPORTS", "Transport", "transport"]

TRANSPORTS = {
    "grpc": "panotriton.client.transports.grpc",
    "http": "panotriton.client.transports.http",
}
"""Module by protocol, imported when it is chosen: each drags in a network stack of its own."""


def transport(protocol: str, *, asynchronous: bool) -> type[Transport]:
    """What a client speaks through; raises InvalidInput for a protocol that there is not."""
    if protocol not in TRANSPORTS:
        known = " or ".join(map(repr, TRANSPORTS))
        raise InvalidInput(f"protocol is {quoted(protocol)}; expected {known}")
    module = import_module(TRANSPORTS[protocol])
    found: type[Transport] = module.Asynchronous if asynchronous else module.Blocking
    return found
