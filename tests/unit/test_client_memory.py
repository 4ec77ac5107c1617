"""Shared memory without a server: what the pool lends, keeps and removes."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from panotriton.client import leftovers, shared_memory
from panotriton.client.client import Client
from panotriton.client.pixels import Images
from panotriton.client.shared_memory import (
    FOLDER,
    PREFIX,
    AsyncSharedMemory,
    SharedMemory,
    Slot,
    SystemSlot,
)
from panotriton.client.twins import run
from panotriton.errors import SharedMemoryError

MIB = 1 << 20


def own_files() -> list[str]:
    return [path.name for path in FOLDER.glob(f"{PREFIX}{os.getpid()}_*")]


def pool(
    max_bytes: int = 8 * MIB,
    *,
    views: bool = False,
    wait_s: float = 0.2,
    register: Callable[..., None] = lambda slot: None,
    let_go: Callable[..., bool] = lambda slot: False,
) -> SharedMemory:
    asks = (register, lambda slot: None, let_go)
    return SharedMemory(SystemSlot, max_bytes, views, wait_s, *asks)


def take(memory: SharedMemory, nbytes: int) -> Slot:
    return run(memory._take(nbytes))


def test_a_slot_is_used_again_and_everything_goes_on_close() -> None:
    with pool() as memory:
        first = take(memory, 100)
        memory._done(first, reusable=True)
        second = take(memory, MIB)
        assert second is first
        assert own_files() == [first.name]
        memory._done(second, reusable=True)
    assert own_files() == []
    with pytest.raises(SharedMemoryError, match="closed"):
        take(memory, 1)


def test_sizes_are_rounded_up_and_idle_slots_make_room() -> None:
    with pool() as memory:
        small, middle = take(memory, MIB), take(memory, 2 * MIB + 1)
        assert (small.nbytes, middle.nbytes) == (MIB, 4 * MIB)
        memory._done(small, reusable=True)
        memory._done(middle, reusable=True)
        whole = take(memory, 7 * MIB)  # both must go
        assert memory.allocated_bytes == 8 * MIB
        assert own_files() == [whole.name]
        memory._done(whole, reusable=True)


def test_more_than_the_cap_is_refused_and_a_full_pool_is_waited_for() -> None:
    with pool(wait_s=0.2) as memory:
        with pytest.raises(SharedMemoryError, match=rf"max_bytes is {8 * MIB}"):
            take(memory, 9 * MIB)
        slot = take(memory, 8 * MIB)
        with pytest.raises(SharedMemoryError, match=rf"{8 * MIB} bytes of the pool .* in use"):
            take(memory, 1)
        threading.Timer(0.05, lambda: memory._done(slot, reusable=True)).start()
        assert take(memory, 1) is slot
        memory._done(slot, reusable=True)


def test_a_slot_that_the_server_may_still_write_to_is_never_used_again() -> None:
    with pool() as memory:
        lost = take(memory, MIB)
        memory._done(lost, reusable=False)
        assert own_files() == []  # its name goes at once
        assert take(memory, MIB) is not lost
        assert memory.allocated_bytes == 2 * MIB  # but it counts


def test_its_room_comes_back_once_the_server_says_that_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_memory, "_RECLAIM_EVERY_S", 0.05)
    asked: list[Slot] = []

    def ends(slot: Slot) -> bool:
        asked.append(slot)
        return len(asked) > 2

    with pool(2 * MIB, wait_s=5, let_go=ends) as memory:
        lost = take(memory, 2 * MIB)
        memory._done(lost, reusable=False)
        slot = take(memory, MIB)
        assert slot is not lost
        assert asked == [lost] * 3
        assert memory.allocated_bytes == MIB
        memory._done(slot, reusable=True)


def test_a_call_that_is_cancelled_while_it_makes_room_keeps_none() -> None:
    async def main() -> None:
        async def forever(slot: Slot) -> None:
            await asyncio.sleep(60)

        async def nothing(slot: Slot) -> None:
            pass

        memory = AsyncSharedMemory(
            SystemSlot, 2 * MIB, False, 0.2, nothing, forever, lambda slot: False
        )
        memory._done(await memory._take(MIB), reusable=True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(memory._take(2 * MIB), 0.1)
        assert memory.allocated_bytes == 0
        assert own_files() == []
        await memory.close()

    asyncio.run(main())


def test_a_failed_registration_leaves_nothing() -> None:
    def refuse(slot: object) -> None:
        raise SharedMemoryError("no")

    with pool(register=refuse) as memory:
        with pytest.raises(SharedMemoryError, match="no"):
            take(memory, MIB)
        assert memory.allocated_bytes == 0
        assert own_files() == []


def test_images_are_written_in_place() -> None:
    parts = tuple(np.full((4, 4, 3), value, np.uint8) for value in (1, 2))
    with pool() as memory:
        slot = take(memory, 4096)
        slot.write(64, Images(parts))
        np.testing.assert_array_equal(slot.read(64, (2, 4, 4, 3), np.uint8), np.stack(parts))
        slot.write(0, Images((parts[0][:, ::-1],), alone=True))  # not contiguous
        np.testing.assert_array_equal(slot.read(0, (4, 4, 3), np.uint8), parts[0])
        memory._done(slot, reusable=True)


def test_views_hold_their_slot_until_nothing_refers_to_them() -> None:
    with pool(views=True) as memory:
        slot = take(memory, MIB)
        slot.write(0, Images((np.full((4, 4, 3), 7, np.uint8),), alone=True))
        view = memory._results(slot, {"X": slot.read(0, (4, 4, 3), np.uint8)}, {"X": 0})["X"]
        part = view[1:3].transpose(2, 0, 1)
        del view
        gc.collect()
        other = take(memory, MIB)
        assert other is not slot
        del part
        assert take(memory, MIB) is slot
        memory._done(slot, reusable=True)
        memory._done(other, reusable=True)


def test_views_outlive_the_pool() -> None:
    with pool(views=True) as memory:
        slot = take(memory, MIB)
        slot.write(0, Images((np.full((4, 4, 3), 7, np.uint8),), alone=True))
        view = memory._results(slot, {"X": slot.read(0, (4, 4, 3), np.uint8)}, {"X": 0})["X"]
    assert own_files() == []
    assert int(view.sum()) == 7 * 48


def test_a_full_dev_shm_is_an_error_and_no_crash() -> None:
    space = os.statvfs(FOLDER)
    too_much = space.f_blocks * space.f_frsize + (1 << 30)
    with pool(2 * too_much) as memory, pytest.raises(SharedMemoryError, match="--shm-size"):
        take(memory, too_much)
    assert own_files() == []


def test_an_interrupt_in_the_block_removes_everything() -> None:
    with contextlib.suppress(KeyboardInterrupt), pool() as memory:
        memory._done(take(memory, MIB), reusable=True)
        raise KeyboardInterrupt
    assert own_files() == []


LEAVING = """
import os, sys, time
from panotriton.client.shared_memory import SharedMemory, SystemSlot
from panotriton.client.twins import run
nothing = lambda slot: None
pool = SharedMemory(SystemSlot, 8 << 20, False, 0.1, nothing, nothing, nothing)
slot = run(pool._take(1 << 20))
print(slot.name, flush=True)
{end}
"""


def test_a_process_that_ends_without_closing_leaves_nothing() -> None:
    command = [sys.executable, "-c", LEAVING.format(end="")]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert not (FOLDER / name).exists()


def test_what_a_killed_process_leaves_is_found_and_a_living_ones_is_not() -> None:
    command = [sys.executable, "-c", LEAVING.format(end="time.sleep(60)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = FOLDER / process.stdout.readline().strip()
        backdate(path)
        assert path not in [left.path for left in leftovers.find_leftovers()]
        assert leftovers.dead_regions([path.name]) == []
        process.kill()
        process.wait()
    (left,) = [left for left in leftovers.find_leftovers() if left.path == path]
    assert left.nbytes == MIB
    assert str(process.pid) in left.owner
    assert leftovers.dead_regions([path.name, "somebody_elses"]) == [path.name]
    left.remove()
    assert not path.exists()
    assert leftovers.dead_regions([path.name]) == [path.name]  # still registered, perhaps


def backdate(path: Path, seconds: float = 60) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_servers_regions_are_left_over_when_no_process_maps_them() -> None:
    path = FOLDER / f"triton_python_backend_shm_region_panotriton_{os.getpid():012}_test"
    path.write_bytes(b"x" * 4096)
    try:
        backdate(path, -60)  # however slow this machine is
        assert path not in [left.path for left in leftovers.find_leftovers()]  # too young to tell
        backdate(path)
        assert path in [left.path for left in leftovers.find_leftovers()]
        with path.open("rb") as file:
            mapped = np.memmap(file, np.uint8, "r")
            assert path not in [left.path for left in leftovers.find_leftovers()]
            del mapped
    finally:
        path.unlink()


def test_a_forked_child_does_not_remove_its_parents_regions() -> None:
    with pool() as memory:
        memory._done(take(memory, MIB), reusable=True)
        child = os.fork()
        if child == 0:
            memory.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(own_files()) == 1


def test_kinds_of_memory() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(SharedMemoryError, match="kind is 'x'"):
            client.shared_memory(MIB, "x")  # type: ignore[arg-type]
        with pytest.raises(SharedMemoryError, match="CUDA results are copied"):
            client.shared_memory(MIB, "cuda", views=True)
        with pytest.raises(SharedMemoryError, match="at least 1048576"):
            client.shared_memory(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_memory_without_a_gpu_says_so() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(SharedMemoryError, match="GPU|cuda"):
        client.shared_memory(MIB, "cuda")
