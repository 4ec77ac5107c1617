"""Between `Call`s and tritonclient: tensors, status codes, statistics and TLS, for both protocols.

Pure functions, shared by `Client` and `AsyncClient`; neither awaits anything here.
"""

from __future__ import annotations

import asyncio
import io
import random
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from panotriton.client.calls import Call
from panotriton.client.pixels import Images
from panotriton.client.shared_memory import Layout, Slot
from panotriton.errors import (
    ConnectError,
    InferenceFailed,
    InvalidInput,
    ModelUnavailable,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    quoted,
)
from panotriton.pipeline.results import Health, Model, StageTime, Timings

__all__ = ["Address", "Tls"]

PROTOCOLS = ("grpc", "http")
CONNECT_TIMEOUT_S = 10.0

# Messages of any size; and a server that was away is looked for every second, not, as by default, after
# up to two minutes: our own retries would find the channel asleep.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Where a server's error is longer than the usual 8 KB, gRPC says that it has no resources left.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

# Status codes of gRPC and HTTP → our errors. Unavailable is settled by asking whether it lives.
_ERRORS: dict[str, type[PanotritonError]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidInput,
    "StatusCode.NOT_FOUND": ModelUnavailable,
    "StatusCode.RESOURCE_EXHAUSTED": ServerBusy,
    "400": InvalidInput,
    "404": ModelUnavailable,
    "429": ServerBusy,
}
_TIMED_OUT = ("StatusCode.DEADLINE_EXCEEDED", "499", "504")
_UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503")
_BACKOFF_S = 0.25


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files. ca: who may have signed the server's certificate (None: the system's list).

    certificate and key are the client's own, for servers that ask for one.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def context(self) -> Any:
        """An SSL context with these files, host names checked."""
        return self._with_certificate(ssl.create_default_context(cafile=_text(self.ca)))

    def gevent_context(self, cafile: str | None = None) -> Any:
        """The same for tritonclient's HTTP client, whose own idea of `cafile` does not count."""
        import gevent.ssl  # type: ignore[import-untyped]  # noqa: PLC0415

        return self._with_certificate(gevent.ssl.create_default_context(cafile=_text(self.ca)))

    def _with_certificate(self, context: Any) -> Any:
        if self.certificate is not None:
            context.load_cert_chain(str(self.certificate), _text(self.key))
        return context

    def grpc_options(self) -> dict[str, Any]:
        """As tritonclient's gRPC clients take them."""
        return {
            "ssl": True,
            "root_certificates": _text(self.ca),
            "certificate_chain": _text(self.certificate),
            "private_key": _text(self.key),
        }


@dataclass(frozen=True)
class Address:
    """Where the server is and how to talk to it; checked when made, not contacted."""

    url: str
    protocol: str
    timeout_s: float
    tls: Tls | None
    headers: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InvalidInput(f"protocol is {quoted(self.protocol)}; expected 'grpc' or 'http'")
        if "://" in self.url:
            raise InvalidInput(f"url is {quoted(self.url)}; expected host:port without a scheme")

    @property
    def is_grpc(self) -> bool:
        return self.protocol == "grpc"

    def headers_for_one(self) -> dict[str, str]:
        """A copy: tritonclient adds its own headers to the dict that it is given."""
        return {name.lower(): value for name, value in self.headers.items()}

    def grpc_options(self) -> dict[str, Any]:
        """As tritonclient's gRPC clients take them."""
        return {"channel_args": _CHANNEL} | (self.tls.grpc_options() if self.tls else {})

    def call_options(self) -> dict[str, Any]:
        """For one inference: the time that it may take, told to the server too, and the headers."""
        options: dict[str, Any] = {"headers": self.headers_for_one()}
        if self.is_grpc:
            options["client_timeout"] = self.timeout_s
        return options | {"timeout": int(self.timeout_s * 1e6)}

    def short_options(self, timeout_s: float = CONNECT_TIMEOUT_S) -> dict[str, Any]:
        """For a question that is answered at once."""
        options: dict[str, Any] = {"headers": self.headers_for_one()}
        return options | (
            {"client_timeout": min(timeout_s, self.timeout_s)} if self.is_grpc else {}
        )


