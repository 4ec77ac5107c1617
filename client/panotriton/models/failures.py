"""What it means that another model failed: the request's fault, a full queue, or the server's trouble."""

from __future__ import annotations

from panotriton.errors import InferenceFailed, ServerBusy
from panotriton.pipeline.channel import in_trouble

__all__ = ["Unavailable", "failed"]

_FULL = "Exceeds maximum queue size"


class Unavailable(Exception):
    """A model that this one asks has no process at the moment: the server's trouble, not the request's."""


def failed(model: str, message: str) -> Exception:
    """What to raise for another model's error; 24.10 gives it no code that would tell the two apart."""
    if _FULL in message:
        return ServerBusy(f"{model}: {message}")
    return (Unavailable if in_trouble(message) else InferenceFailed)(f"{model}: {message}")
