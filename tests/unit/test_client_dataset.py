"""What a data-set run is made of, without a server."""

import asyncio
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from panotriton.errors import ConnectError, InvalidInput, StoreError
from panotriton.groups import maker
from panotriton.groups import replicas as replicas_module
from panotriton.groups.balance import DONE
from panotriton.groups.dataset import Dataset
from panotriton.groups.maker import Panoramas
from panotriton.groups.plan import Plan, find_panoramas, group_seed, pair_order
from panotriton.groups.replicas import Lease, Replicas, Servers
from panotriton.groups.store import open_store

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"


def test_the_order_holds_every_pair_once() -> None:
    order = pair_order(7, seed=3)
    pairs = {tuple(pair) for pair in order.tolist()}
    assert len(order) == len(pairs) == 21
    assert all(one < other for one, other in pairs)
    np.testing.assert_array_equal(order, pair_order(7, seed=3))
    assert not np.array_equal(order, pair_order(7, seed=4))


def test_seeds_are_fixed_and_differ() -> None:
    assert group_seed(3, 0) == 6233904063939786893
    assert len({group_seed(seed, i) for seed in range(20) for i in range(20)}) == 400
    assert all(0 <= group_seed(s, 0) < 2**63 for s in range(50))


def test_panoramas_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in find_panoramas([tmp_path])]
    assert names == ["a.png", "b.JPG", "c.webp"]
    assert find_panoramas([tmp_path, tmp_path]) == find_panoramas([tmp_path])
    with pytest.raises(InvalidInput, match="is not a folder"):
        find_panoramas([tmp_path / "a.png"])
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(InvalidInput, match="0 panoramas found; expected two"):
        find_panoramas([tmp_path])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one of sample_n"),
        ({"sample_n": 1, "target_n": 1}, "exactly one of sample_n"),
        ({"sample_n": 0}, "sample_n is 0"),
        ({"sample_n": 1, "max_failed": -1}, "max_failed is -1"),
        ({"sample_n": 1, "layout": "zip"}, "format is 'zip'; expected one of folder"),
        ({"sample_n": 1, "layout": "parquet", "pages": True}, "HTML pages are written"),
    ],
)
def test_bad_runs_are_refused(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    paths = sorted(PANORAMAS.glob("*.jpg"))
    with pytest.raises(InvalidInput, match=says):
        Dataset(paths, tmp_path, 1, **arguments)


def test_a_seed_that_no_group_could_have_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="seed is -1; expected 0 or more"):
        Dataset(sorted(PANORAMAS.glob("*.jpg")), tmp_path / "out", -1, sample_n=1)
    assert not (tmp_path / "out").exists()


def test_groups_that_no_run_has_made_are_left_alone(tmp_path: Path) -> None:
    group = tmp_path / "group_0001" / "group_info.json"
    group.parent.mkdir()
    group.write_text("{}")
    dataset = Dataset(sorted(PANORAMAS.glob("*.jpg")), tmp_path, 1, sample_n=1)
    with pytest.raises(InvalidInput, match="holds group_0001, which no run of a data set has made"):
        asyncio.run(dataset.run(None))  # no engine is asked
    assert group.read_text() == "{}"


def test_a_share_that_is_away_is_no_panoramas_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "_AWAY_WAITS_S", (0.0, 0.0))
    share = tmp_path / "share"
    share.mkdir()
    for name in ("a.png", "b.png"):
        (share / name).write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    panoramas = Panoramas()
    assert panoramas.path(str(share / "a.png"), digest) == share / "a.png"
    (share / "a.png").unlink()
    with pytest.raises(InvalidInput, match="cannot read .*a.png: No such file"):
        panoramas.path(str(share / "a.png"), digest)
    share.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(StoreError, match="a.png: No such file .* nor anything beside it"):
            panoramas.path(str(share / "a.png"), digest)
        share.mkdir(exist_ok=True)  # as where a share is mounted, and is not
    panoramas.close()


def test_a_record_that_a_power_loss_has_emptied_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    with pytest.raises(StoreError, match="summary.json is no JSON .*: remove it, and run the same"):
        open_store(tmp_path).read_json("summary.json")


def test_an_option_that_no_group_could_have_is_refused_at_once(tmp_path: Path) -> None:
    options = {
        "crop_size": 63,
        "upscale": 2,
        "align": "adain",
        "prompt": "",
        "threshold": 0.7,
        "interpolations": 9,
    }
    with pytest.raises(InvalidInput, match="crop_size is 63"):
        Dataset(sorted(PANORAMAS.glob("*.jpg")), tmp_path, 1, sample_n=1, options=options)


def test_a_pause_without_an_error_is_announced_as_well() -> None:
    """Servers that drain, or a name that has no address yet, refuse nothing and are not there."""
    said: list[str] = []

    async def run() -> None:
        nowhere = Servers(["dns:///nowhere.invalid:8001"])
        async with Replicas(nowhere, contact_s=2.5, say=said.append).watched() as replicas:
            await replicas.acquire()

    with pytest.raises(ConnectError, match="no server has an address yet"):
        asyncio.run(run())
    assert len(said) == 1
    assert said[0].startswith("paused, for 2.5 s at most: no server is ready")