def address(
    url: str,
    protocol: str,
    timeout_s: float,
    tls: bool | Tls,
    headers: Mapping[str, str] | None,
) -> Address:
    """The clients' common arguments; tls=True trusts the system's list."""
    found = tls if isinstance(tls, Tls) else Tls() if tls else None
    return Address(url, protocol, timeout_s, found, dict(headers or {}))


def import_wire(protocol: str, *, asynchronous: bool = False) -> ModuleType:
    """tritonclient's module. On demand: each drags in its own network stack."""
    if protocol == "grpc":
        from tritonclient import grpc  # noqa: PLC0415

        if asynchronous:
            import tritonclient.grpc.aio as grpc  # noqa: PLC0415
        return grpc  # type: ignore[no-any-return]
    if asynchronous:
        import tritonclient.http.aio as http  # noqa: PLC0415
    else:
        from tritonclient import http  # noqa: PLC0415
    return http  # type: ignore[no-any-return]


def async_http_client(url: str, **options: Any) -> Any:
    """tritonclient's, but large bodies are sent in pieces: whole, they hold up the event loop."""
    from tritonclient.http.aio import InferenceServerClient  # noqa: PLC0415

    class Pieces(InferenceServerClient):  # type: ignore[misc]
        async def _post(self, *, request_body: Any, **more: Any) -> Any:
            if isinstance(request_body, bytes):
                request_body = io.BytesIO(request_body)
            return await super()._post(request_body=request_body, **more)

    return Pieces(url, **options)


def failures(protocol: str) -> tuple[type[BaseException], ...]:
    """What tritonclient raises when a request fails: its own error, and those of its network stack."""
    known: tuple[type[BaseException], ...] = (
        InferenceServerException,
        OSError,
        asyncio.TimeoutError,  # not OSError's before Python 3.11
    )
    if protocol == "grpc":
        from grpc import RpcError  # type: ignore[import-untyped]  # noqa: PLC0415

        return (*known, RpcError)  # tritonclient leaves those of an asynchronous stream as they are
    from aiohttp import ClientError  # noqa: PLC0415
    from geventhttpclient.response import HTTPParseError  # noqa: PLC0415

    return (*known, ClientError, HTTPParseError)


def waits(retries: int) -> Iterator[float]:
    """Seconds to wait before each retry: 0.25, 0.5, 1 …, each ± half, so that clients spread out."""
    for attempt in range(retries):
        yield _BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


def encode(
    wire: ModuleType, call: Call[Any], slot: Slot | None = None, layout: Layout | None = None
) -> tuple[list[Any], list[Any]]:
    """tritonclient's inputs and outputs. What `layout` places is written to `slot`, in place."""
    inputs = []
    for name, value in call.inputs.items():
        kind = "UINT8" if isinstance(value, Images) else np_to_triton_dtype(value.dtype)
        tensor = wire.InferInput(name, list(value.shape), kind)
        if isinstance(value, Images) and slot and layout and name in layout.inputs:
            slot.write(layout.inputs[name].offset, value)
            tensor.set_shared_memory(slot.name, *_span(layout.inputs[name]))
        else:
            tensor.set_data_from_numpy(value.joined() if isinstance(value, Images) else value)
        inputs.append(tensor)
    outputs = [wire.InferRequestedOutput(name) for name in call.outputs]
    for output in outputs:
        if slot and layout and output.name() in layout.outputs:
            output.set_shared_memory(slot.name, *_span(layout.outputs[output.name()]))
    return inputs, outputs


def decode(
    result: Any, call: Call[Any], slot: Slot | None = None, layout: Layout | None = None
) -> dict[str, Any]:
    """The named outputs; those in `slot` as views of it."""
    return {
        name: slot.read(layout.outputs[name].offset, *_shape_and_dtype(result.get_output(name)))
        if slot and layout and name in layout.outputs
        else result.as_numpy(name)
        for name in call.outputs
    }


def _span(span: Any) -> tuple[int, int]:
    return span.nbytes, span.offset


def _shape_and_dtype(output: Any) -> tuple[tuple[int, ...], Any]:
    if isinstance(output, dict):
        return tuple(output["shape"]), triton_to_np_dtype(output["datatype"])
    return tuple(output.shape), triton_to_np_dtype(output.datatype)


