"""What a request may open: everything below the roots, nothing else, whatever is swapped meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from panotriton.errors import InvalidInput, PanotritonError
from panotriton.web.gateway.failures import ForbiddenPath
from panotriton.web.gateway.paths import Roots

INSIDE, SECRET = b"inside", b"secret"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with links that stay in it and links that leave it, and a folder outside."""
    root, outside = tmp_path / "inside", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    (root / "in" / "file").write_bytes(INSIDE)
    (outside / "file").write_bytes(SECRET)
    (root / "link_in").symlink_to("in")
    (root / "link_out").symlink_to(outside)
    (root / "file_out").symlink_to(outside / "file")
    (root / "loop").symlink_to("loop")
    (tmp_path / "insideless").symlink_to(outside)
    return tmp_path


@pytest.fixture
def roots(tree: Path) -> Roots:
    return Roots([tree / "inside"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_below_a_root_are_read(roots: Roots, tree: Path) -> None:
    for path in ("in/file", "link_in/file", "in/../in/./file"):
        assert roots.read(f"{tree}/inside/{path}") == INSIDE


def test_a_relative_path_starts_at_the_working_directory(
    roots: Roots, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / "inside")
    assert roots.read("in/file") == INSIDE
    with pytest.raises(ForbiddenPath):
        roots.read("../outside/file")


@pytest.mark.parametrize(
    "path",
    [
        "outside/file",
        "outside/none",
        "inside/link_out/file",
        "inside/link_out",
        "inside/file_out",
        "inside/../outside/file",
        "inside/link_in/../../outside/file",
        "insideless/file",
        "inside2/file",
        "",
        ".",
    ],
)
def test_everything_else_is_forbidden_whether_it_exists_or_not(
    roots: Roots, tree: Path, path: str
) -> None:
    with pytest.raises(ForbiddenPath, match="outside the folders.*--root"):
        roots.read(f"{tree}/{path}")
    with pytest.raises(ForbiddenPath):
        roots.write(tree / path / "new", b"")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("in/none", "No such file"),
        ("none/none", "No such file"),
        ("in", "not a regular file"),
        ("", "not a regular file"),
        ("in/file/file", "Not a directory"),
        ("x" * 300, "name too long"),
        ("loop", "link that is not safe"),
        ("in/\0", "is no path"),
        ("in/\ud800", "is no path"),
    ],
)
def test_what_cannot_be_read_says_why(roots: Roots, tree: Path, path: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        roots.read(f"{tree}/inside/{path}")


def test_a_named_pipe_is_refused_without_waiting_for_its_writer(roots: Roots, tree: Path) -> None:
    os.mkfifo(tree / "inside" / "pipe")
    with pytest.raises(InvalidInput, match="not a regular file"):
        roots.read(f"{tree}/inside/pipe")


def test_a_large_file_is_refused_before_it_is_read(roots: Roots, tree: Path) -> None:
    with (tree / "inside" / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidInput, match="1099511627776 bytes; expected at most 536870912"):
        roots.read(f"{tree}/inside/large")


def test_writing_makes_folders_and_leaves_one_file(roots: Roots, tree: Path) -> None:
    target = tree / "inside" / "a" / "b" / "c"
    roots.write(target, b"1")
    roots.write(target, b"2")
    assert target.read_bytes() == b"2"
    assert names(target.parent) == ["c"]


def test_writing_replaces_a_link_and_does_not_follow_it(roots: Roots, tree: Path) -> None:
    roots.write(tree / "inside" / "file_out", b"new")
    assert (tree / "outside" / "file").read_bytes() == SECRET
    assert not (tree / "inside" / "file_out").is_symlink()


@pytest.mark.parametrize(
    ("path", "says"),
    [("in", "Is a directory"), ("..", "not a regular file"), ("x" * 300, "name too long")],
)
def test_what_cannot_be_written_says_why(roots: Roots, tree: Path, path: str, says: str) -> None:
    with pytest.raises(PanotritonError, match=says):
        roots.write(tree / "inside" / "in" / ".." / path, b"")
    assert names(tree / "inside" / "in") == ["file"]


def test_a_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="none: No such file.*expected a folder"):
        Roots([tmp_path, tmp_path / "none"])


