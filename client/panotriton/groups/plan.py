"""What a run is made of, and so what each of its groups is: the same whoever makes it, and whenever."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from panotriton.errors import InvalidInput, StoreError, brief
from panotriton.groups.store import is_url, open_store
from panotriton.pipeline.contract import Options
from panotriton.pipeline.images import SUFFIXES, images_in

__all__ = [
    "Pair",
    "Plan",
    "differences",
    "digests",
    "find_panoramas",
    "group_seed",
    "pair_order",
    "read_panorama",
]

_AT_ONCE = 16
_WAITS_S = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Pair:
    """One row of a run. key: names the group by its content; None where a panorama could not be read."""

    index: int
    panoramas: tuple[str, str]
    digests: tuple[str | None, str | None]
    seed: int
    key: str | None

    @property
    def group_id(self) -> int:
        return self.index + 1


@dataclass(frozen=True)
class Plan:
    """A run, all but how much of it is wanted and who does it; small enough to be sent anywhere.

    panoramas: paths or URLs. digests: SHA-256 of each one's content, None where it could not be read.
    weights: what the replicas serve, by model. layout: folder, webdataset or parquet. about: further facts
    for each group's group_info.json. pages: a report in each group's folder.
    """

    panoramas: Sequence[str]
    digests: Sequence[str | None]
    seed: int
    options: Mapping[str, Any]
    weights: Mapping[str, str]
    output: str
    layout: str = "folder"
    about: Mapping[str, Any] = field(default_factory=dict)
    pages: bool = False

    @cached_property
    def order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Pairs in seeded order, (count·(count-1)/2, 2)."""
        return pair_order(len(self.panoramas), self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """Without the order, which each process draws anew: of 10,000 panoramas it has 800 MB."""
        return {name: value for name, value in vars(self).items() if name != "order"}

    def pair(self, index: int) -> Pair:
        """Number `index` of the order."""
        first, second = (int(place) for place in self.order[index])
        digests = (self.digests[first], self.digests[second])
        seed = group_seed(self.seed, index)
        return Pair(
            index,
            (self.panoramas[first], self.panoramas[second]),
            digests,
            seed,
            _key(digests, seed, self.options, self.weights),
        )

    def manifest(self) -> dict[str, Any]:
        """What has to be the same for a run to be gone on with."""
        return {
            "seed": self.seed,
            "options": dict(self.options),
            "format": self.layout,
            "weights": dict(self.weights),
            "panoramas": [
                {"path": path, "sha256": digest}
                for path, digest in zip(self.panoramas, self.digests, strict=True)
            ],
        }


def _key(
    digests: tuple[str | None, str | None],
    seed: int,
    options: Mapping[str, Any],
    weights: Mapping[str, str],
) -> str | None:
    """SHA-256 over contents, seed, options with all defaults and weights; its first 32 digits."""
    if None in digests:
        return None
    completed = Options(**options).completed().chosen()
    content = json.dumps([digests, seed, completed, dict(weights)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def pair_order(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All pairs of `count` panoramas, (count·(count-1)/2, 2), the lower index first, in seeded order."""
    pairs = np.stack(np.triu_indices(count, k=1), axis=1)
    order: np.ndarray[Any, np.dtype[np.int64]] = np.random.default_rng(seed).permutation(pairs)
    return order


def group_seed(seed: int, index: int) -> int:
    """The camera seed of pair `index` of the order, 63 bits."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]) >> 1


def find_panoramas(folders: Sequence[str | Path]) -> list[str]:
    """The files of `images.SUFFIXES`, none hidden, directly in `folders`, in their order, then by name.

    folders: paths or URLs. Raises InvalidInput for a folder that is none, and where fewer than two are found.
    """
    found: list[str] = []
    for folder in folders:
        found += _in_store(str(folder)) if is_url(folder) else _in_folder(Path(folder))
    found = list(dict.fromkeys(found))  # of a folder that is given twice
    if len(found) < 2:
        raise InvalidInput(
            f"{', '.join(map(brief, folders))}: {len(found)} panoramas found; expected two or more "
            f"files named {', '.join(SUFFIXES)}"
        )
    return found


def _in_folder(folder: Path) -> list[str]:
    if not os.path.isdir(folder):  # noqa: PTH112 false of names that no file can have, too
        raise InvalidInput(f"{brief(folder)} is not a folder; expected one that holds panoramas")
    return [str(path) for path in images_in(folder)]


def _in_store(url: str) -> list[str]:
    store = open_store(url)
    names = (name for name in store.list("") if not name.startswith("."))
    wanted = (name for name in names if Path(name).suffix.lower() in SUFFIXES)
    return [f"{store.place}/{name}" for name in sorted(wanted)]


def read_panorama(panorama: str) -> bytes:
    """A file's content. Raises InvalidInput where it cannot be read, StoreError where its store cannot."""
    try:
        return _read_url(panorama) if is_url(panorama) else Path(panorama).read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {brief(panorama)}: {error.strerror or error}") from error


def _read_url(url: str) -> bytes:
    """It was listed: a store that does not find it is asked again before the panorama is blamed."""
    folder, _, name = url.rpartition("/")
    store = open_store(folder)
    for wait_s in _WAITS_S:
        try:
            return store.read(name)
        except (FileNotFoundError, StoreError):
            time.sleep(wait_s)
    return store.read(name)


def digests(panoramas: Sequence[str]) -> list[str | None]:
    """SHA-256 of each content, None where it cannot be read: those pairs will fail, the others not."""

    def digest(panorama: str) -> str | None:
        try:
            return hashlib.sha256(read_panorama(panorama)).hexdigest()
        except InvalidInput:
            return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(digest, panoramas))


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In what two manifests differ, in words: "seed (3, now 4)", "threshold (0.7, now 0.5)" …"""
    found = []
    for name in ("seed", "format"):
        if known.get(name) != wanted[name]:
            found.append(f"{name} ({known.get(name)}, now {wanted[name]})")
    for group, absent in (("options", None), ("weights", "not named")):
        was, now = known.get(group) or {}, wanted[group]
        found += [
            f"{group}: {name} ({was.get(name, absent)}, now {now.get(name, absent)})"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]
    return found + _other_panoramas(known.get("panoramas") or [], wanted["panoramas"])


def _other_panoramas(known: Sequence[Any], wanted: Sequence[Any]) -> list[str]:
    if list(known) == list(wanted):
        return []
    was = {entry["path"]: entry.get("sha256") for entry in known}
    now = {entry["path"]: entry["sha256"] for entry in wanted}
    changes = {
        "missing": [path for path in was if path not in now],
        "new": [path for path in now if path not in was],
        "changed": [path for path in now if path in was and was[path] != now[path]],
    }
    words = [f"{len(some)} {kind}, as {brief(some[0])}" for kind, some in changes.items() if some]
    return [f"panoramas ({'; '.join(words) or 'in another order'})"]
