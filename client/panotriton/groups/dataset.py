"""Data-set runs: all pairs of many panoramas in seeded order, several groups in flight, resumable.

The groups and their numbers depend on the seed and the panoramas alone: group i is pair i of the order,
whatever finishes first. On disk, below the output folder:

```
dataset.json     what the run is made of; a run with other panoramas, seed or options is refused
group_0001/ …    in order: a group appears when all before it are settled, complete, by one rename;
                 with `pages` its report.html is inside
results.json     those groups' results, rewritten whole
failed.json      pairs that gave no group, why, and whose trouble it was: of their "input", or the "server"'s
index.html       with `pages`, over all reports, when the run is done
summary.json     counts, when the run is done
.work/           groups that wait for an earlier one, and unfinished ones; gone when the run is done
```
A run that was killed goes on where it was: what is complete is never made again. While no healthy server
answers it pauses. A pair that a server failed on keeps its place: no other is made for it, and the next run
tries it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from panotriton import __version__
from panotriton.client.aio import AsyncClient
from panotriton.errors import InferenceFailed, InvalidInput, brief, quoted
from panotriton.groups import layout
from panotriton.groups.folder import base_name, fill_group, process_command, read_result, write_json
from panotriton.groups.patience import Outages
from panotriton.groups.report import write_index, write_report
from panotriton.pipeline.contract import INTERVALS, Options
from panotriton.pipeline.images import SUFFIXES, images_in

__all__ = ["RETRY", "Dataset", "Summary", "find_panoramas", "pair_order"]

RETRY = ("server", "all", "none")
"""Which of the pairs that failed in an earlier run are tried again: those with the server's trouble …"""

_INPUT, _SERVER = "input", "server"


@dataclass(frozen=True)
class Summary:
    """Counts over the groups of a run. `complete`: whether the asked number was reached."""

    groups: int
    failed: int
    intervals_kept: int
    intervals_dropped: int
    complete: bool


@dataclass(frozen=True)
class _Outcome:
    """result: the group's entry of results.json, None where the pair failed, for `error`; trouble: whose."""

    result: dict[str, Any] | None
    error: str = ""
    trouble: str = ""

    @property
    def kept(self) -> int:
        return len(self.result["kept"]) if self.result else 0


def find_panoramas(folders: Sequence[Path]) -> list[Path]:
    """The files of `images.SUFFIXES`, none hidden, directly in `folders`, in their order, then by name.

    Raises InvalidInput for a folder that is none, and where fewer than two are found.
    """
    found: list[Path] = []
    for folder in folders:
        if not os.path.isdir(folder):  # noqa: PTH112 false of names that no file can have, too
            raise InvalidInput(
                f"{brief(folder)} is not a folder; expected one that holds panoramas"
            )
        found += images_in(folder)
    if len(found) < 2:
        raise InvalidInput(
            f"{', '.join(map(brief, folders))}: {len(found)} panoramas found; expected two or more "
            f"files named {', '.join(SUFFIXES)}"
        )
    return found


