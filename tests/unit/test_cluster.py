"""How a run on a cluster ends: nothing is written any more when it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from panotriton.groups import pool
from panotriton.groups.maker import Outcome, to_the_end
from panotriton.groups.plan import Plan
from panotriton.groups.replicas import Servers


class Handle:
    """Of an actor, as Ray gives it to others, here in the same process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Slow:
    """A maker that writes for a while, in a thread."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked: list[int] = []
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    async def make(self, index: int, attempts: int) -> Outcome:
        self.asked.append(index)

        def write() -> Outcome:
            self.file.write_text("begun")
            time.sleep(0.5)
            self.file.write_text("written")
            return Outcome(index)

        return await to_the_end(write)


@pytest.fixture
def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[pool.Worker, pool.Directory, Slow]]:
    """A worker of the pool that knows the directory."""
    monkeypatch.setattr(pool, "_GONE_S", 3.0)
    context = SimpleNamespace(get_actor_id=lambda: "actor")
    monkeypatch.setattr(pool.import_ray(), "get_runtime_context", lambda: context)
    servers = Servers(["127.0.0.1:1"])
    directory = pool.Directory(servers, {})
    plan = Plan([], [], 0, {}, {}, str(tmp_path), "folder", {}, False)
    worker = pool.Worker(plan, servers, Handle(directory), 1.0, str(Path.cwd()))
    maker = worker._maker = Slow(tmp_path / "group")
    yield worker, directory, maker
    worker._loop.call_soon_threadsafe(worker._loop.stop)


def test_the_end_waits_for_what_is_being_written_and_nothing_is_made_after_it(
    worker: tuple[pool.Worker, pool.Directory, Slow],
) -> None:
    one, directory, maker = worker
    making = one._run(one._make(1, 0))
    while not maker.file.exists():
        time.sleep(0.01)
    one._run(directory.end()).result(10)
    assert maker.file.read_text() == "written"
    with pytest.raises(CancelledError):
        making.result(10)
    with pytest.raises(CancelledError):
        one._run(one._make(2, 0)).result(10)
    assert maker.asked == [1]
    assert maker.closed  # with its copies of panoramas


def test_the_end_does_not_wait_for_a_worker_that_has_died(
    worker: tuple[pool.Worker, pool.Directory, Slow],
) -> None:
    one, directory, _ = worker
    one._run(directory.join("dead", "it")).result(10)
    began = time.monotonic()
    one._run(directory.end()).result(10)
    assert time.monotonic() - began < 8


def test_one_that_is_started_again_after_the_end_makes_nothing(
    worker: tuple[pool.Worker, pool.Directory, Slow],
) -> None:
    one, directory, _ = worker
    one._run(directory.end()).result(10)
    assert one._run(directory.join("actor", "another")).result(10)
    one._run(directory.until_over("actor", "another")).result(10)
