"""What the gateway's threads send their requests through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from panotriton.client.client import Client

__all__ = ["Connection", "SharedConnection"]


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


class SharedConnection:
    """A client whose images travel through system shared memory; the server is on this machine."""

    def __init__(self, client: Client, max_bytes: int) -> None:
        self._client = client
        # One thread's pool is never full; what is waited for is only a last call when the gateway stops.
        self._memory = client.shared_memory(max_bytes, wait_s=1.0)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] | Mapping[str, int],
    ) -> dict[str, NDArray[Any]]:
        """See `Client.infer`."""
        return self._client.infer(model, inputs, outputs, via=self._memory)

    def ready(self) -> bool:
        """See `Client.ready`."""
        return self._client.ready()

    def close(self) -> None:
        """Remove the regions, then the connection."""
        self._memory.close()
        self._client.close()
