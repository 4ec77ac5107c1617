"""Groups of a run that one process makes, when several of them fail at once."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from panotriton.errors import OutOfPatience
from panotriton.groups import local


class Failing:
    """In the place of a maker: group 1 is made, all others meet the end of patience, at once."""

    def __init__(self, *settings: Any) -> None:
        pass

    async def make(self, index: int) -> str:
        if index == 1:
            return "made"
        raise OutOfPatience("paused for 6 s")

    async def close(self) -> None:
        pass


class Board:
    room = 3


def test_failures_at_once_lose_no_group_and_none_goes_unseen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "Maker", Failing)
    unseen: list[Any] = []
    taken: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        engine = local.LocalEngine(None, Board(), 6.0)  # type: ignore[arg-type]
        rows = iter([(0,), (1,), (2,)])
        try:
            await engine.run(None, lambda: next(rows, None), lambda made: bool(taken.append(made)))  # type: ignore[arg-type,func-returns-value,return-value]
        finally:
            gc.collect()

    with pytest.raises(OutOfPatience, match="paused for 6 s"):
        asyncio.run(run())
    gc.collect()
    assert taken == ["made"]
    assert not unseen
