"""Temporary folders, also those of processes that were killed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from panotriton.pipeline.scratch import Scratch, atomic, dead_folders

HOLDER = """
import sys
from pathlib import Path
from panotriton.pipeline.scratch import Scratch

with Scratch("x-", Path(sys.argv[1])) as folder:
    (folder / "gigabytes").write_text("some")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(parent: Path) -> Iterator[Path]:
    """The folder of another process, which is killed in the end."""
    command = [sys.executable, "-c", HOLDER, str(parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    with holder(tmp_path) as left:
        assert (left / "gigabytes").exists()
        with Scratch("x-", tmp_path) as own:
            assert {*tmp_path.iterdir()} == {left, own}
        assert dead_folders("x-", tmp_path) == []
    assert dead_folders("x-", tmp_path) == [left]
    with Scratch("x-", tmp_path, sweep=False), Scratch("y-", tmp_path):
        assert left.exists()
    with Scratch("x-", tmp_path) as own:
        assert [*tmp_path.iterdir()] == [own]
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_its_owners_until_it_is_closed(tmp_path: Path) -> None:
    scratch = Scratch("x-", tmp_path)
    assert dead_folders("x-", tmp_path) == []
    scratch.close()
    scratch.close()
    assert not scratch.path.exists()


def test_a_folder_is_locked_itself_for_cleaners(tmp_path: Path) -> None:
    with Scratch("x-", tmp_path) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_what_nobody_ever_held_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x-mine").mkdir()
    with Scratch("x-", tmp_path):
        assert dead_folders("x-", tmp_path) == []
    assert (tmp_path / "x-mine").is_dir()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 251}.txt"
    with atomic(path) as part:
        part.write_text("first")
        assert part.suffix == ".txt"
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "first"
