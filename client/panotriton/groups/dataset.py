"""Data-set runs: all pairs of many panoramas in seeded order, resumable, by one process or a cluster.

The groups and their numbers depend on the seed, the panoramas, the options and the weights alone: group i
is pair i of the order, whoever makes it and whatever finishes first. Below the output:

```
dataset.json     what the run is made of; a run with other panoramas, seed, options or weights is refused
group_0001/ …    complete groups; of other formats data/group_000000001.tar or .parquet
records/         what came of each pair, one small file each, see `records`
results.json     when the run is done: all groups' results
failed.json      then, too: pairs that gave no group, why, whose trouble it was, "input" or "server", and each
                 attempt with its replica, time and error: the dead letters
README.md        then, too: the data card
summary.json     then, too: counts
index.html       with `pages`, over all reports
.work/           of a folder: unfinished groups; gone when the run is done
```
A run that was killed goes on where it was: what is complete is never made again. While no healthy server
answers it pauses. A pair that a server failed on keeps its place: no other is made for it, and the next run
tries it again, until it is a dead letter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from panotriton.errors import InvalidInput, quoted
from panotriton.groups import layout
from panotriton.groups.card import data_card
from panotriton.groups.maker import SERVER, Outcome
from panotriton.groups.plan import Plan, differences, digests
from panotriton.groups.records import BLOCK, MAX_ATTEMPTS, Memory, Records
from panotriton.groups.report import write_index, write_report
from panotriton.groups.sinks import open_sink
from panotriton.groups.store import FolderStore, json_bytes, json_line
from panotriton.pipeline.contract import INTERVALS, Options, check_seed

__all__ = ["RETRY", "Dataset", "Engine", "Rows", "Summary"]

RETRY = ("server", "all", "none")
"""Which of the pairs that failed in an earlier run are tried again: those with the server's trouble …"""

_MANIFEST, _SUMMARY, _CARD = "dataset.json", "summary.json", "README.md"


@dataclass(frozen=True)
class Summary:
    """Counts over the groups of a run. `complete`: whether the asked number was reached; pairs: how many of
    the order are settled."""

    groups: int
    failed: int
    intervals_kept: int
    intervals_dropped: int
    complete: bool
    pairs: int = 0
    bytes: int = 0


Rows = Callable[[], tuple[int, int] | None]
"""The next pair to make, its index and how often servers have failed on it; None where none is needed now."""


class Engine(Protocol):
    """Who makes groups: this process, or a cluster."""

    async def weights(self, wanted: Mapping[str, str] | None) -> dict[str, str]:
        """What the servers serve, once one answers; `wanted` if any does. Else raises ConnectError."""
        ...

    def ahead(self, rate: float, missing: int) -> int:
        """How many pairs may be worked on at once of which it is not known whether they are needed."""
        ...

    async def run(self, plan: Plan, rows: Rows, take: Callable[[Outcome], bool]) -> None:
        """Make the groups of `rows` until there are none now, or `take` says that it is enough."""
        ...


