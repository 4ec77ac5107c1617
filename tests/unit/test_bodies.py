"""Bodies of requests that do not come, and that hold up no others; by ASGI messages, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from panotriton.web import bodies
from panotriton.web.gateway.limits import BodyBudget, BodyLimit

MIB = 1 << 20


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def app() -> Starlette:
    return Starlette(routes=[Route("/", length, methods=["POST"])])


async def post(app: Any, body: Callable[[], Awaitable[bytes]], declared: int) -> tuple[int, str]:
    """Status and text of the answer to a body that comes in pieces; "" is its end."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        piece = await body()
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "root_path": ""}
    await app(scope | {"headers": [(b"content-length", b"%d" % declared)]}, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


def pieces(count: int, size: int, pause_s: float) -> Callable[[], Awaitable[bytes]]:
    left = count

    async def piece() -> bytes:
        nonlocal left
        await asyncio.sleep(pause_s)
        left -= 1
        return b"x" * size if left >= 0 else b""

    return piece


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_SILENT_S", 0.3)
    monkeypatch.setattr(bodies, "_LEAST_BYTES_PER_S", 10_000)


@pytest.mark.parametrize(
    ("count", "size", "pause_s", "status"),
    [
        (40, 1000, 0.02, 200),  # 50 kB/s for 0.8 s
        (1, 1000, 1.0, 408),  # silent
        (100, 1, 0.02, 408),  # never silent, and never there
    ],
)
def test_a_body_that_does_not_come_is_408(
    hurried: None, count: int, size: int, pause_s: float, status: int
) -> None:
    work = post(bodies.Paced(app()), pieces(count, size, pause_s), count * size)
    found, text = asyncio.run(work)
    assert found == status
    assert text == (
        f"{count * size}"
        if status == 200
        else "the body stopped, or was slow, for 0.3 s; send it again"
    )


def test_what_comes_after_a_body_may_take_as_long_as_it_likes(hurried: None) -> None:
    async def leaves(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        assert await receive() == {"type": "http.disconnect"}

    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.sleep(0.6)
        return {"type": "http.disconnect"}

    asyncio.run(bodies.Paced(leaves)({"type": "http"}, receive, None))


def test_tensors_on_their_way_hold_up_tensors_and_no_paths() -> None:
    async def main() -> None:
        limited = BodyLimit(app(), lambda path: 1 << 30, BodyBudget(2 * MIB))
        go_on = asyncio.Event()

        async def held() -> bytes:
            await go_on.wait()
            return b""

        large = asyncio.create_task(post(limited, held, 200 * MIB))
        await asyncio.sleep(0)
        small = asyncio.create_task(post(limited, pieces(1, 3000, 0), 3000))
        second = asyncio.create_task(post(limited, pieces(1, MIB, 0), MIB))
        assert await asyncio.wait_for(small, 5) == (200, "3000")
        await asyncio.sleep(0.05)
        assert not second.done()
        go_on.set()
        assert await second == (200, str(MIB))
        assert (await large)[0] == 200

    asyncio.run(main())
