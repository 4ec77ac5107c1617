"""What it means that another model failed: the request's fault, a full queue, or the server's trouble."""

from __future__ import annotations

import re

from panotriton.errors import InferenceFailed, ServerBusy

__all__ = ["Unavailable", "failed"]

_GONE = re.compile(
    r"Stub process '\w+' is not healthy|Model '\w+' is not ready|has no available versions"
    r"|Server (?:is stopping|exiting)"
)
_FULL = "Exceeds maximum queue size"


class Unavailable(Exception):
    """A model that this one asks has no process at the moment: the server's trouble, not the request's."""


def failed(model: str, message: str) -> Exception:
    """What to raise for another model's error; 24.10 gives it no code that would tell the two apart."""
    if _FULL in message:
        return ServerBusy(f"{model}: {message}")
    gone = _GONE.search(message) is not None
    return (Unavailable if gone else InferenceFailed)(f"{model}: {message}")
