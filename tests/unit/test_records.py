"""What a run remembers of pairs, and what it is made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from panotriton.groups.plan import Plan, differences
from panotriton.groups.records import BLOCK, Memory, Records
from panotriton.groups.store import FolderStore

PLAN = Plan(
    panoramas=["a.jpg", "b.jpg", "c.jpg"],
    digests=["0" * 64, "1" * 64, None],
    seed=3,
    options={"threshold": 0.7},
    weights={"osediff": "sha256:1"},
    output="out",
)


def filled(records: Records) -> Memory:
    """A thousand pairs, settled, and some of the next."""
    memory = Memory()
    for index in range(BLOCK + 3):
        if index % 100 == 7:
            failure = {"error": f"no {index}", "trouble": "input"}
            records.failed(index, failure)
            memory.failed[index] = failure
        else:
            assert records.made(index, {"kept": [1] * (index % 9), "bytes": index})
            memory.made[index] = (index % 9, index)
    memory.attempts[5] = records.attempted(5, {"replica": "a"})
    return memory


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(FolderStore(tmp_path))


def same(one: Memory, other: Memory) -> bool:
    return (one.made, one.failed, one.attempts) == (other.made, other.failed, other.attempts)


def test_a_closed_thousand_says_what_its_files_say(records: Records, tmp_path: Path) -> None:
    memory = filled(records)
    assert same(records.recall(), memory)
    records.close(0, memory)
    for path in (tmp_path / "records" / "000000").iterdir():
        path.unlink()  # none of them is read any more
    assert same(records.recall(), memory)
    assert records.recall().closed == {0}


def test_a_thousand_is_open_again_before_it_changes(records: Records) -> None:
    memory = filled(records)
    records.close(0, memory)
    records.reopen([7], memory)
    assert records.recall().closed == set()
    records.forget(7)
    records.made(7, {"kept": [], "bytes": 1})
    found = records.recall()
    assert found.made[7] == (0, 1)
    assert 7 not in found.failed


def test_a_group_is_recorded_once(records: Records) -> None:
    assert records.made(0, {"kept": [1], "bytes": 1})
    assert not records.made(0, {"kept": [2], "bytes": 2})
    assert records.read(0) == {"kept": [1], "bytes": 1}


def test_attempts_are_counted_by_whoever_makes_them(records: Records) -> None:
    assert [records.attempted(4, {"replica": name}) for name in "abc"] == [1, 2, 3]
    assert [attempt["replica"] for attempt in records.attempts(4)] == ["a", "b", "c"]
    records.forgive(4)
    assert records.attempts(4) == []


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"options": {"threshold": 0.5}},
        {"weights": {"osediff": "sha256:2"}},
        {"digests": ["2" * 64, "1" * 64, None]},
    ],
)
def test_a_key_names_all_that_makes_a_group(change: dict[str, Any]) -> None:
    wanted = next(i for i in range(3) if None not in PLAN.pair(i).digests)
    other = dataclasses.replace(PLAN, **change)
    pairs = [other.pair(i) for i in range(3)]
    assert PLAN.pair(wanted).key not in {pair.key for pair in pairs}


def test_a_key_is_the_same_with_defaults_written_out() -> None:
    wanted = next(i for i in range(3) if None not in PLAN.pair(i).digests)
    written = dataclasses.replace(PLAN, options={"threshold": 0.7, "upscale": 2, "prompt": ""})
    assert PLAN.pair(wanted).key == written.pair(wanted).key
    assert [pair.key is None for pair in map(PLAN.pair, range(3))].count(True) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, ["seed (3, now 4)"]),
        ({"options": {"threshold": 0.5}}, ["options: threshold (0.7, now 0.5)"]),
        ({"layout": "parquet"}, ["format (folder, now parquet)"]),
        ({"weights": {}}, ["weights: osediff (sha256:1, now not named)"]),
        (
            {"panoramas": ["a.jpg", "d.jpg", "c.jpg"]},
            ["panoramas (1 missing, as b.jpg; 1 new, as d.jpg)"],
        ),
        ({"digests": ["0" * 64] * 2 + [None]}, ["panoramas (1 changed, as b.jpg)"]),
        ({}, []),
    ],
)
def test_differences_are_named(change: dict[str, Any], says: list[str]) -> None:
    other = dataclasses.replace(PLAN, **change)
    assert differences(PLAN.manifest(), other.manifest()) == says
