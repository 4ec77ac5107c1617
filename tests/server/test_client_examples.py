"""What the documentation shows is run: the examples, and the commands' own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

from panotriton.cli import build_parser, main
from panotriton.server.launch import LocalServer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "tests" / "examples"
PANORAMAS = ROOT / "tests" / "data" / "panoramas"
FILES = [str(PANORAMAS / "courtyard.jpg"), str(PANORAMAS / "interior.jpg")]


def run(*command: str) -> str:
    whole = [sys.executable, "-W", "error", *command]
    result = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_plain_request_of_every_model(standin: LocalServer, protocol: str) -> None:
    url = standin.grpc_url if protocol == "grpc" else standin.http_url
    lines = run(str(EXAMPLES / "plain_requests.py"), protocol, url, *FILES).splitlines()
    assert "osediff: IMAGES_SR uint8 (1, 128, 256, 3)" in lines
    asked = {line.partition(":")[0] for line in lines}
    models = {path.parent.name for path in ROOT.glob("model_repository/*/config.pbtxt")}
    inner = {
        "interpolate",
        "options",
        "qwen",
        "qwen_vision",
        "select",
        "tap",
    }  # parts that callers don't ask
    assert models - inner - asked == {
        "panorama_stream",  # plain_stream.py
        *(name for name in models if name.startswith("osediff_")),
    }


@pytest.mark.parametrize("name", ["plain_stream", "many_groups", "shared_memory"])
def test_the_other_examples(standin: LocalServer, name: str) -> None:
    assert run(str(EXAMPLES / f"{name}.py"), standin.grpc_url, *FILES).strip()


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    build_parser().print_help()
    commands = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, re.MULTILINE)
    needed = "process upscale score describe crop dataset serve export doctor perf-data bench"
    assert set(needed.split()) <= set(commands)
    for command in needed.split():
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"\n  panotriton {command}" in capsys.readouterr().out


def spoken(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_upscale_and_crop_write_pictures(
    standin: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", standin.grpc_url, "--json"]
    out = spoken(capsys, "upscale", FILES[0], "-o", str(tmp_path), *url)
    assert json.loads(out) == [{"path": str(tmp_path / "courtyard.png"), "size": [2048, 1024]}]
    camera = ["--camera=-30,-10,0,90,0.4", "--camera", "1,2,3,90,0"]
    spoken(capsys, "crop", FILES[0], *camera, "-o", str(tmp_path), "--size", "64", *url)
    with PILImage.open(tmp_path / "courtyard_02.png") as picture:
        assert picture.size == (64, 64)


def test_score_and_describe_by_http(
    standin: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", standin.http_url, "--protocol", "http"]
    (score, _) = json.loads(spoken(capsys, "score", *FILES, *url, "--json"))
    assert 0.5 <= score["final"] <= 1.01
    assert FILES[1] in spoken(capsys, "score", *FILES, *url)
    assert "Mean level" in spoken(capsys, "describe", FILES[0], *url)


def test_process_writes_a_group(
    standin: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--crop-size", "64", "--interpolations", "1", "--url", standin.grpc_url]
    out = json.loads(spoken(capsys, "process", *FILES, "-o", str(tmp_path), *small, "--json"))
    assert Path(out["folder"]) == tmp_path / "group_0001"
    info = json.loads((tmp_path / "group_0001" / "group_info.json").read_text())
    assert info["kept"] == out["kept"]
    assert "kept, " in spoken(capsys, "process", *FILES, "-o", str(tmp_path), *small)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["upscale", "nowhere.jpg", "-o", "x"], 2, "cannot read nowhere.jpg"),
        (["upscale", "a/b.jpg", "c/b.png", "-o", "x"], 2, "several images are named b"),
        (["score", FILES[0], "--url", "127.0.0.1:1"], 3, "no server answers"),
        (["bench", "nothing"], 2, "no bench 'nothing'"),
    ],
)
def test_exit_codes_mean_something(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("model", ["osediff", "decode", "crop", "preprocess", "panorama_encoded"])
def test_perf_data_is_what_perf_analyzer_reads(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.json"
    spoken(capsys, "perf-data", model, *FILES, "-o", str(path), "--count", "3", "--crop-size", "64")
    data = json.loads(path.read_text())["data"]
    assert len(data) == 3
    assert data[0] != data[1]
    for tensor in data[0].values():
        assert set(tensor) == {"content", "shape"}
