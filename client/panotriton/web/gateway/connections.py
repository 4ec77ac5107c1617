"""What the gateway's threads send their requests through."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from numpy.typing import NDArray

from panotriton.client.client import Client
from panotriton.errors import ConnectError, ModelUnavailable, SharedMemoryError

__all__ = ["Connection", "PatientConnection", "SharedConnection"]

_PAUSE_S = 0.25


class Connection(Protocol):
    """The part of `Client` that the gateway needs."""

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
    ) -> dict[str, NDArray[Any]]:
        """One request to one model; outputs may be given with the most bytes that they can have."""

    def ready(self) -> bool:
        """Whether the server answers and all its models are ready."""

    def close(self) -> None:
        """Let go of the connection."""


class PatientConnection:
    """Waits for a server that is away before its caller is told, who might go on with the next group."""

    def __init__(self, connection: Connection, wait_s: float) -> None:
        self._connection = connection
        self._wait_s = wait_s

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
    ) -> dict[str, NDArray[Any]]:
        """See `Client.infer`; again until `wait_s` have passed: the models keep nothing of a request."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return self._connection.infer(model, inputs, outputs)
            except (ConnectError, ModelUnavailable):
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_S)

    def ready(self) -> bool:
        """See `Client.ready`; does not wait."""
        return self._connection.ready()

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


class SharedConnection:
    """A client whose images travel through system shared memory; the server is on this machine."""

    def __init__(self, client: Client, max_bytes: int) -> None:
        self._client = client
        # One thread's pool is never full; what is waited for is only a last call when the gateway stops.
        self._new_memory = partial(client.shared_memory, max_bytes, wait_s=1.0)
        self._memory = self._new_memory()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
    ) -> dict[str, NDArray[Any]]:
        """See `Client.infer`. Raises ConnectError, too, where no region can be registered any more."""
        try:
            return self._client.infer(model, inputs, outputs, via=self._memory)
        except (ConnectError, ModelUnavailable, SharedMemoryError) as error:
            # A server that was started again knows none of the regions, and calls them not found.
            self._memory.close()
            self._memory = self._new_memory()
            if isinstance(error, SharedMemoryError) and not self._client.ready():
                raise ConnectError(str(error)) from error
            raise

    def ready(self) -> bool:
        """See `Client.ready`."""
        return self._client.ready()

    def close(self) -> None:
        """Remove the regions, then the connection."""
        self._memory.close()
        self._client.close()
