"""The commands on files as people have them: odd names, broken ones among good ones, places to write to."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from panotriton.cli import main
from panotriton.cli.connection import warn_of_absence
from panotriton.errors import brief
from panotriton.server.launch import LocalServer

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
RNG = np.random.default_rng(3)
ODD = ("[/old/x].png", "[bold]a.png", ":smile: ü.png", os.fsdecode(b"\xff\xfe.png"))
Capture = pytest.CaptureFixture[str]


def picture(path: Path, height: int = 64, width: int = 128, level: int | None = None) -> Path:
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    data = cv2.imencode(".png", pixels if level is None else np.full_like(pixels, level))[1]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data.tobytes())
    return path


@pytest.fixture
def url(standin: LocalServer) -> list[str]:
    return ["--url", standin.grpc_url]


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Two good files, and four that fail, each in its own way, around them."""
    good = [picture(tmp_path / f"good{i}.png") for i in range(2)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:300])
    gif = tmp_path / "a.gif"
    gif.write_bytes(b"GIF89a")
    thin = picture(tmp_path / "thin.png", 28, 5880)
    files = [thin, good[0], broken, tmp_path / "none.png", gif, good[1]]
    return [str(path) for path in files]


BAD = {
    "thin.png": "is 5880×28 px; expected one side at most 200",
    "broken.png": "is a broken image",
    "none.png": "No such file",
    "a.gif": "is GIF",
}


@pytest.mark.parametrize("command", ["score", "describe"])
def test_a_bad_file_loses_no_other(
    command: str, mixed: list[str], url: list[str], capsys: Capture
) -> None:
    assert main([command, *mixed, *url]) == 2
    out, err = capsys.readouterr()
    assert all(name in out for name in ("good0.png", "good1.png"))
    assert not any(name in out for name in BAD)
    lines = err.splitlines()
    assert len(lines) == len(BAD)
    for line, (name, words) in zip(lines, BAD.items(), strict=True):
        assert name in line
        assert words in line
    assert main([command, *mixed, *url, "--json"]) == 2
    items = json.loads(capsys.readouterr().out)
    assert [item["image"] for item in items] == mixed
    assert [not item.get("error") for item in items] == [Path(p).name not in BAD for p in mixed]


def test_a_name_that_no_file_can_have_loses_no_other(
    tmp_path: Path, url: list[str], capsys: Capture
) -> None:
    files = [str(picture(tmp_path / name)) for name in ("one.png", "two.png")]
    for command in ("score", "describe"):
        assert main([command, files[0], "z" * 5000, files[1], *url]) == 2
        out, err = capsys.readouterr()
        assert all(file in out for file in files)
        assert max(map(len, out.splitlines())) < 1000
        assert err.count("\n") == 1
        assert "z" * 81 not in err


def test_control_characters_of_names_do_not_reach_the_terminal(
    tmp_path: Path, url: list[str], capsys: Capture
) -> None:
    file = str(picture(tmp_path / "a\x1b[31m\nb.png"))
    for command in (["score"], ["describe"], ["upscale", "-o", str(tmp_path / "out")]):
        assert main([command[0], file, *command[1:], *url]) == 0
        out = capsys.readouterr().out
        assert r"a\x1b[31m\nb.png" in out
        assert "\x1b" not in out
    names = names_of_panoramas(tmp_path / "panoramas", "c\x1b[31m\nd.jpg", "e.jpg")
    run = ["dataset", str(names[0].parent), "--sample-n", "1", "--sphere", "0", "--crop-size", "64"]
    assert main([*run, "-o", str(tmp_path / "run"), *url]) == 0
    out = capsys.readouterr().out
    assert r"c\x1b[31m\nd" in out
    assert "\x1b" not in out


def test_what_was_upscaled_before_a_failure_is_written(
    mixed: list[str], url: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["upscale", *mixed, "-o", str(out), *url]) == 2
    assert sorted(p.name for p in out.iterdir()) == ["good0.png", "good1.png", "thin.png"]
    assert capsys.readouterr().out.splitlines()[1] == f"{out / 'good0.png'}  256×128"


