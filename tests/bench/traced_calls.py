"""Runs inside the server, beside a model's model.py: its calls to other models join its request's trace.

For measurements alone. Under a trace that has ended, as a decoupled model's has while it still works, or a
cancelled request's, such a call would take tritonserver 24.10 down.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from panotriton.models import requests as serving

# Of the request that a task works on; tasks inherit it from the one that starts them.
_trace: contextvars.ContextVar[Any] = contextvars.ContextVar("trace")
_respond = serving.respond_async


async def respond_async(
    requests: Sequence[Any], handle: Callable[[Any], Awaitable[Any]]
) -> list[Any]:
    """requests.respond_async, with each request's trace where its calls find it."""
    if not hasattr(pb_utils, "UntracedRequest"):  # the server adds the class only after the import
        pb_utils.UntracedRequest = pb_utils.InferenceRequest
        pb_utils.InferenceRequest = _traced_request

    async def traced(request: Any) -> Any:
        _trace.set(request.trace())
        return await handle(request)

    return await _respond(requests, traced)


def _traced_request(**arguments: Any) -> Any:
    return pb_utils.UntracedRequest(**arguments, trace=_trace.get())


serving.respond_async = respond_async