class Answers(Servers):
    """Servers that say what they serve, each after its own time; they say nothing else."""

    def __init__(self, weights: dict[str, tuple[float, str | None]]) -> None:
        super().__init__([f"127.0.0.1:{port}" for port in range(1, 1 + len(weights))])
        self._weights = dict(zip(self.urls, weights.values(), strict=True))

    def client(self, address: str) -> Any:
        after_s, served = self._weights[address]

        async def weights() -> dict[str, str]:
            await asyncio.sleep(after_s)
            if served is None:
                raise ConnectError("refused")
            return {"osediff": served}

        async def no(*_: Any) -> bool:
            return False

        return SimpleNamespace(weights=weights, ready=no, close=no)


@pytest.mark.parametrize(
    ("late", "wanted", "made_of"),
    [
        ("ours", None, "other"),  # a new run: whoever answers first
        ("ours", "ours", "ours"),
        (None, "ours", "other"),  # for the caller to refuse
    ],
)
def test_a_run_that_goes_on_waits_for_the_weights_it_was_made_of(
    late: str | None, wanted: str | None, made_of: str
) -> None:
    servers = Answers({"first": (0.0, "other"), "second": (0.3, late)})

    async def run() -> dict[str, str]:
        async with Replicas(servers, contact_s=1.0).watched() as replicas:
            found = await replicas.weights({"osediff": wanted} if wanted else None)
            if late is not None:
                assert (await replicas.acquire()).address == servers.urls[made_of == "ours"]
            return found

    assert asyncio.run(run()) == {"osediff": made_of}


def test_what_died_and_learns_anew_takes_no_other_weights() -> None:
    """As a cluster's directory does, which is started again on another node."""
    servers = Answers({"first": (0.0, "other"), "second": (0.3, "ours")})

    async def run() -> str:
        async with Replicas(servers, contact_s=1.0).watched() as replicas:
            replicas.agree({"osediff": "ours"})
            address: str = (await replicas.acquire()).address
            return address

    assert asyncio.run(run()) == servers.urls[1]


def test_a_worker_that_has_died_gets_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asked before: what it would be given, others wait for."""
    monkeypatch.setattr(replicas_module, "_SILENT_S", 0.3)
    servers = Answers({"one": (0.0, "ours")})

    async def run() -> tuple[Lease, bool, bool]:
        async with Replicas(servers, per_replica=1).watched() as replicas:
            await replicas.weights()
            busy = await replicas.acquire(worker="busy")
            dead = asyncio.create_task(replicas.acquire(worker="dead"))
            lives = asyncio.create_task(replicas.acquire(worker="lives"))
            await asyncio.sleep(0.5)
            replicas.beat("busy")
            replicas.beat("lives")
            await replicas.release(busy, DONE, worker="busy")
            lease = await asyncio.wait_for(lives, 5)
            waits = not dead.done()
            replicas.beat("dead")  # it was only slow
            await replicas.release(lease, DONE, worker="lives")
            await asyncio.wait_for(dead, 5)
            return lease, waits, dead.done()

    lease, waited, served = asyncio.run(run())
    assert lease.address == "127.0.0.1:1"
    assert waited
    assert served


def test_a_plan_travels_without_its_order() -> None:
    plan = Plan([str(n) for n in range(200)], [None] * 200, 1, {}, {}, "out")
    size = len(pickle.dumps(plan))
    pair = plan.pair(7)
    assert len(pickle.dumps(plan)) == size
    assert pickle.loads(pickle.dumps(plan)).pair(7) == pair


def test_copies_from_a_store_are_kept_whoever_asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(tempfile.TemporaryDirectory[str]):
        """Begins as late as it may on a busy machine."""

        def __init__(self, **options: Any) -> None:
            time.sleep(0.05)
            super().__init__(**options)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Slow)
    store = open_store("memory://in")
    names = [f"{index}.png" for index in range(4)]
    for name in names:
        store.write(name, name.encode())
    panoramas = Panoramas()

    def content(name: str) -> bytes:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return panoramas.path(f"{store.place}/{name}", digest).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(content, names * 2)) == [name.encode() for name in names * 2]
    panoramas.close()


KILLED = """
import os, sys
from panotriton.groups.store import open_store
os.link = lambda *names, **options: os._exit(9)
open_store(sys.argv[1]).create("records/1.json", b"{}")
"""


def test_a_file_is_created_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert list((tmp_path / "records").iterdir()) == []
    store = open_store(tmp_path)
    assert store.create("records/1.json", b"{}")
    assert not store.create("records/1.json", b"[]")
    assert store.read("records/1.json") == b"{}"
    assert (tmp_path / "records" / "1.json").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
