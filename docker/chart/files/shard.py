"""One shard of a data-set run: sends its pairs of panoramas to all replicas and resumes where it stopped.

    shard.py --server HOST:PORT --pairs FILE --output DIR --shards N [--index I]

FILE has two paths per line, a tab between them, relative to FILE. Line n (from 1) is group n. Shard i of N
takes every N-th line from line i + 1 and writes to DIR/shard-000i; groups in its results.json are skipped.

HOST may be a headless service: each of its addresses is a replica. The shards that are not finished
divide the replicas among them, to fractions, so that every replica always has about --per-replica
requests: enough never to wait for the next, few enough that queues stay short. tests/bench/capacity.py
simulates this very code.

Exit codes: 0 done (groups that a model refused are listed in failures.json), 1 no replica answered for
too long, 2 wrong arguments or input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panotriton import Client, ConnectError, Group, PanotritonError, RequestTimeout, ServerBusy
from panotriton.groups.folder import read_results, write_group

_RETRY = (ConnectError, RequestTimeout, ServerBusy)  # another try, or replica, may do


@dataclass(frozen=True)
class PanoramaPair:
    """Group `group_id`: two panoramas."""

    group_id: int
    first: Path
    second: Path


def read_pairs(path: Path) -> list[PanoramaPair]:
    """All pairs of the file. Raises ValueError naming the line and the fix."""
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        names = line.split("\t")
        if len(names) != 2:
            raise ValueError(
                f"{path}:{number} is {line!r}; expected two paths with one tab between"
            )
        pairs.append(PanoramaPair(number, path.parent / names[0], path.parent / names[1]))
    return pairs


def shard_of(pairs: list[PanoramaPair], index: int, shards: int) -> list[PanoramaPair]:
    """What shard `index` of `shards` does: interleaved, so that slow stretches are shared out."""
    return pairs[index::shards]


def finished(folder: Path) -> set[int]:
    """Groups that results.json already has; it is written last, and atomically."""
    return {entry["group_id"] for entry in read_results(folder)}


def resolve(host: str, port: str) -> list[str]:
    """The addresses behind a name, sorted; all ready pods behind a headless service."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConnectError(f"{host} has no address: {error}; is any replica ready?") from error
    hosts = sorted({str(entry[4][0]) for entry in found})
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def unfinished(output: Path, shards: int, index: int) -> list[int]:
    """The shards that still need replicas, this one among them whatever the disk says."""
    over = {int(path.parent.name[6:]) for path in output.glob("shard-*/finished")}
    return [shard for shard in range(shards) if shard == index or shard not in over]


def share(replicas: Sequence[str], rank: int, of: int) -> dict[str, float]:
    """What one of `of` equal parts holds of the sorted replicas: whole ones, fractions at its ends."""
    start, end = len(replicas) * rank / of, len(replicas) * (rank + 1) / of
    parts = {k: min(end, k + 1) - max(start, k) for k in range(int(start), math.ceil(end))}
    return {replicas[k]: part for k, part in parts.items() if part > 1e-9}


def pick(parts: Mapping[str, float], load: Mapping[str, int], resting: Container[str]) -> str:
    """The replica with the fewest requests of ours for what we hold of it."""
    awake = [replica for replica in parts if replica not in resting]
    return min(awake or parts, key=lambda replica: (load.get(replica, 0) + 1) / parts[replica])


class Replicas:
    """This shard's part of the replicas, looked up again every `refresh_s`; one that failed rests."""

    def __init__(
        self,
        addresses: Callable[[], list[str]],
        position: Callable[[], tuple[int, int]],
        *,
        per_replica: int,
        refresh_s: float = 10.0,
        rest_s: float = 10.0,
    ) -> None:
        self._addresses, self._position = addresses, position
        self._per_replica = per_replica
        self._refresh_s, self._rest_s = refresh_s, rest_s
        self._lock = threading.Lock()
        self._parts: dict[str, float] = {}
        self._load: dict[str, int] = {}
        self._resting: dict[str, float] = {}
        self._looked_at = float("-inf")

    def window(self) -> int:
        """Requests that this shard should have in flight now; 1 while no replica is to be found."""
        with self._lock, contextlib.suppress(ConnectError):
            self._refresh()
        return max(1, round(self._per_replica * sum(self._parts.values())))

    @contextlib.contextmanager
    def borrow(self) -> Iterator[str]:
        """A replica's address for one request. Raises ConnectError where there is none."""
        with self._lock:
            self._refresh()
            replica = pick(self._parts, self._load, self._resting)
            self._load[replica] = self._load.get(replica, 0) + 1
        try:
            yield replica
        except _RETRY:
            with self._lock:
                self._resting[replica] = time.monotonic() + self._rest_s
            raise
        finally:
            with self._lock:
                self._load[replica] -= 1

    def _refresh(self) -> None:
        now = time.monotonic()
        self._resting = {r: until for r, until in self._resting.items() if until > now}
        if now - self._looked_at > self._refresh_s:
            self._parts = share(self._addresses(), *self._position())
            self._looked_at = now


