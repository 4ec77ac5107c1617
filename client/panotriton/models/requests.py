"""What the repository's model.py files share: reading a request's tensors, answering, calling on.

Importable only inside tritonserver, which brings `triton_python_backend_utils`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from panotriton.errors import InferenceFailed, InvalidInput, ServerBusy
from panotriton.models.failures import Unavailable, failed
from panotriton.pipeline.contract import DEFAULTS, MAX_QWEN_IMAGES, TENSORS, Options
from panotriton.pipeline.placement import SETTING, read_placement

if TYPE_CHECKING:
    from panotriton.models.replicas import Replicas

__all__ = [
    "Cancelled",
    "answers",
    "ask_qwen",
    "attempt",
    "call",
    "calls_until",
    "execute",
    "failed",
    "number",
    "optional",
    "read_options",
    "request_to",
    "required",
    "respond",
    "respond_async",
    "string",
    "strings",
    "text",
]

_MESSAGE = 1000  # characters

# They only wait. The server has 32 for an instance's calls and responses; `async_exec` would take those of
# asyncio, the cores and four, which the arithmetic between the calls needs.
_WAITING = ThreadPoolExecutor(30, "call")

Tensors = dict[str, NDArray[Any]]


class Cancelled(Exception):
    """The caller wants no answer any more."""


def respond(requests: Sequence[Any], handle: Callable[[Any], Tensors]) -> list[Any]:
    """Answer each request by `handle`; a bad one gets its error and its batch mates go on."""
    return answers([attempt(handle, request) for request in requests])


async def respond_async(
    requests: Sequence[Any], handle: Callable[[Any], Awaitable[Tensors]]
) -> list[Any]:
    """`respond` for handlers that call other models: all requests are worked on together."""
    return answers(await asyncio.gather(*map(handle, requests), return_exceptions=True))


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, or the exception that it raises."""
    try:
        return work(*arguments)
    except Exception as error:
        return error


def answers(results: Sequence[Tensors | BaseException]) -> list[Any]:
    """A response for each result: its tensors, or its error with the code that fits."""
    return [_answer(result) for result in results]


def _answer(result: Tensors | BaseException) -> Any:
    if isinstance(result, InvalidInput):
        return _failure(str(result), pb_utils.TritonError.INVALID_ARG)
    if isinstance(result, InferenceFailed):
        return _failure(str(result), pb_utils.TritonError.INTERNAL)
    if isinstance(result, (ServerBusy, Unavailable)):
        return _failure(str(result), pb_utils.TritonError.UNAVAILABLE)
    if isinstance(result, Cancelled):
        return _failure("cancelled", pb_utils.TritonError.CANCELLED)
    if isinstance(result, BaseException):
        pb_utils.Logger.log_error("".join(traceback.format_exception(result)))
        reason = f"{type(result).__name__}: {result} (the server's log has the details)"
        return _failure(reason, pb_utils.TritonError.INTERNAL)
    tensors = [pb_utils.Tensor(name, value) for name, value in result.items()]
    return pb_utils.InferenceResponse(tensors)


def _failure(message: str, code: Any) -> Any:
    # gRPC sends it in 16 KB of headers, up to 12 bytes a character; more arrives as another error.
    if len(message) > _MESSAGE:
        pb_utils.Logger.log_error(message)
        message = f"{message[:_MESSAGE]}… (the server's log has the rest)"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def required(request: Any, name: str) -> NDArray[Any]:
    """The tensor `name`; the config makes the server refuse requests without it."""
    return np.asarray(pb_utils.get_input_tensor_by_name(request, name).as_numpy())


def optional(request: Any, name: str) -> NDArray[Any] | None:
    """The tensor `name`, or None where the caller left it out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else np.asarray(tensor.as_numpy())


def number(request: Any, name: str, default: float) -> Any:
    """The one value of an optional [1] tensor."""
    values = optional(request, name)
    return default if values is None else values.item()


def string(request: Any, name: str, default: str) -> str:
    """The one value of an optional [1] string tensor, as UTF-8."""
    values = optional(request, name)
    return default if values is None else text(name, values.item())


def text(name: str, value: bytes) -> str:
    """A string of a request; raises InvalidInput where it is no UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8: {error}") from error


