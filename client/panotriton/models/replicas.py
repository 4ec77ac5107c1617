"""A network on other servers: a gRPC channel to each replica, and a call to the one that has least to do.

Which networks those are, `panotriton.pipeline.placement` reads; `requests.call` asks them as it asks
models of the same server. Torch-free.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from panotriton.errors import InferenceFailed, ServerBusy
from panotriton.models.failures import Unavailable, failed
from panotriton.pipeline.channel import DEATHS, NEVER_SENT, SILENT_S, WATCH_EVERY_S, channel
from panotriton.pipeline.placement import SETTING

__all__ = ["Replicas"]

_LOOK_EVERY_S = 10.0  # for replicas that came or went
_REST_S = 1.0  # of a replica that failed, doubled each time it does so again
_MOST_REST_S = 30.0
# Statuses that tell of the server. The others are the request's, unless the words say otherwise.
_TROUBLE = ("UNAVAILABLE", "CANCELLED", "NOT_FOUND", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")

Tensors = dict[str, NDArray[Any]]


class Replicas:
    """All servers behind some addresses, host:port. For the coroutines of one event loop.

    Host names are looked up anew every ten seconds, so that replicas may come and go. `warn` is told once of
    each that fails.
    """

    def __init__(self, addresses: Sequence[str], warn: Callable[[str], None]) -> None:
        self._addresses = addresses
        self._warn = warn
        self._replicas: dict[str, _Replica] = {}  # by IP address and port
        self._unknown: dict[str, str] = {}  # address → why it could not be looked up
        self._looking: asyncio.Future[None] | None = None
        self._looked_s = 0.0

    async def call(self, model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Tensors:
        """Send one request to the replica that has least to do, and to another where it is in trouble.

        Raises InferenceFailed with the model's own message, ServerBusy where queues are full, Unavailable
        with every address and its trouble.
        """
        encoded = [_encode(name, np.ascontiguousarray(v)) for name, v in inputs.items()]
        tried: dict[str, Exception] = {}
        deaths = 0
        await self._look()
        while deaths < DEATHS and (replica := self._best(tried)):
            try:
                tensors = await replica.ask(model, encoded, outputs)
            except ServerBusy as error:
                tried[replica.url] = error
            except _Away as away:
                deaths += away.lost
                tried[replica.url] = away
                if replica.rest():
                    self._warn(f"{model} at {replica.url}: {away}; others are asked")
            else:
                replica.well()
                return tensors
        raise self._nobody(model, tried)

    def _best(self, tried: Collection[str]) -> _Replica | None:
        """Not one that rests if another is left; of those the one with least to do, then the longest idle."""
        now = time.monotonic()
        left = (replica for url, replica in self._replicas.items() if url not in tried)
        return min(left, key=lambda each: each.merit(now), default=None)

    def _nobody(self, model: str, tried: Mapping[str, Exception]) -> Exception:
        """In the words of a server that has lost a model, which callers know as its trouble."""
        for error in tried.values():
            if isinstance(error, ServerBusy):
                return error
        reasons = self._unknown | {url: str(error) for url, error in tried.items()}
        listed = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
        return Unavailable(
            f"{model}: Model '{model}' is not ready where {SETTING} has it, {', '.join(self._addresses)} "
            f"({listed})"
        )

    async def _look(self) -> None:
        """Look the addresses up, if it is time; only the first call waits for that."""
        stale = not self._replicas or time.monotonic() - self._looked_s > _LOOK_EVERY_S
        if self._looking is None or (self._looking.done() and stale):
            self._looked_s = time.monotonic()
            self._looking = asyncio.ensure_future(self._look_up())
        if not self._replicas:
            await asyncio.shield(self._looking)

    async def _look_up(self) -> None:
        known = await asyncio.gather(*map(_resolved, self._addresses), return_exceptions=True)
        results = dict(zip(self._addresses, known, strict=True))
        self._unknown = {a: str(urls) for a, urls in results.items() if not isinstance(urls, list)}
        urls = {url for urls in known if isinstance(urls, list) for url in urls}
        if self._unknown and not urls:
            return  # name servers have bad moments: who was there may still be
        for url in self._replicas.keys() - urls if not self._unknown else ():
            await self._replicas.pop(url).leave()
        self._replicas |= {url: _Replica(url) for url in urls - self._replicas.keys()}


class _Away(Exception):
    """A server did not answer. lost: while it had the request, so that the request may be why."""

    def __init__(self, reason: str, *, lost: bool) -> None:
        super().__init__(reason)
        self.lost = lost


class _Replica:
    """One server, at an IP address."""

    def __init__(self, url: str) -> None:
        self.url = url
        options = channel(url, direct=True)  # pods beside this one
        self._client = InferenceServerClient(url, channel_args=options)
        # For what must not wait behind tensors.
        self._questions = InferenceServerClient(url, channel_args=options)
        self._out: set[asyncio.Task[Tensors]] = set()
        self._asked_s = 0.0
        self._failures = 0
        self._rests_until_s = 0.0
        self._left = False

    def merit(self, now: float) -> tuple[bool, int, float]:
        """The least is the best to ask."""
        return now < self._rests_until_s, len(self._out), self._asked_s

    def rest(self) -> bool:
        """Leave it out for a while, longer each time; whether it was well before."""
        length_s = min(_REST_S * 2.0**self._failures, _MOST_REST_S)
        self._rests_until_s = time.monotonic() + length_s
        self._failures += 1
        return self._failures == 1

    def well(self) -> None:
        """It has answered."""
        self._failures, self._rests_until_s = 0, 0.0

    async def leave(self) -> None:
        """Ask it nothing more; what it has at hand is waited for."""
        self._left = True
        await self._close_idle()

    async def ask(self, model: str, inputs: Sequence[Any], outputs: Sequence[str]) -> Tensors:
        self._asked_s = time.monotonic()
        answer = asyncio.ensure_future(self._infer(model, inputs, outputs))
        # Never cancelled: a server before 2.57 (25.04) may end by that. What nobody waits for any more ends
        # unheard, as it does between models of one server.
        self._out.add(answer)
        answer.add_done_callback(self._answered)
        await self._watch(answer)
        return answer.result()

    async def _infer(self, model: str, inputs: Sequence[Any], outputs: Sequence[str]) -> Tensors:
        wanted = [InferRequestedOutput(name) for name in outputs]
        try:
            result = await self._client.infer(model, inputs, outputs=wanted)
            return {name: result.as_numpy(name) for name in outputs}
        except InferenceServerException as error:
            raise _meaning(model, error) from error
        finally:
            await self._close_idle()

    def _answered(self, answer: asyncio.Task[Tensors]) -> None:
        self._out.discard(answer)
        _ = answer.cancelled() or answer.exception()  # it may be nobody else's

    async def _watch(self, answer: asyncio.Future[Tensors]) -> None:
        """Wait; pings know only that the machine lives, a server that is stopped answers nobody."""
        while not (await asyncio.wait({answer}, timeout=WATCH_EVERY_S))[0]:
            try:
                await self._questions.is_server_live(client_timeout=SILENT_S)
            except InferenceServerException as error:
                if not answer.done():
                    raise _Away(f"no sign of life for {SILENT_S:g} s", lost=True) from error

    async def _close_idle(self) -> None:
        if self._left and not self._out - {asyncio.current_task()}:
            await self._client.close()
            await self._questions.close()


def _meaning(model: str, error: InferenceServerException) -> Exception:
    """Ours for tritonclient's error."""
    message = (error.message() or "no reason given").strip()
    ours = failed(model, message)
    status = (error.status() or "").removeprefix("StatusCode.")
    if isinstance(ours, InferenceFailed) and status in _TROUBLE:
        return _Away(message, lost=status == "UNAVAILABLE" and NEVER_SENT not in message)
    return _Away(message, lost=False) if isinstance(ours, Unavailable) else ours


def _encode(name: str, array: NDArray[Any]) -> Any:
    tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)


async def _resolved(address: str) -> list[str]:
    """IP addresses with the port, for a host and a port."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(place[0] for *_, place in found)
    return [f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}" for host in hosts]
