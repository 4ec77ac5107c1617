"""What commands refuse before any work, in one line, and what they end with."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from panotriton.cli import connection, main, report
from panotriton.cli.places import check_file, check_folder, save
from panotriton.cli.words import number, one_line
from panotriton.errors import InvalidInput
from panotriton.groups import folder
from tests.groups import write_example

PANORAMAS = sorted((Path(__file__).parent.parent / "data" / "panoramas").glob("*.jpg"))[:2]
FILES = [str(path) for path in PANORAMAS]
FOLDER = str(PANORAMAS[0].parent)
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


LONG = "z" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["process", FILES[0], LONG, "-o", "x", *NOBODY],
        ["report", LONG],
        ["dataset", LONG, "--sample-n", "1", "-o", "x", *NOBODY],
        ["serve", "--repository", LONG],
        ["upscale", LONG, "-o", "x", *NOBODY],
        ["upscale", FILES[0], "-o", LONG, *NOBODY],
        ["describe", LONG, *NOBODY],
        ["crop", LONG, "--camera", "0,0,0,90,0", "-o", "x", *NOBODY],
        ["perf-data", "decode", LONG, "-o", "x.json"],
        ["score", FILES[0], "--protocol", LONG],
        ["score", FILES[0], "--url", f"http://{LONG}"],
        [LONG],
    ],
    ids=lambda arguments: " ".join(each[:12] for each in arguments[:3]),
)
def test_no_long_argument_is_echoed_whole(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(arguments)
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "zzzz" in last
    assert "z" * 81 not in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upscale", FILES[0], "-o", "x", "--prompt", "caf\udce9", *NOBODY], "--prompt is"),
        (["describe", FILES[0], "--header", "X:\udce9", *NOBODY], "a header has"),
        (["live", "--url", "http://x:1", "--port", "0"], "host:port without a scheme"),
        (["gateway", "-o", "x", "--url", "http://x:1"], "host:port without a scheme"),
        (["describe", FILES[0], "--url", ""], "url is ''; expected host:port as localhost:8001"),
        (["describe", FILES[0], "--url", "localhost"], "expected host:port as"),
        (["describe", FILES[0], "--url", "localhost:99999"], "expected host:port as"),
        (["describe", FILES[0], "--ca", "nope"], "ca nope cannot be read; expected a PEM file"),
        (["describe", FILES[0], "--ca", FILES[0]], "expected PEM files that belong together"),
        (
            ["dataset", FOLDER, "-o", "x", "--sample-n", "1", "--patience-s", "-1"],
            "--patience-s is -1; expected 0 or more",
        ),
        (["score", FILES[0], "--threshold", "7", *NOBODY], "--threshold is 7.0; expected 0 to 1"),
        (["upscale", FILES[0], "-o", "/dev/null/x", *NOBODY], "/dev/null is a file"),
        (["serve", "--http-port", "99999"], "--http-port is 99999; expected 0 to 65535"),
        (
            ["serve", "--grpc-port", "8000"],
            "--http-port and --grpc-port are both 8000; expected a port for each",
        ),
        (["gateway", "-o", "x", "--preprocess-port", "-1"], "--preprocess-port is -1"),
        (["live", "--port", "99999"], "--port is 99999"),
        (["serve", "--repository", "nope"], "no model repository at nope"),
        (
            ["serve", "nope"],
            "nope is no flag of tritonserver; a repository is named by --repository",
        ),
        (["score", FILES[0], "--local", "--repository", "nope"], "no model repository at nope"),
        (["export", "qwen", "--model", "nope"], "nope/config.json not found"),
        (["export", "osediff", "--base", "nope", "--checkpoint", "x"], "nope is not a diffusers"),
        (["describe", "a\x1b[31m\nb.jpg", *NOBODY], r"cannot read a\x1b[31m\nb.jpg: No such"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_nothing_can_use_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("panotriton: ")
    assert err.count("\n") == 1
    assert message in err
    assert not [*tmp_path.iterdir()]


def test_a_message_keeps_its_short_words_and_is_cut_once() -> None:
    cut = f"…{'z' * 79}"
    assert one_line(f"no '{cut}', `{cut}`: name another") == f"no '{cut}', `{cut}`: name another"
    words = one_line(f"no {LONG}: name another").split(" ")
    assert (words[0], len(words[1]), words[2:]) == ("no", 81, ["name", "another"])
    assert len(one_line(":" * 5000)) == 80


@pytest.mark.parametrize("folder", [".", "", "link"])
def test_no_image_is_overwritten_by_what_is_made_of_it(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    Image.new("RGB", (8, 8)).save("mine.png")
    assert main(["upscale", "mine.png", "-o", folder, *NOBODY]) == 2
    assert "would overwrite mine.png itself; name another folder" in capsys.readouterr().err


def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["describe", str(tmp_path / "pipe.png"), *NOBODY]) == 2
    assert "pipe.png is not a file; expected one that holds an image" in capsys.readouterr().err


def test_a_camera_of_too_few_numbers_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["crop", FILES[0], "--camera", "0,0,0,90", "-o", "x"])
    assert "'0,0,0,90' is no camera (4 numbers); expected yaw,pitch" in capsys.readouterr().err


class Full(Image.Image):
    """A picture for which the disk is too small."""

    def save(self, path: Any, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_no_picture_that_was_there(tmp_path: Path) -> None:
    old = tmp_path / "old.png"
    save(Image.new("RGB", (8, 8), 7), old)
    whole = old.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        save(Full(), old)
    assert old.read_bytes() == whole
    assert [*tmp_path.iterdir()] == [old]


def test_a_full_disk_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_report(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write_report", write_report)
    group = write_example(tmp_path, [0.9] * 16, [1], interpolations=1)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert main(["report", str(group)]) == 1
    assert "No space left on device; free some in . or /tmp, or write" in capsys.readouterr().err


def test_a_group_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jpeg_bytes(_: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "jpeg_bytes", jpeg_bytes)
    with pytest.raises(OSError, match="No space left"):
        write_example(tmp_path / "out", [0.9] * 16, [1], interpolations=1)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_pair_without_a_score_has_a_dash() -> None:
    assert (number(float("nan")), number(0.705)) == ("-", "0.70")


def test_who_interrupts_a_run_is_told_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "check_exported", lambda _: None)
    server = SimpleNamespace(grpc_url="127.0.0.1:1")
    monkeypatch.setattr(connection, "LocalServer", lambda _: nullcontext(server))
    options = Namespace(local=True, repository=None, protocol="grpc", json=False)
    with (
        pytest.raises(KeyboardInterrupt),
        connection.address(options, connection.console_for(options)) as place,
    ):
        assert place == ("127.0.0.1:1", "grpc")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "ending tritonserver, some seconds; again: at once\n"