def process(pair: PanoramaPair, replicas: Replicas, seed: int, patience_s: float) -> Group:
    """One group, tried on one replica after another until `patience_s` has gone by."""
    deadline = time.monotonic() + patience_s
    delay_s = 0.5
    while True:
        try:
            with replicas.borrow() as url, Client(url) as client:
                return client.process(pair.first, pair.second, seed=seed + pair.group_id)
        except _RETRY:
            if time.monotonic() + delay_s > deadline:
                raise
        time.sleep(delay_s * random.uniform(0.5, 1.5))  # noqa: S311
        delay_s = min(2 * delay_s, 30.0)


def run(
    pairs: list[PanoramaPair],
    work: Callable[[PanoramaPair], Any],
    done: Callable[[PanoramaPair, Any], None],
    failed: Callable[[PanoramaPair, PanotritonError], None],
    *,
    window: Callable[[], int],
    most: int,
) -> None:
    """`work` on every pair, at most `window()` and never over `most` at once.

    A result is `done` with before more is asked for. That is the back-pressure: memory here and
    queues there are bounded. A group that a model refused has `failed` and the rest goes on;
    raises ConnectError, RequestTimeout or ServerBusy when `work` gave up on all replicas.
    """
    rest = iter(pairs)
    running: dict[Future[Any], PanoramaPair] = {}
    with ThreadPoolExecutor(most) as pool:
        while True:
            while len(running) < min(window(), most) and (pair := next(rest, None)) is not None:
                running[pool.submit(work, pair)] = pair
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pair = running.pop(future)
                try:
                    done(pair, future.result())
                except _RETRY:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                except PanotritonError as error:
                    failed(pair, error)


def _write(folder: Path, pair: PanoramaPair, group: Group, seed: int) -> None:
    about = {"panoramas": [str(pair.first), str(pair.second)], "seed": seed + pair.group_id}
    write_group(group, folder, pair.group_id, (pair.first.stem, pair.second.stem), about)
    print(
        f"group {pair.group_id}: {len(group.kept)} of 8 intervals, {group.seconds:.1f} s",
        flush=True,
    )


def _write_failures(folder: Path, failures: dict[int, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".failures.json"
    beside.write_text(json.dumps(failures, indent=1) + "\n")
    beside.replace(folder / "failures.json")


def main() -> int:
    options = _parser().parse_args()
    folder = options.output / f"shard-{options.index:04d}"
    try:
        mine = shard_of(read_pairs(options.pairs), options.index, options.shards)
    except (OSError, ValueError) as error:
        print(f"shard: {error}", file=sys.stderr)
        return 2
    over = finished(folder)
    todo = [pair for pair in mine if pair.group_id not in over]
    print(f"shard {options.index} of {options.shards}: {len(todo)} to do, {len(over)} done before")
    try:
        failures = _run(options, folder, todo)
    except PanotritonError as error:
        print(f"shard: gave up after {options.patience_s:g} s: {error}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "finished").touch()
    print(f"shard {options.index}: {len(todo) - len(failures)} done, {len(failures)} failed")
    return 0


def _run(options: argparse.Namespace, folder: Path, todo: list[PanoramaPair]) -> dict[int, str]:
    host, _, port = options.server.rpartition(":")
    failures: dict[int, str] = {}

    def position() -> tuple[int, int]:
        left = unfinished(options.output, options.shards, options.index)
        return left.index(options.index), len(left)

    def failed(pair: PanoramaPair, error: PanotritonError) -> None:
        failures[pair.group_id] = str(error)
        _write_failures(folder, failures)
        print(f"group {pair.group_id} failed: {error}", file=sys.stderr, flush=True)

    replicas = Replicas(lambda: resolve(host, port), position, per_replica=options.per_replica)
    run(
        todo,
        lambda pair: process(pair, replicas, options.seed, options.patience_s),
        lambda pair, group: _write(folder, pair, group, options.seed),
        failed,
        window=replicas.window,
        most=options.most,
    )
    return failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="one shard of a data-set run")
    index = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))  # set by an Indexed Job
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="gRPC")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--index", type=int, default=index, help="0 to shards - 1 (%(default)s)")
    parser.add_argument("--per-replica", type=int, default=2, help="of all shards (%(default)s)")
    parser.add_argument("--most", type=int, default=16, help="in flight here: memory (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="group n gets seed + n (%(default)s)")
    parser.add_argument("--patience-s", type=float, default=3600.0, help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
