"""Reports as runs write them: complete, the same whatever the parallelism, and whatever interrupts."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from panotriton.cli import main
from panotriton.cli.facts import facts, weights
from panotriton.client.client import Client
from panotriton.server.launch import LocalServer
from tests.server.outputs import check_same, content

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
SMALL = ["--crop-size", "64", "--interpolations", "1", "--seed", "3"]
GROUPS = 4


def arguments(output: Path, server: LocalServer, *more: str) -> list[str]:
    run = ["dataset", str(PANORAMAS), "-o", str(output), "--url", server.grpc_url, "--json", *SMALL]
    return [*run, "--sample-n", str(GROUPS), *more]


@pytest.fixture(scope="module")
def undisturbed(standin: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "out"
    assert main(arguments(output, standin, "--report", "--in-flight", "1")) == 0
    return output


def test_every_group_has_a_report_and_the_index_leads_to_it(undisturbed: Path) -> None:
    links = [f"group_{number:04d}/report.html" for number in range(1, GROUPS + 1)]
    index = (undisturbed / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^#][^"]*)"', index) == links
    for link in links:
        text = html.unescape((undisturbed / link).read_text(encoding="utf-8"))
        info = json.loads((undisturbed / link).with_name("group_info.json").read_text())
        assert "triton 2." in info["server"]
        for shown in (info["server"], info["version"], info["command"]):
            assert shown in text


def test_the_command_of_a_group_makes_it_again(
    standin: LocalServer, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = json.loads((undisturbed / "group_0002" / "group_info.json").read_text())
    words = info["command"].split()
    assert words[0] == "panotriton"
    monkeypatch.chdir(tmp_path)
    assert main([*words[1:], "--url", standin.grpc_url]) == 0
    again = json.loads((tmp_path / "out" / "group_0001" / "group_info.json").read_text())
    for name in ("kept", "scores", "intervals", "panoramas", "options", "version", "server"):
        assert again[name] == info[name]


def test_parallelism_changes_nothing(
    standin: LocalServer, undisturbed: Path, tmp_path: Path
) -> None:
    assert main(arguments(tmp_path / "out", standin, "--report", "--in-flight", "4")) == 0
    check_same(content(tmp_path / "out"), content(undisturbed))


def test_reports_can_be_asked_for_later(
    standin: LocalServer, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main(arguments(output, standin)) == 0
    assert not list(output.rglob("*.html"))
    assert main(arguments(output, standin, "--report")) == 0
    check_same(content(output), content(undisturbed))


def reports(output: Path) -> int:
    """How many there are, of finished groups or not."""
    return sum("report.html" in files for _, _, files in os.walk(output))


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    standin: LocalServer, undisturbed: Path, tmp_path: Path, pages: int
) -> None:
    output = tmp_path / "out"
    run = arguments(output, standin, "--report")
    with subprocess.Popen(
        [sys.executable, "-m", "panotriton", *run], stdout=subprocess.DEVNULL
    ) as p:
        while reports(output) < pages and p.poll() is None:
            time.sleep(0.001)
        p.send_signal(signal.SIGKILL)
    assert p.returncode == -signal.SIGKILL
    (output / ".index.html.1").write_text("what a kill in the middle of writing leaves")
    assert main(run) == 0
    check_same(content(output), content(undisturbed))


def test_process_writes_a_report_and_says_where(
    standin: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(PANORAMAS / f"{name}.jpg") for name in ("sunset", "city")]
    output = tmp_path / "out"
    run = ["process", *files, "-o", str(output), "--url", standin.grpc_url, *SMALL, "--report"]
    assert main(run) == 0
    report = output / "group_0001" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(report)
    text = html.unescape(report.read_text(encoding="utf-8"))
    assert f"panotriton process {' '.join(files)} --seed 3" in text
    assert f"-o {output}" in text
    assert main([*run, "--json"]) == 0
    report = output / "group_0002" / "report.html"
    assert json.loads(capsys.readouterr().out)["report"] == str(report)
    assert report.is_file()
    assert main([*run[:-1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] is None


def test_weights_are_told_where_their_repository_is_at_hand(
    standin: LocalServer, repository: Path
) -> None:
    settings = json.loads((repository / "osediff" / "1" / "osediff.json").read_text())
    expected = {
        "osediff": f"sha256:{settings['weights_sha256']}",
        "qwen": "Qwen2_5_VLForConditionalGeneration",
    }
    assert weights(repository) == expected
    with Client(standin.grpc_url) as client:
        health = client.health()
    assert facts(health, repository)["weights"] == expected
    assert "weights" not in facts(health, None)