def pair_order(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All pairs of `count` panoramas, (count·(count-1)/2, 2), the lower index first, in seeded order."""
    pairs = np.stack(np.triu_indices(count, k=1), axis=1)
    order: np.ndarray[Any, np.dtype[np.int64]] = np.random.default_rng(seed).permutation(pairs)
    return order


def group_seed(seed: int, index: int) -> int:
    """The camera seed of pair `index` of the order, 63 bits."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]) >> 1


async def _no_facts(client: AsyncClient) -> Mapping[str, Any]:
    return {}


@dataclass
class Dataset:
    """One run, up to `sample_n` groups or `target_n` kept intervals: exactly one of the two.

    options: the fields of `contract.Options`, the same for every group.
    report: called with a line whenever a group is settled. pages: write HTML reports, too. facts:
    asked, whenever a group is made, what its group_info.json says of the server; the same server must
    give the same answer, or runs differ. retry_failed: one of `RETRY`. patience_s: how long the run waits
    for a healthy server; contact_s: for the first sign of one. warn: told of pauses.
    """

    panoramas: Sequence[Path]
    output: Path
    seed: int
    sample_n: int | None = None
    target_n: int | None = None
    in_flight: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Summary, str], None] = lambda summary, line: None
    pages: bool = False
    facts: Callable[[AsyncClient], Awaitable[Mapping[str, Any]]] = _no_facts
    retry_failed: str = RETRY[0]
    patience_s: float = 600.0
    contact_s: float = 60.0
    warn: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if (self.sample_n is None) == (self.target_n is None):
            raise InvalidInput(
                "give exactly one of sample_n (groups) and target_n (kept intervals)"
            )
        for name in ("sample_n", "target_n", "in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} is {value}; expected 1 or more")
        if self.retry_failed not in RETRY:
            raise InvalidInput(
                f"retry_failed is {quoted(self.retry_failed)}; expected {', '.join(RETRY)}"
            )
        Options(**self.options).check()
        self._pairs = pair_order(len(self.panoramas), self.seed)
        self._outcomes: dict[int, _Outcome] = {}  # by place in the order
        self._floor = 0  # the last group that is in place already
        self._settled = 0  # the length of the order's prefix that is on disk for good
        self._results_cost_s = self._results_at = 0.0

    async def run(self, client: AsyncClient) -> Summary:
        """Make what is missing. Cancelled, or on an error of the server, it leaves a state to go on from.

        Raises InvalidInput where the folder holds another run, or is in use by one, OutOfPatience where no
        healthy server answers any more, ConnectError where none ever did.
        """
        with self._owned():
            self._read_failures()
            self._recall()
            await self._work(client)
            if self.pages:
                await self._write_pages()
            return self._finish()

    async def _work(self, client: AsyncClient) -> None:
        tasks: dict[asyncio.Task[_Outcome], int] = {}
        outages = Outages(client, self.patience_s, self.contact_s, self.warn)
        started = 0
        try:
            while not self._settle():
                while len(tasks) < self.in_flight and self._wanted(started):
                    if started not in self._outcomes:
                        tasks[asyncio.create_task(self._make(client, outages, started))] = started
                    started += 1
                if tasks:
                    await self._next(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _next(self, tasks: dict[asyncio.Task[_Outcome], int]) -> None:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._outcomes[tasks.pop(task)] = task.result()

    def _wanted(self, index: int) -> bool:
        """Whether to start pair `index`: not further ahead than could still be needed."""
        if index >= len(self._pairs) or index - self._settled >= 4 * self.in_flight:
            return False
        if self.sample_n is None:
            return True
        failed = (o for o in self._outcomes.values() if o.result is None)
        replaced = sum(not self._is_owed(outcome) for outcome in failed)
        return index < self._floor or index - replaced < self.sample_n

    def _recall(self) -> None:
        """Take what an earlier run has left: groups in place, and those that waited for one before."""
        for pattern in (".*.json.[0-9]*", f".{layout.INDEX}.[0-9]*"):
            for half_written in self.output.glob(pattern):
                half_written.unlink()
        for folder in (self.output / ".work", self.output):
            for group in folder.iterdir():
                if number := layout.group_number(group):  # and no unfinished one
                    self._outcomes[number - 1] = _Outcome(read_result(group))
                    if folder == self.output:
                        self._floor = max(self._floor, number)

    async def _make(self, client: AsyncClient, outages: Outages, index: int) -> _Outcome:
        while True:
            outcome = await outages.attempt(lambda: self._try(client, index))
            if isinstance(outcome, _Outcome):
                return outcome
            if why := outages.blamed(index, outcome):
                return _Outcome(None, why, _SERVER)

    async def _try(self, client: AsyncClient, index: int) -> _Outcome:
        paths = [self.panoramas[place] for place in self._pairs[index]]
        seed = group_seed(self.seed, index)
        try:
            bases = (base_name(paths[0]), base_name(paths[1]))
            group = await client.process(
                *paths, seed=seed, intermediates=True, **dict(self.options)
            )
        except InvalidInput as error:
            return _Outcome(None, str(error), _INPUT)
        except InferenceFailed as error:
            return _Outcome(None, str(error), _SERVER)
        about = {
            "panoramas": [str(path) for path in paths],
            "options": {"seed": seed, **self.options},
            "version": __version__,
            **await self.facts(client),
            "command": process_command(paths, {"seed": seed, **self.options}),
        }
        part = self._waiting(index).with_suffix(".part")

        def write() -> _Outcome:
            result = fill_group(group, part, index + 1, bases, about)
            if self.pages:
                write_report(part)
            part.replace(self._waiting(index))
            return _Outcome(result)

        writing = asyncio.create_task(asyncio.to_thread(write))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing  # a thread can't be stopped, and must not write once the run has ended
            raise

    def _settle(self) -> bool:
        """Move what is next in order to its place; whether the run has all that it was asked for."""
        while self._settled in self._outcomes:
            if self._settled >= self._floor and self._enough():
                break
            outcome = self._outcomes[self._settled]
            if outcome.result is None:
                self._write_failures()
            elif not self._folder(self._settled).is_dir():
                self._waiting(self._settled).replace(self._folder(self._settled))
            self._settled += 1
            self._write_results()
            self.report(self.summary(), self._line(outcome))
        ended = self._settled >= self._floor and (self._enough() or self._owes())
        return ended or self._settled == len(self._pairs)

    def _owes(self) -> bool:
        """Whether all that is missing are groups that the next run makes."""
        owed = sum(self._is_owed(self._outcomes[index]) for index in range(self._settled))
        return self.sample_n is not None and self._count()["groups"] + owed >= self.sample_n

    def _is_owed(self, outcome: _Outcome) -> bool:
        """Whether a server failed on the pair: it keeps its place, unless it is never tried again."""
        return outcome.trouble == _SERVER and self.retry_failed != "none"

    def _enough(self) -> bool:
        summary = self._count()
        if self.sample_n is not None:
            return summary["groups"] >= self.sample_n
        return summary["intervals_kept"] >= (self.target_n or 0)

    def summary(self) -> Summary:
        """Counts of what is settled so far."""
        return Summary(**self._count(), complete=self._enough())

    def _count(self) -> dict[str, int]:
        settled = [self._outcomes[index] for index in range(self._settled)]
        groups = sum(outcome.result is not None for outcome in settled)
        kept = sum(outcome.kept for outcome in settled)
        return {
            "groups": groups,
            "failed": len(settled) - groups,
            "intervals_kept": kept,
            "intervals_dropped": groups * INTERVALS - kept,
        }

    def _line(self, outcome: _Outcome) -> str:
        name = f"group {self._settled}"
        first, second = (self.panoramas[place].name for place in self._pairs[self._settled - 1])
        what = (
            f"failed: {outcome.error}" if outcome.error else f"{outcome.kept} of {INTERVALS} kept"
        )
        return f"{name}  {first} + {second}  {what}"

    def _write_results(self, *, last: bool = False) -> None:
        """All results, again; less often as they grow, so that no more than 5 % of the time goes there."""
        began = time.monotonic()
        if not last and began - self._results_at < 20 * self._results_cost_s:
            return  # group_info.json has them: nothing is lost
        settled = (self._outcomes[index].result for index in range(self._settled))
        write_json(self.output / layout.RESULTS, [result for result in settled if result])
        self._results_at = time.monotonic()
        self._results_cost_s = self._results_at - began

    def _write_failures(self, *, last: bool = False) -> None:
        known = range(self._settled if last else len(self._pairs))
        failures = {
            str(index + 1): {
                "panoramas": self._names(index),
                "error": outcome.error,
                "trouble": outcome.trouble,
            }
            for index, outcome in sorted(self._outcomes.items())
            if outcome.result is None and index in known
        }
        write_json(self.output / layout.FAILED, failures)

    async def _write_pages(self) -> None:
        """The reports that an earlier run without `pages` has left out, and the index over all."""
        for index in range(self._settled):
            folder = self._folder(index)
            if folder.is_dir() and not (folder / layout.REPORT).exists():
                page = self._waiting(index).with_suffix(".html")
                write_report(folder, page).replace(folder / layout.REPORT)
                await asyncio.sleep(0)  # where Ctrl-C is heard
        self._write_failures(last=True)
        if self._count()["groups"]:
            write_index(self.output)

    def _read_failures(self) -> None:
        """Those that are not tried again."""
        path = self.output / layout.FAILED
        if not path.exists() or self.retry_failed == "all":
            return
        for group_id, failure in json.loads(path.read_text(encoding="utf-8")).items():
            trouble = failure.get("trouble", _SERVER)  # in older files it is not known
            if trouble != self.retry_failed:
                self._outcomes[int(group_id) - 1] = _Outcome(None, failure["error"], trouble)

    def _names(self, index: int) -> list[str]:
        return [str(self.panoramas[place]) for place in self._pairs[index]]

    def _finish(self) -> Summary:
        summary = self.summary()
        self._write_results(last=True)
        self._write_failures(last=True)
        write_json(self.output / "summary.json", asdict(summary))
        shutil.rmtree(self.output / ".work")  # groups past the end, too
        return summary

    def _folder(self, index: int) -> Path:
        return layout.group_folder(self.output, index + 1)

    def _waiting(self, index: int) -> Path:
        return layout.group_folder(self.output / ".work", index + 1)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """Make or check dataset.json, and hold it locked."""
        (self.output / ".work").mkdir(parents=True, exist_ok=True)
        path = self.output / "dataset.json"
        about = self._manifest()
        if not path.exists():
            write_json(path, about)
        _check_manifest(path, json.loads(path.read_text(encoding="utf-8")), about)
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidInput(
                    f"another run is writing to {self.output}: wait for it"
                ) from error
            yield

    def _manifest(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "options": dict(self.options),
            "panoramas": [
                {"path": str(path), "bytes": path.stat().st_size} for path in self.panoramas
            ],
        }


def _check_manifest(path: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [name for name in wanted if known.get(name) != wanted[name]]
    if different:
        raise InvalidInput(
            f"{path} belongs to a run with other {' and '.join(different)}: give the same as then to go "
            "on with it, or another output folder"
        )