@dataclass
class Dataset:
    """One run, up to `sample_n` groups or `target_n` kept intervals: exactly one of the two.

    panoramas, output: paths or URLs. options: the fields of `contract.Options`, the same for every
    group. report: called with a line whenever a pair is settled, and its outcome. pages: write HTML reports,
    too. about: what each group_info.json says besides. retry_failed: one of `RETRY`. max_failed: with more
    failed pairs the run ends. license: for the data card.
    """

    panoramas: Sequence[str | Path]
    output: str | Path
    seed: int
    sample_n: int | None = None
    target_n: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "folder"
    report: Callable[[Summary, str, Outcome], None] = lambda summary, line, outcome: None
    pages: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    retry_failed: str = RETRY[0]
    max_failed: int | None = None
    license: str = "unknown"

    def __post_init__(self) -> None:
        if (self.sample_n is None) == (self.target_n is None):
            raise InvalidInput(
                "give exactly one of sample_n (groups) and target_n (kept intervals)"
            )
        for name in ("sample_n", "target_n"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} is {value}; expected 1 or more")
        if self.max_failed is not None and self.max_failed < 0:
            raise InvalidInput(f"max_failed is {self.max_failed}; expected 0 or more")
        if self.retry_failed not in RETRY:
            raise InvalidInput(
                f"retry_failed is {quoted(self.retry_failed)}; expected {', '.join(RETRY)}"
            )
        Options(**self.options).check()
        check_seed("seed", self.seed)
        self._sink = open_sink(str(self.output), self.layout, pages=self.pages)
        self._store = self._sink.store
        self._records = Records(self._store)
        self._pair_count = len(self.panoramas) * (len(self.panoramas) - 1) // 2
        self._memory = Memory()
        self._tally = _Tally()
        self._next = 0
        self._replaced = 0  # failed pairs in whose place others are made

    async def run(self, engine: Engine) -> Summary:
        """Make what is missing. Cancelled, or on an error of the server, it leaves a state to go on from.

        Raises InvalidInput where the output holds another run, or is in use by one, OutOfPatience where no
        healthy server answers any more, ConnectError where none ever did, StoreError where nothing can be
        kept.
        """
        with self._owned():
            plan = self._plan()
            known = self._store.read_json(_MANIFEST)
            if known:
                plan = replace(plan, weights=known.get("weights") or {})
                self._check(known, plan)
            elif other := next(
                (n for n in self._store.list("") if layout.group_number(Path(n))), None
            ):
                raise InvalidInput(
                    f"{self.output} holds {other}, which no run of a data set has made: name another output"
                )
            self._recall()
            if not (known and self._ended()):
                made_of = plan.weights if known else None
                plan = replace(plan, weights=await engine.weights(made_of))
                self._store.create(_MANIFEST, json_bytes(plan.manifest()))
                self._check(self._store.read_json(_MANIFEST), plan)
                await self._work(engine, plan)
            return self._finish(plan)

    def _plan(self) -> Plan:
        return Plan(
            panoramas=[str(name) for name in self.panoramas],
            digests=digests([str(name) for name in self.panoramas]),
            seed=self.seed,
            options=dict(self.options),
            weights={},
            output=str(self.output),
            layout=self.layout,
            about=dict(self.about),
            pages=self.pages,
        )

    def _check(self, known: Mapping[str, Any], plan: Plan) -> None:
        if other := differences(known, plan.manifest()):
            raise InvalidInput(
                f"{self.output}/{_MANIFEST} belongs to a run with other {'; '.join(other)}: give the same as "
                "then to go on with it, or another output"
            )

    def _recall(self) -> None:
        """What earlier runs have left: groups, and failures that are not tried again."""
        memory = self._memory = self._records.recall()
        again = [
            index for index, failure in memory.failed.items() if self._is_retried(index, failure)
        ]
        self._records.reopen(again, memory)
        for index in again:
            del memory.failed[index]
            if self.retry_failed == "all":
                self._records.forgive(index)
                memory.attempts.pop(index, None)
        self._replaced = sum(not self._is_owed(index) for index in memory.failed)
        summary = self._store.read_json(_SUMMARY) or {}
        self._tally = _Tally(int(summary.get("pairs", 0)), self._is_enough, self._is_owed)
        self._tally.advance(memory)

    def _is_retried(self, index: int, failure: Mapping[str, Any]) -> bool:
        if self.retry_failed == "all":
            return True
        return failure["trouble"] == self.retry_failed == SERVER and not self._is_dead(index)

    def _is_dead(self, index: int) -> bool:
        return self._memory.attempts.get(index, 0) >= MAX_ATTEMPTS

    def _is_owed(self, index: int) -> bool:
        """Whether the next run tries a failed pair again: it keeps its place."""
        trouble = self._memory.failed[index]["trouble"]
        return trouble == SERVER and self.retry_failed != "none" and not self._is_dead(index)

    async def _work(self, engine: Engine, plan: Plan) -> None:
        began = -1
        while not self._ended() and self._next != began:
            began = self._next
            await engine.run(
                plan, lambda: self._row(engine), lambda outcome: self._take(plan, outcome)
            )

    def _row(self, engine: Engine) -> tuple[int, int] | None:
        """The next pair that is not made, if it is known now that it is needed."""
        while self._wanted(self._next, engine):
            index, self._next = self._next, self._next + 1
            if index not in self._memory.made and index not in self._memory.failed:
                return index, self._memory.attempts.get(index, 0)
        return None

    def _wanted(self, index: int, engine: Engine) -> bool:
        if index >= self._pair_count or self.too_many_failed:
            return False
        if index < self._tally.floor:
            return True
        if self.sample_n is not None:
            return index - self._replaced < self.sample_n
        missing = (self.target_n or 0) - self._tally.kept
        return missing > 0 and index - self._tally.settled < engine.ahead(self._tally.rate, missing)

    def _take(self, plan: Plan, outcome: Outcome) -> bool:
        """Enter what came of a pair; whether the run has all that it wants."""
        index, memory = outcome.index, self._memory
        if outcome.attempts:
            memory.attempts[index] = outcome.attempts
        if outcome.made:
            memory.made[index] = (outcome.kept, outcome.bytes)
        else:
            memory.failed[index] = {"error": outcome.error, "trouble": outcome.trouble}
            self._replaced += not self._is_owed(index)
        for block in self._tally.advance(memory):
            self._records.close(block, memory)
        self.report(self.summary(), _line(plan, outcome), outcome)
        return self._ended()

    @property
    def too_many_failed(self) -> bool:
        """Whether the run has ended, or would, for `max_failed`."""
        return self.max_failed is not None and len(self._memory.failed) > self.max_failed

    def _ended(self) -> bool:
        if self.too_many_failed:
            return True
        tally = self._tally
        if tally.settled < tally.floor:
            return False
        return self._is_enough(tally) or tally.settled == self._pair_count or self._owes()

    @property
    def owes(self) -> bool:
        """Whether the next run makes groups that servers failed on in this one."""
        return self._tally.owed > 0

    def _owes(self) -> bool:
        """Whether all that is missing are groups that the next run makes."""
        return self.sample_n is not None and self._tally.groups + self._tally.owed >= self.sample_n

    def _is_enough(self, tally: _Tally) -> bool:
        if self.sample_n is not None:
            return tally.groups >= self.sample_n
        return tally.kept >= (self.target_n or 0)

    def summary(self) -> Summary:
        """Counts of what is settled so far, without gaps in the order."""
        tally = self._tally
        return Summary(
            groups=tally.groups,
            failed=tally.settled - tally.groups,
            intervals_kept=tally.kept,
            intervals_dropped=tally.groups * INTERVALS - tally.kept,
            complete=self._is_enough(tally),
            pairs=tally.settled,
            bytes=tally.bytes,
        )

    def _finish(self, plan: Plan) -> Summary:
        end = self._tally.settled
        if not self.too_many_failed:
            self._drop_after(end)
        summary = self.summary()
        failed = [index for index in sorted(self._memory.failed) if index < end]
        failures = zip(failed, self._records.failures(failed), strict=True)
        failed_by_id = {str(index + 1): failure for index, failure in failures}
        self._store.write_json(layout.FAILED, failed_by_id)
        made = [index for index in sorted(self._memory.made) if index < end]
        self._write_results(made)
        self._store.write_json(_SUMMARY, asdict(summary))
        card = data_card(plan, summary, self.license, self._sink.suffix)
        self._store.write(_CARD, card.encode(errors="backslashreplace"))
        if self.pages:
            self._write_pages(made)
        self._store.remove(layout.WORK)
        return summary

    def _drop_after(self, end: int) -> None:
        """Groups that turned out not to be needed."""
        known = (i for i in (*self._memory.made, *self._memory.failed) if i >= end)
        more = sorted(
            {*known, *range(end, self._next)}
        )  # some were being written when it was enough
        self._records.reopen(more, self._memory)
        for index in more:
            self._records.forget(index)
            self._sink.remove(index)

    def _write_results(self, made: Sequence[int]) -> None:
        """All records as one file: without their keys, as results.json always was."""
        with self._store.writing(layout.RESULTS) as file:
            separator = b"[\n"
            for record in self._records.read_all(made):
                entry = {
                    name: value for name, value in record.items() if name not in ("key", "bytes")
                }
                file.write(separator + json_line(entry).rstrip(b"\n"))
                separator = b",\n"
            file.write(b"\n]\n" if made else b"[]\n")

    def _write_pages(self, made: Sequence[int]) -> None:
        """The reports that an earlier run without `pages` has left out, and the index over all."""
        assert isinstance(self._store, FolderStore)  # noqa: S101 open_sink has seen to it
        root = self._store.folder
        (root / layout.WORK).mkdir(exist_ok=True)
        for index in made:
            folder = layout.group_folder(root, index + 1)
            if not (folder / layout.REPORT).exists():
                page = root / layout.WORK / f"{index + 1}.html"
                write_report(folder, page).replace(folder / layout.REPORT)
        for half_written in root.glob(f".{layout.INDEX}.[0-9]*"):  # by a run that was killed
            half_written.unlink()
        if made:
            write_index(root)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """Of a folder, hold the lock. In an object store two runs that want the same waste work, no more."""
        if not isinstance(self._store, FolderStore):
            yield
            return
        self._store.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._store.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise InvalidInput(f"another run is writing to {self.output}: wait for it") from error
        finally:
            os.close(lock)


