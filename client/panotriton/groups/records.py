"""What a run remembers of each pair: one small file for what came of it, none of which is ever rewritten.

```
records/000012/000012345.json            group 12345 is made: its key and its entry of results.json
records/000012/000012345.attempt-1.json  a server went, or took too long, while it made the group
records/000012/000012345.failed.json     the pair gave no group
records/000012.closed.json               counts of a thousand pairs that are all settled
```
Recording a group costs the same however many there are. A run that goes on reads a closed thousand as one
file and lists the others, so that it costs no more than a few files per thousand pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from panotriton.errors import StoreError
from panotriton.groups.store import Store, json_line

__all__ = ["BLOCK", "MAX_ATTEMPTS", "Memory", "Records"]

BLOCK = 1000
"""Pairs whose records lie in one folder."""
MAX_ATTEMPTS = 3
"""How often a server may fail on a pair, over all runs, before it is left: a dead letter."""

_FOLDER = "records"
_FAILED, _ATTEMPT, _CLOSED = ".failed.json", ".attempt-", ".closed.json"
_AT_ONCE = 32
_MOST_ATTEMPTS = 1000  # far beyond MAX_ATTEMPTS, with as many processes as there may be


@dataclass
class Memory:
    """What is known of pairs, by their index: made groups' (kept intervals, bytes), failures, attempts."""

    made: dict[int, tuple[int, int]] = field(default_factory=dict)
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)


class Records:
    """The records below a run's output. Any number of processes may write."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def made(self, index: int, record: Mapping[str, Any]) -> bool:
        """Record a group; False where another process has done so before."""
        return self._store.create(f"{_name(index)}.json", json_line(record))

    def failed(self, index: int, failure: Mapping[str, Any]) -> None:
        """Record, or record anew, why a pair gave no group."""
        self._store.write_json(f"{_name(index)}{_FAILED}", failure)

    def attempted(self, index: int, attempt: Mapping[str, Any]) -> int:
        """Record that a server failed on the pair; how often that has happened now."""
        for number in range(1, _MOST_ATTEMPTS):
            if self._store.create(f"{_name(index)}{_ATTEMPT}{number}.json", json_line(attempt)):
                return number
        raise StoreError(f"{_name(index)}: {_MOST_ATTEMPTS} attempts are recorded, which cannot be")

    def attempts(self, index: int) -> list[dict[str, Any]]:
        """All of them, in their order."""
        found = (
            self._store.read_json(f"{_name(index)}{_ATTEMPT}{number}.json")
            for number in range(1, MAX_ATTEMPTS + 1)
        )
        return [attempt for attempt in found if attempt]

    def read(self, index: int) -> dict[str, Any] | None:
        """What `made` has recorded, None where it has not."""
        found: dict[str, Any] | None = self._store.read_json(f"{_name(index)}.json")
        return found

    def read_all(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Records of made groups, in this order."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for some in _chunks(indices, BLOCK):
                yield from (record for record in pool.map(self.read, some) if record)

    def failures(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """What `failed` has recorded of each."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._read_failure, indices))

    def close(self, block: int, memory: Memory) -> None:
        """Sum up a thousand pairs that are settled."""
        indices = range(block * BLOCK, (block + 1) * BLOCK)
        content = {
            "made": [memory.made.get(index) for index in indices],
            "failed": {str(i): memory.failed[i] for i in indices if i in memory.failed},
            "attempts": {str(i): memory.attempts[i] for i in indices if i in memory.attempts},
        }
        self._store.write(f"{_FOLDER}/{block:06d}{_CLOSED}", json_line(content))
        memory.closed.add(block)

    def reopen(self, indices: Iterable[int], memory: Memory) -> None:
        """Before anything about these pairs changes."""
        for block in sorted({index // BLOCK for index in indices} & memory.closed):
            self._store.remove(f"{_FOLDER}/{block:06d}{_CLOSED}")
            memory.closed.discard(block)

    def forget(self, index: int) -> None:
        """Remove all that is recorded of a pair; its block must be open."""
        self._remove(index, lambda ending: True)

    def forgive(self, index: int) -> None:
        """Count no attempt of a pair any more."""
        self._remove(index, lambda ending: ending.startswith(_ATTEMPT))

    def _remove(self, index: int, chosen: Callable[[str], bool]) -> None:
        endings = (".json", _FAILED, *(f"{_ATTEMPT}{n}.json" for n in range(1, MAX_ATTEMPTS + 1)))
        for ending in filter(chosen, endings):
            self._store.remove(f"{_name(index)}{ending}")

    def recall(self) -> Memory:
        """All that is recorded."""
        memory = Memory()
        names = set(self._store.list(_FOLDER))
        closed = {int(name[:6]) for name in names if name.endswith(_CLOSED)}
        folders = {int(name) for name in names if name.isdecimal()} - closed
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for block, content in zip(closed, pool.map(self._read_closed, closed), strict=True):
                _recall_closed(memory, block, content)
            found = pool.map(
                lambda block: list(self._store.list(f"{_FOLDER}/{block:06d}")), folders
            )
            single = [_parsed(name) for names in found for name in names]
            for index, ending in single:
                if ending.startswith(_ATTEMPT):
                    memory.attempts[index] = memory.attempts.get(index, 0) + 1
            made = [index for index, ending in single if ending == ".json"]
            for index, record in zip(made, pool.map(self.read, made), strict=True):
                if record:
                    memory.made[index] = (len(record["kept"]), record["bytes"])
            failed = [i for i, ending in single if ending == _FAILED and i not in memory.made]
            for index, failure in zip(failed, pool.map(self._read_failure, failed), strict=True):
                memory.failed[index] = failure or {}
        return memory

    def _read_closed(self, block: int) -> Any:
        return self._store.read_json(f"{_FOLDER}/{block:06d}{_CLOSED}")

    def _read_failure(self, index: int) -> Any:
        return self._store.read_json(f"{_name(index)}{_FAILED}")


def _recall_closed(memory: Memory, block: int, content: Any) -> None:
    for index, made in enumerate(content["made"], start=block * BLOCK):
        if made:
            memory.made[index] = (made[0], made[1])
    memory.failed |= {int(index): failure for index, failure in content["failed"].items()}
    memory.attempts |= {int(index): count for index, count in content["attempts"].items()}
    memory.closed.add(block)


def _name(index: int) -> str:
    return f"{_FOLDER}/{index // BLOCK:06d}/{index + 1:09d}"


def _parsed(name: str) -> tuple[int, str]:
    return int(name[:9]) - 1, name[9:]


def _chunks(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for index in indices:
        chunk.append(index)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk
