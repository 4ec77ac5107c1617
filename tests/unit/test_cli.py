"""What commands refuse before any work, in one line, and what they end with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from panotriton.cli import main
from panotriton.cli.places import check_file, check_folder
from panotriton.errors import InvalidInput

PANORAMAS = sorted((Path(__file__).parent.parent / "data" / "panoramas").glob("*.jpg"))[:2]
FILES = [str(path) for path in PANORAMAS]
NOBODY = ["--url", "127.0.0.1:1"]  # a command that got as far would end with 3


@pytest.mark.parametrize(
    "command",
    [
        ["process", *FILES, *NOBODY],
        ["dataset", str(PANORAMAS[0].parent), "--sample-n", "1", *NOBODY],
        ["upscale", FILES[0], *NOBODY],
        ["crop", FILES[0], "--camera", "0,0,0,90,0", *NOBODY],
        ["perf-data", "decode", FILES[0]],
        ["gateway"],
        ["report", "nowhere"],
        ["export", "--preset", "small"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("place", ["file", "below a file", "no name", "read-only"])
def test_a_place_that_cannot_be_written_to_is_named_at_once(
    command: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    takes_file = command[0] in ("perf-data", "report")
    where = {
        "file": tmp_path if takes_file else tmp_path / "file",
        "below a file": tmp_path / "file" / "deeper" / "out",
        "no name": tmp_path / ("x" * 300) / "out",
        "read-only": Path("/proc/out/x"),
    }[place]
    flag = "--output" if command[0] == "export" else "-o"
    assert main([*command, flag, str(where)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("panotriton: ")
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_places_that_do_not_exist_yet_are_fine(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a.json")
    check_file(tmp_path / "a" / "b.json", makes_folder=True)
    with pytest.raises(InvalidInput, match="create it first"):
        check_file(tmp_path / "a" / "b.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", "osediff", "--base", "x"],
        ["process", *FILES, "-o", "x", "--seed", "-1"],
        ["process", *FILES, "-o", "x", "--sphere", "63"],
        ["report", "nowhere"],
        ["bench", "nothing"],
        ["score", "nowhere.png", *NOBODY],
        ["dataset", "nowhere", "-o", "x", "--sample-n", "1"],
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "panotriton", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("panotriton: ")
    assert done.stderr.count("\n") == 1