def doubtful(error: BaseException) -> bool:
    """Whether only asking the server if it lives tells a full queue from a server that is gone."""
    return _status(error) in _UNAVAILABLE


def _status(error: BaseException) -> str | None:
    if isinstance(error, InferenceServerException):
        return error.status()  # type: ignore[no-any-return]
    code = getattr(error, "code", None)  # grpc.RpcError
    return str(code()) if callable(code) else None


def mapped(where: Address, error: BaseException, live: bool) -> PanotritonError:
    """Our error for tritonclient's, by its status code. `live` settles the doubtful ones."""
    status = _status(error)
    if status is None and isinstance(error, InferenceServerException):  # inside a stream
        return InferenceFailed(_message(error))
    timed_out = isinstance(error, (TimeoutError, asyncio.TimeoutError))
    if timed_out or status in _TIMED_OUT:
        return RequestTimeout(f"{where.url} did not answer within {where.timeout_s:g} s")
    if doubtful(error) and live:
        return ServerBusy(f"{where.url}: {_message(error)}")
    if status is None or status in _UNAVAILABLE:
        return ConnectError(
            f"no server answers over {where.protocol} at {where.url} ({_message(error)}); "
            "start one with `panotriton serve`, or name another with --url"
        )
    return _ERRORS.get(status, InferenceFailed)(_message(error))


def finished(error: BaseException) -> bool:
    """Whether the server has ended a request that failed so, and touches its memory no more."""
    answered = isinstance(error, PanotritonError)
    return answered and not isinstance(error, (RequestTimeout, ConnectError))


def _message(error: BaseException) -> str:
    text = error.message() if isinstance(error, InferenceServerException) else _details(error)
    return (text or type(error).__name__).removeprefix("[request id: <id_unknown>] ").strip()


def _details(error: BaseException) -> str:
    details = getattr(error, "details", None)  # grpc.RpcError
    return str(details() if callable(details) else error)


def event_tensors(result: Any) -> dict[str, Any]:
    """A stream's response: only the outputs that it holds."""
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def not_served(model: str) -> ModelUnavailable:
    """For a model that is missing or not ready."""
    return ModelUnavailable(
        f"the server does not serve {quoted(model)}; `models()` lists what it serves"
    )


def stage_times(report: Any) -> dict[str, StageTime]:
    """A statistics report as JSON, by model."""
    return {entry["name"]: _stage_time(entry) for entry in report["model_stats"]}


def _stage_time(entry: Mapping[str, Any]) -> StageTime:
    stats = entry.get("inference_stats", {})

    def total_ms(key: str) -> float:
        return int(stats.get(key, {}).get("ns", 0)) / 1e6

    return StageTime(
        model=entry["name"],
        executions=int(entry.get("execution_count", 0)),
        inferences=int(entry.get("inference_count", 0)),
        queue_ms=total_ms("queue"),
        compute_ms=sum(map(total_ms, ("compute_input", "compute_infer", "compute_output"))),
        requests=int(stats.get("success", {}).get("count", 0)),
        request_ms=total_ms("success"),
    )


def timings(total_ms: float, before: StageTime | None, after: StageTime | None) -> Timings:
    """Exact where the server finished one request between two readings; else the total alone."""
    if before is None or after is None or after.requests != before.requests + 1:
        return Timings(total_ms)
    server_ms = after.request_ms - before.request_ms
    queue_ms = after.queue_ms - before.queue_ms
    return Timings(total_ms, queue_ms, server_ms - queue_ms, total_ms - server_ms)


def models(index: Any) -> list[Model]:
    """The repository index as JSON, of either protocol."""
    entries = index.get("models", []) if isinstance(index, dict) else index
    return [
        Model(
            entry["name"],
            entry.get("version", ""),
            entry.get("state") == "READY",
            entry.get("reason", ""),
        )
        for entry in entries
    ]


def region_names(status: Any) -> list[str]:
    """From a shared-memory status as JSON, of either protocol."""
    if isinstance(status, dict):
        return list(status.get("regions", {}))
    return [entry["name"] for entry in status]


def health(live: bool, ready: bool, metadata: Any) -> Health:
    """From the server's metadata as JSON."""
    return Health(live, ready, metadata.get("name", ""), metadata.get("version", ""))


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)