def test_nothing_is_held_open(tree: Path) -> None:
    def descriptors() -> int:
        return len(names(Path("/proc/self/fd")))

    before = descriptors()
    roots = Roots([tree / "inside", tree / "inside", tree])
    assert roots.read(f"{tree}/outside/file") == SECRET
    with pytest.raises(InvalidInput):
        roots.read(f"{tree}/outside/none")
    roots.write(tree / "new" / "file", b"")
    assert descriptors() == before


def test_a_root_that_was_replaced_is_the_new_folder(roots: Roots, tree: Path) -> None:
    (tree / "inside").rename(tree / "old")
    with pytest.raises(InvalidInput, match="No such file"):
        roots.read(f"{tree}/inside/in/file")
    with pytest.raises(InvalidInput, match="No such file"):
        roots.write(tree / "inside" / "new", b"")
    (tree / "inside").mkdir()
    (tree / "inside" / "file").write_bytes(b"later")
    assert roots.read(f"{tree}/inside/file") == b"later"
    roots.write(tree / "inside" / "new", b"")
    assert names(tree / "inside") == ["file", "new"]


def test_an_output_that_is_gone_is_made_again(tree: Path) -> None:
    output = tree / "above" / "output"
    roots = Roots([], output)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="No such file"):
            roots.read(f"{output}/group/file")
        roots.write(output / "group" / "file", INSIDE)
        assert roots.read(f"{output}/group/file") == INSIDE
        shutil.rmtree(tree / "above")


@pytest.mark.parametrize("name", ["inside", "inside/in"])
def test_a_root_that_became_a_link_is_not_followed(tree: Path, name: str) -> None:
    roots = Roots([tree / "inside" / "in"])
    (tree / name).rename(tree / "kept")
    (tree / name).symlink_to(tree / "outside")
    (tree / "outside" / "in").mkdir()
    (tree / "outside" / "in" / "file").write_bytes(SECRET)
    with pytest.raises(ForbiddenPath):
        roots.read(f"{tree}/inside/in/file")
    with pytest.raises(ForbiddenPath):
        roots.write(tree / "inside" / "in" / "new", b"")
    assert names(tree / "outside" / "in") == ["file"]


PARTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "in",
        "file",
        "link_in",
        "link_out",
        "file_out",
        "loop",
        "inside",
        "outside",
        "~",
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PARTS, max_size=6))
@example(["inside", "in", "file"])
def test_no_path_reads_what_is_outside(roots: Roots, tree: Path, parts: list[str]) -> None:
    path = "/".join([str(tree), *parts])
    try:
        assert roots.read(path) == INSIDE
    except InvalidInput:
        assert os.path.realpath(path) != f"{tree}/inside/in/file"


@pytest.fixture
def thief(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arms a thief who puts a link to the outside in the place of what has just been checked."""
    resolve = os.path.realpath

    def arm(name: str) -> None:
        def resolve_and_swap(path: Any) -> str:
            real = resolve(path)
            place = tree / "inside" / name
            place.rename(tree / "kept")
            place.symlink_to(tree / "outside" / place.relative_to(tree / "inside" / "in"))
            return real

        monkeypatch.setattr("panotriton.web.gateway.paths.os.path.realpath", resolve_and_swap)

    return arm


def test_a_root_swapped_for_a_link_after_the_check_is_not_read(
    roots: Roots, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = os.path.realpath

    def resolve_and_swap(path: Any) -> str:
        real = resolve(path)
        (tree / "inside").rename(tree / "kept")
        (tree / "inside").symlink_to(tree / "outside")
        return real

    monkeypatch.setattr("panotriton.web.gateway.paths.os.path.realpath", resolve_and_swap)
    with pytest.raises(ForbiddenPath, match="not safe to follow"):
        roots.read(f"{tree}/inside/file")


@pytest.mark.parametrize("name", ["in", "in/file"])
def test_what_is_swapped_for_a_link_after_the_check_is_not_read(
    roots: Roots, tree: Path, thief: Callable[[str], None], name: str
) -> None:
    thief(name)
    with pytest.raises(ForbiddenPath, match="not safe to follow"):
        roots.read(f"{tree}/inside/in/file")


def test_a_folder_swapped_for_a_link_after_the_check_is_not_written_to(
    roots: Roots, tree: Path, thief: Callable[[str], None]
) -> None:
    thief("in")
    with pytest.raises(ForbiddenPath, match="not safe to follow"):
        roots.write(tree / "inside" / "in" / "new", b"")
    assert names(tree / "outside") == ["file"]