@dataclass
class _Tally:
    """Counts over the order as far as it is settled without a gap; up to where it is enough."""

    floor: int = 0
    enough: Callable[[_Tally], bool] = lambda tally: False
    is_owed: Callable[[int], bool] = lambda index: False
    settled: int = 0
    owed: int = 0  # of the failed ones
    groups: int = 0
    kept: int = 0
    bytes: int = 0

    @property
    def rate(self) -> float:
        """Intervals kept of a pair, as far as is known."""
        return self.kept / self.settled if self.settled else 0.0

    def advance(self, memory: Memory) -> list[int]:
        """Count on; gives the thousands that are settled now and not closed."""
        closing = []
        while self.settled < self.floor or not self.enough(self):
            made = memory.made.get(self.settled)
            if made is None and self.settled not in memory.failed:
                break
            if made is None:
                self.owed += self.is_owed(self.settled)
            else:
                self.groups += 1
                self.kept += made[0]
                self.bytes += made[1]
            self.settled += 1
            block = self.settled // BLOCK - 1
            if self.settled % BLOCK == 0 and block not in memory.closed:
                closing.append(block)
        return closing


def _line(plan: Plan, outcome: Outcome) -> str:
    names = " + ".join(name.rpartition("/")[2] for name in plan.pair(outcome.index).panoramas)
    what = f"{outcome.kept} of {INTERVALS} kept" if outcome.made else f"failed: {outcome.error}"
    return f"group {outcome.index + 1}  {names}  {what}"