def strings(values: Sequence[str]) -> NDArray[np.object_]:
    """A string tensor (N,)."""
    return np.array([value.encode() for value in values], dtype=np.object_)


def read_options(request: Any) -> Options:
    """What the caller chose, defaults for the rest; the model's config says which of them it takes."""
    chosen: dict[str, Any] = {}
    for name, default in asdict(DEFAULTS).items():
        read = string if isinstance(default, str) else number
        chosen[name] = read(request, TENSORS[name], default)
    return Options(**chosen).check(TENSORS)


def request_to(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Any:
    """An InferenceRequest to another model. Whatever that runs on, the answer comes to the host's memory.

    From a network of Triton's own backends on a GPU it would stay there, where NumPy cannot read it.
    """
    return pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(v)) for name, v in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )


async def execute(request: Any, **options: Any) -> Any:
    """`request.exec`, while others go on; options: its own."""
    return await asyncio.get_running_loop().run_in_executor(
        _WAITING, partial(request.exec, **options)
    )


async def call(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Tensors:
    """Send one request to another model and wait for it without blocking others.

    To one of this server, for which arrays are copied to shared memory once, or to where PANOTRITON_PLACE has
    it, over gRPC. Raises InferenceFailed with the model's own message, Unavailable where it has died or is
    being replaced, or ServerBusy where its queue is full.
    """
    if (replicas := _elsewhere().get(model)) is not None:
        return await replicas.call(model, inputs, outputs)
    response = await execute(request_to(model, inputs, outputs))
    if response.has_error():
        raise failed(model, response.error().message())
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


@functools.cache
def _elsewhere() -> dict[str, Replicas]:
    """The models that other servers have; those at the same addresses share the channels."""
    placement = read_placement(os.environ.get(SETTING, ""))
    if not placement:
        return {}
    from panotriton.models.replicas import Replicas  # noqa: PLC0415, which brings gRPC

    warn = pb_utils.Logger.log_warn
    servers = {addresses: Replicas(addresses, warn) for addresses in set(placement.values())}
    return {model: servers[addresses] for model, addresses in placement.items()}


def calls_until(is_cancelled: Callable[[], bool]) -> Callable[..., Awaitable[Tensors]]:
    """`call` for one request: raises Cancelled instead of sending anything once that is so."""

    async def checked(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Tensors:
        if is_cancelled():
            raise Cancelled
        return await call(model, inputs, outputs)

    return checked


async def ask_qwen(
    images: NDArray[np.uint8],
    system_prompt: str,
    *,
    reading: str = "text",
    stop_after: str = "",
    max_new_tokens: int = 1,
) -> tuple[list[str], NDArray[np.float32]]:
    """Texts and values (N,) for images (N, H, W, 3), N ≥ 0, from the model that holds the weights."""
    question = {
        "SYSTEM_PROMPT": strings([system_prompt]),
        "READING": strings([reading]),
        "STOP_AFTER": strings([stop_after]),
        "MAX_NEW_TOKENS": np.array([max_new_tokens], np.int32),
    }
    parts = [images[i : i + MAX_QWEN_IMAGES] for i in range(0, len(images), MAX_QWEN_IMAGES)]
    results = await asyncio.gather(*(_ask(part, question) for part in parts))
    replies = [text.decode() for result in results for text in result["TEXT"].flat]
    values = [result["VALUE"][:, 0] for result in results]
    return replies, np.concatenate([np.empty(0, np.float32), *values])


async def _ask(images: NDArray[np.uint8], question: Tensors) -> Tensors:
    repeated = {name: value.repeat(len(images))[:, None] for name, value in question.items()}
    return await call("qwen", {"IMAGE": images} | repeated, ["TEXT", "VALUE"])  # (N, 1) each
