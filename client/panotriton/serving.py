"""What the repository's model.py files share: reading a request's tensors, answering, calling on.

Importable only inside tritonserver, which brings `triton_python_backend_utils`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from panotriton.errors import InferenceFailed, InvalidInput

__all__ = ["call", "number", "optional", "required", "respond", "respond_async", "text", "texts"]

Tensors = dict[str, NDArray[Any]]
# Arrays, or tensors of the request in hand. (The server adds Tensor to pb_utils only after this import.)
Inputs = Mapping[str, Any]


def respond(requests: Sequence[Any], handle: Callable[[Any], Tensors]) -> list[Any]:
    """Answer each request by `handle`; a bad one gets its error and its batch mates go on."""
    return [_answer(partial(handle, request)) for request in requests]


async def respond_async(
    requests: Sequence[Any], handle: Callable[[Any], Awaitable[Tensors]]
) -> list[Any]:
    """`respond` for handlers that call other models: all requests are worked on together."""
    results = await asyncio.gather(*(handle(r) for r in requests), return_exceptions=True)
    return [_answer(partial(_raise_or_return, result)) for result in results]


def _raise_or_return(result: Any) -> Any:
    if isinstance(result, BaseException):
        raise result
    return result


def _answer(work: Callable[[], Tensors]) -> Any:
    try:
        tensors = [pb_utils.Tensor(name, value) for name, value in work().items()]
        return pb_utils.InferenceResponse(tensors)
    except InvalidInput as error:
        return _failure(str(error), pb_utils.TritonError.INVALID_ARG)
    except InferenceFailed as error:
        return _failure(str(error), pb_utils.TritonError.INTERNAL)
    except Exception as error:
        pb_utils.Logger.log_error(traceback.format_exc())
        reason = f"{type(error).__name__}: {error} (the server's log has the details)"
        return _failure(reason, pb_utils.TritonError.INTERNAL)


def _failure(message: str, code: Any) -> Any:
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


def text(request: Any, name: str, default: str) -> str:
    """The one value of an optional [1] string tensor, as UTF-8."""
    values = optional(request, name)
    if values is None:
        return default
    try:
        return str(values.item().decode())
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8: {error}") from error


def texts(values: Sequence[str]) -> NDArray[np.object_]:
    """A string tensor (N,)."""
    return np.array([value.encode() for value in values], dtype=np.object_)


async def call(model: str, inputs: Inputs, outputs: Sequence[str]) -> Tensors:
    """Send one request to another model of this server and wait for it without blocking others.

    Arrays are copied to shared memory once; a tensor of the request in hand is passed as it is.
    Raises InferenceFailed with the model's own message.
    """
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[_tensor(name, value) for name, value in inputs.items()],
    )
    response = await request.async_exec()
    if response.has_error():
        raise InferenceFailed(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _tensor(name: str, value: Any) -> Any:
    if isinstance(value, pb_utils.Tensor):
        return value
    return pb_utils.Tensor(name, np.ascontiguousarray(value))