def test_a_prompt_that_is_cut_is_told_once_and_kept(
    url: list[str], tmp_path: Path, capsys: Capture
) -> None:
    prompt = ["--prompt", "x " * 77 + "y"]
    files = [str(picture(tmp_path / f"{i}.png")) for i in range(2)]
    assert main(["upscale", *files, "-o", str(tmp_path / "sharp"), *prompt, *url, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)[0]["warning"]
    assert told.startswith("PROMPT is read up to character 153 of 155")
    assert [item["warning"] for item in json.loads(out)] == [told, told]
    assert err == f"panotriton: warning: {told}\n"
    panoramas = [str(path) for path in sorted(PANORAMAS.glob("*.jpg"))[:2]]
    small = ["--crop-size", "64", "--interpolations", "0", *prompt, *url]
    assert main(["process", *panoramas, "-o", str(tmp_path / "one"), *small, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["warning"] == told
    assert err == f"panotriton: warning: {told}\n"
    run = [
        "dataset",
        str(PANORAMAS),
        "-o",
        str(tmp_path / "many"),
        "--sample-n",
        "1",
        "--seed",
        "1",
    ]
    assert main([*run, *small]) == 0
    for root in ("one", "many"):
        info = json.loads((tmp_path / root / "group_0001" / "group_info.json").read_text())
        assert info["warning"] == told


def test_a_preview_is_written_before_the_group(
    url: list[str], tmp_path: Path, capsys: Capture
) -> None:
    """And is a pair that the group has, but for the rounding of a batch of another size."""
    panoramas = [str(PANORAMAS / f"{name}.jpg") for name in ("sunset", "city")]
    small = ["--crop-size", "64", "--interpolations", "0", "--sphere", "0", "--threshold", "0"]
    run = ["process", *panoramas, "-o", str(tmp_path), "--seed", "7", *small, *url]
    assert main([*run, "--preview"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    preview = tmp_path / "preview.jpg"
    assert re.fullmatch(rf"first pair, \d+\.\d s → {re.escape(str(preview))}", first)
    pair = tmp_path / "group_0001" / "osediff" / "sunset_yaw01_pair.jpg"
    got, expected = (cv2.imread(str(path)) for path in (preview, pair))
    assert got.shape == expected.shape == (128, 256, 3)
    assert cv2.PSNR(got, expected) > 35  # JPEG of another quality


def test_the_modes_are_compared_on_what_all_could_score(
    mixed: list[str], url: list[str], capsys: Capture
) -> None:
    assert main(["score", *mixed, "--compare", "--json", *url]) == 2
    assert [row["pairs"] for row in json.loads(capsys.readouterr().out)] == [2, 2, 2]


def test_describing_nothing_is_a_failure(tmp_path: Path, url: list[str], capsys: Capture) -> None:
    dark, light = picture(tmp_path / "dark.png", level=0), picture(tmp_path / "light.png", level=9)
    assert main(["describe", str(dark), *url]) == 1
    assert capsys.readouterr() == ("", f"panotriton: {brief(dark)}: it is dark\n")
    assert main(["describe", str(dark), str(light), *url]) == 1
    assert capsys.readouterr().out == f"{light}: Mean level 9.0.\n"
    assert main(["describe", str(light), *url]) == 0


def test_names_are_printed_as_they_are(tmp_path: Path, url: list[str], capsys: Capture) -> None:
    files = [str(picture(tmp_path / name)) for name in ODD]
    shown = [file.encode(errors="backslashreplace").decode() for file in files]
    for command in (["score", *files], ["describe", *files]):
        assert main([*command, *url]) == 0
        out, err = capsys.readouterr()
        out = out.encode(errors="backslashreplace").decode()
        assert all(name in out for name in shown)
        assert not err
    assert main(["upscale", *files, "-o", str(tmp_path / "out"), *url]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {Path(n).name for n in ODD}


@pytest.mark.parametrize("command", [["score"], ["describe"], ["upscale", "-o", "sharp"]])
def test_a_folder_stands_for_its_images_and_hidden_files_are_none(
    command: list[str],
    tmp_path: Path,
    url: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("._pa.jpg", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "folder.png").mkdir()
    picture(tmp_path / "pa.png")
    assert main([command[0], ".", *command[1:], *url, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def names_of_panoramas(folder: Path, *names: str) -> list[Path]:
    """A panorama under each name."""
    folder.mkdir()
    source = sorted(PANORAMAS.glob("*.jpg"))[0]
    return [Path(shutil.copy(source, folder / name)) for name in names]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg is no UTF-8"),
        ("x" * 240 + ".jpg", "has 240 bytes; expected at most"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_work(
    name: str, says: str, tmp_path: Path, capsys: Capture
) -> None:
    bad, good = names_of_panoramas(tmp_path / "in", name, "good.jpg")
    nobody = ["--url", "127.0.0.1:1"]  # where nothing is sent, nobody is missed
    assert main(["process", str(bad), str(good), "-o", str(tmp_path / "out"), *nobody]) == 2
    err = capsys.readouterr().err.encode(errors="backslashreplace").decode()
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_records_such_a_panorama_and_goes_on(
    tmp_path: Path, url: list[str], capsys: Capture
) -> None:
    bad = os.fsdecode(b"caf\xe9.jpg")
    names_of_panoramas(tmp_path / "in", bad, "x" * 240 + ".jpg", "a.jpg", "b.jpg", "[c].jpg")
    out = tmp_path / "out"
    run = ["dataset", str(tmp_path / "in"), "-o", str(out), "--sample-n", "3", *url]
    small = ["--crop-size", "64", "--interpolations", "1", "--report"]
    assert main([*run, *small]) == 0
    assert main([*run, *small]) == 0  # knows its own names again
    failed = json.loads((out / "failed.json").read_text(encoding="utf-8"))
    assert failed
    for entry in failed.values():
        assert "is no UTF-8" in entry["error"] or "has 240 bytes" in entry["error"]
    assert len(json.loads((out / "results.json").read_text())) == 3
    assert "\\udce9" in (out / "dataset.json").read_text(encoding="utf-8")
    assert "\\udce9" in capsys.readouterr().out.encode(errors="backslashreplace").decode()


def test_what_starts_without_a_server_says_so(standin: LocalServer, capsys: Capture) -> None:
    warn_of_absence(standin.grpc_url)
    assert not capsys.readouterr().err
    warn_of_absence("127.0.0.1:1")
    assert capsys.readouterr().err.startswith(
        "panotriton: warning: no server is ready at 127.0.0.1:1;"
    )
