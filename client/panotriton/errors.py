"""Every error that this package raises on purpose.

PanotritonError
├── ConnectError          no server answers at that address
│   └── ServerUnavailable the server went, froze, stops or lost a model's process before it answered
│       └── OutOfPatience a data-set run has waited long enough for a healthy server
├── RequestTimeout        the server did not answer in time
├── ServerBusy            the server refused the request because its queues are full
├── InvalidInput          a request or an argument is wrong; the message says what to send instead
│   └── InvalidImage      an image is of the wrong kind, too large or broken
├── ModelUnavailable      the server runs but does not serve that model
├── InferenceFailed       a model failed on a request that was well formed
├── StoreError            an object store refused, or could not be reached
├── SharedMemoryError     a shared-memory region could not be made, registered or removed
├── ExportError           weights cannot be turned into what the server loads
├── EngineError           an engine is not installed, or cannot open a graph
└── ServerStartError      the local server did not come up
    └── RepositoryMissing there is no exported repository; an InvalidInput as well
"""

from __future__ import annotations

from collections.abc import Callable

_ECHO = 80  # characters


class PanotritonError(Exception):
    """Root of the tree: catch this to catch everything that the package raises on purpose."""


class ConnectError(PanotritonError):
    """No server answers at that address."""


class ServerUnavailable(ConnectError):
    """The server that was there went, froze, stops, or lost a model's process before it answered.

    Nothing is wrong with the request. lost: whether the connection went while the request was out, so
    that the request itself may have ended the server.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class OutOfPatience(ServerUnavailable):
    """No healthy server answered for as long as a data-set run was told to wait for one."""


class RequestTimeout(PanotritonError):
    """The server did not answer within the time allowed."""


class ServerBusy(PanotritonError):
    """The server refused the request because its queues are full; try again later."""


class InvalidInput(PanotritonError):
    """A request is wrong; the message names the tensor or file, what was expected and the fix."""


class InvalidImage(InvalidInput):
    """An image has the wrong shape, dtype or size, or its file is broken."""


class ModelUnavailable(PanotritonError):
    """The server is up but does not serve that model."""


class InferenceFailed(PanotritonError):
    """A model failed on a well-formed request; the server's log has the details."""


class StoreError(PanotritonError):
    """An object store refused a request or could not be reached; the message names the object."""


class SharedMemoryError(PanotritonError):
    """A shared-memory region could not be made, registered or removed."""


class ExportError(PanotritonError):
    """Weights or folders cannot be turned into what the server loads."""


class EngineError(PanotritonError):
    """An engine is not installed, does not know a setting, or cannot open a graph."""


class ServerStartError(PanotritonError):
    """The local server did not come up; the message carries the reason from its log."""


class RepositoryMissing(ServerStartError, InvalidInput):
    """There is no model repository at that place, or it is not exported, or not whole."""


def brief(value: object) -> str:
    """A value's text as errors give it back: its last 80 characters where it is longer.

    Of a path the end says most. A message that holds all of a long value does not fit where gRPC sends it.
    """
    text = _text(str, value)
    return text if len(text) <= _ECHO else f"…{text[1 - _ECHO :]}"


def quoted(value: object) -> str:
    """A value as errors quote it: its repr, the first 80 characters where it is longer."""
    text = _text(repr, value[: _ECHO + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= _ECHO else f"{text[: _ECHO - 1]}…"


def _text(write: Callable[[object], str], value: object) -> str:
    try:
        return write(value)
    except ValueError:  # a whole number of so many digits that Python does not write it
        return f"a {type(value).__name__} too long to write"
