"""How a run on a cluster ends: nothing is written any more when it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from panotriton.groups import cluster
from panotriton.groups.maker import Outcome, _to_the_end
from panotriton.groups.plan import Plan
from panotriton.groups.replicas import Servers


class Handle:
    """Of an actor, as Ray gives it to others, here in the same process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Maker:
    """Writes for a while, in a thread."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked: list[int] = []

    async def make(self, index: int, attempts: int) -> Outcome:
        self.asked.append(index)

        def write() -> Outcome:
            self.file.write_text("begun")
            time.sleep(0.5)
            self.file.write_text("written")
            return Outcome(index)

        return await _to_the_end(write)


@pytest.fixture
def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[cluster._Worker, cluster._Directory, Maker]]:
    """A worker of the pool that knows the directory."""
    monkeypatch.setattr(cluster, "_GONE_S", 3.0)
    context = SimpleNamespace(get_actor_id=lambda: "actor")
    monkeypatch.setattr(cluster._ray(), "get_runtime_context", lambda: context)
    servers = Servers(["127.0.0.1:1"])
    directory = cluster._Directory(servers, {})
    plan = Plan([], [], 0, {}, {}, str(tmp_path), "folder", {}, False)
    worker = cluster._Worker(plan, servers, Handle(directory), 1.0)
    maker = worker._maker = Maker(tmp_path / "group")
    yield worker, directory, maker
    worker._loop.call_soon_threadsafe(worker._loop.stop)


def test_the_end_waits_for_what_is_being_written_and_nothing_is_made_after_it(
    worker: tuple[cluster._Worker, cluster._Directory, Maker],
) -> None:
    pool, directory, maker = worker
    making = pool._run(pool._make(1, 0))
    while not maker.file.exists():
        time.sleep(0.01)
    pool._run(directory.end()).result(10)
    assert maker.file.read_text() == "written"
    assert making.cancelled() or making.done()
    with pytest.raises(CancelledError):
        pool._run(pool._make(2, 0)).result(10)
    assert maker.asked == [1]


def test_the_end_does_not_wait_for_a_worker_that_has_died(
    worker: tuple[cluster._Worker, cluster._Directory, Maker],
) -> None:
    pool, directory, _ = worker
    pool._run(directory.join("dead")).result(10)
    began = time.monotonic()
    pool._run(directory.end()).result(10)
    assert time.monotonic() - began < 8


def test_one_that_is_started_again_after_the_end_makes_nothing(
    worker: tuple[cluster._Worker, cluster._Directory, Maker],
) -> None:
    pool, directory, _ = worker
    pool._run(directory.end()).result(10)
    assert pool._run(directory.join("actor")).result(10)
    assert (
        asyncio.run_coroutine_threadsafe(directory.until_over("actor"), pool._loop).result(10)
        is None
    )
