"""Coroutines that serve both clients: what blocks and what is awaited differ by their transport alone.

A blocking transport, pool or pause gives its answer, an asynchronous one something to await. A
coroutine that takes either through `resolved` never suspends in a blocking client: `run` ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator
from typing import Any, TypeVar

__all__ = ["iterate", "resolved", "run"]

T = TypeVar("T")


async def resolved(answer: T | Awaitable[T]) -> T:
    """The answer itself, or what awaiting it gives."""
    return await answer if inspect.isawaitable(answer) else answer


def run(steps: Coroutine[Any, Any, T]) -> T:
    """A blocking client's coroutine, from its start to its end, with or without an event loop around."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    steps.close()
    raise RuntimeError("a blocking client's coroutine waits for an event loop")


def iterate(steps: AsyncGenerator[T, None]) -> Iterator[T]:
    """The same for a generator; who leaves the loop closes it."""
    try:
        while True:
            yield run(steps.__anext__())
    except StopAsyncIteration:
        return
    finally:
        run(steps.aclose())
