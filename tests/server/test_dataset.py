"""Data-set runs: the same whatever the parallelism, and whatever kills them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from panotriton.cli import main
from panotriton.client import conversation
from panotriton.errors import InvalidInput
from panotriton.groups.dataset import Dataset
from panotriton.server.launch import LocalServer
from tests.server.harm import Victim, harmed
from tests.server.outputs import check_same, content, result

PANORAMAS = Path(__file__).parent.parent / "data" / "panoramas"
GROUPS = 6
SMALL = ["--crop-size", "64", "--interpolations", "1", "--seed", "3"]


def arguments(output: Path, url: str, *more: str, folder: Path = PANORAMAS) -> list[str]:
    run = ["dataset", str(folder), "-o", str(output), "--url", url, "--json", *SMALL]
    return [*run, *(more or ["--sample-n", str(GROUPS)])]


@pytest.fixture(scope="module")
def undisturbed(standin: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "out"
    assert (
        main(arguments(output, standin.grpc_url, "--sample-n", str(GROUPS), "--in-flight", "1"))
        == 0
    )
    return output


def test_a_run_is_complete(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["groups"], summary["failed"], summary["complete"]) == (GROUPS, 0, True)
    results = json.loads((undisturbed / "results.json").read_text())
    assert [group["group_id"] for group in results] == list(range(1, GROUPS + 1))
    assert sum(len(group["kept"]) for group in results) == summary["intervals_kept"]
    for group in results:
        folder = undisturbed / f"group_{group['group_id']:04d}"
        for interval in group["intervals"]:
            for sequence in interval["sequences"]:
                assert all((folder / image["path"]).is_file() for image in sequence["images"])
    assert not (undisturbed / ".work").exists()
    assert not list(undisturbed.rglob(".*"))


@pytest.mark.parametrize(("in_flight", "protocol"), [("4", "grpc"), ("3", "http")])
def test_parallelism_changes_nothing(
    standin: LocalServer, tmp_path: Path, undisturbed: Path, in_flight: str, protocol: str
) -> None:
    url = standin.grpc_url if protocol == "grpc" else standin.http_url
    more = ["--in-flight", in_flight, "--protocol", protocol, "--sample-n", str(GROUPS)]
    assert main(arguments(tmp_path / "out", url, *more)) == 0
    check_same(content(tmp_path / "out"), content(undisturbed))


def settled(output: Path) -> int:
    """How much of a run is on disk, in files, finished groups or not."""
    return sum(len(files) for _, _, files in os.walk(output))


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    standin: LocalServer, tmp_path: Path, undisturbed: Path, share: float
) -> None:
    """Killed when about this share of all files is written, three times over, then finished."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "panotriton", *arguments(output, standin.grpc_url)]
    target = share * len(content(undisturbed))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while settled(output) < target and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (output / "summary.json").exists()
    whole = {path: path.stat().st_mtime_ns for path in output.glob("group_*/group_info.json")}
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    check_same(content(output), content(undisturbed))
    assert all(path.stat().st_mtime_ns == written for path, written in whole.items())  # made once


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_run_to_go_on_with(
    standin: LocalServer, tmp_path: Path, undisturbed: Path, end: signal.Signals
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "panotriton", *arguments(output, standin.grpc_url)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while settled(output) < 100 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(end)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on from here" in error
    assert "Traceback" not in error
    assert main(arguments(output, standin.grpc_url)) == 0
    check_same(content(output), content(undisturbed))


def test_a_run_can_be_made_longer(standin: LocalServer, tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "out"
    assert main(arguments(output, standin.grpc_url, "--sample-n", "2")) == 0
    assert main(arguments(output, standin.grpc_url)) == 0
    check_same(content(output), content(undisturbed))
    assert main(arguments(output, standin.grpc_url, "--sample-n", "2")) == 0  # keeps what it has
    assert len(json.loads((output / "results.json").read_text())) == GROUPS


def test_a_target_ends_with_the_group_that_reaches_it(
    standin: LocalServer, tmp_path: Path, undisturbed: Path
) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    target = len(results[0]["kept"]) + len(results[1]["kept"]) + 1
    for name, in_flight in (("one", "1"), ("many", "5")):
        more = ["--target-n", str(target), "--in-flight", in_flight]
        assert main(arguments(tmp_path / name, standin.grpc_url, *more)) == 0
    check_same(content(tmp_path / "one"), content(tmp_path / "many"))
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == results[:3]


def test_broken_panoramas_fail_alone_and_too_few_pairs_are_told(
    standin: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "panoramas"
    folder.mkdir()
    for name in ("city", "forest", "sunset"):
        shutil.copy(PANORAMAS / f"{name}.jpg", folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    more = ["--sample-n", "9", "--in-flight", "3"]
    output = tmp_path / "out"
    for _ in range(2):  # a finished run, run again, says the same
        assert main(arguments(output, standin.grpc_url, *more, folder=folder)) == 1
        summary = json.loads(capsys.readouterr().out)
        assert (summary["groups"], summary["failed"], summary["complete"]) == (3, 3, False)
    failed = json.loads((output / "failed.json").read_text())
    assert all("broken.jpg" in str(entry["panoramas"]) for entry in failed.values())
    assert all("no image" in entry["error"] for entry in failed.values())


def test_another_run_is_not_mixed_in(
    standin: LocalServer, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(undisturbed, standin.grpc_url, "--sample-n", "6", "--seed", "4")) == 2
    assert "other seed" in capsys.readouterr().err
    more = ["--sample-n", "6", "--threshold", "0.5"]
    assert main(arguments(undisturbed, standin.grpc_url, *more)) == 2
    assert "other options" in capsys.readouterr().err


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    paths = sorted(PANORAMAS.glob("*.jpg"))
    one, other = (Dataset(paths, tmp_path, 1, sample_n=1) for _ in range(2))
    with one._owned(), pytest.raises(InvalidInput, match="another run"), other._owned():
        pass


def test_no_server_ends_the_run_with_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panotriton.cli.dataset._CONTACT_S", 0.0)
    assert main(arguments(tmp_path / "out", "127.0.0.1:1")) == 3
    assert "goes on from here" in capsys.readouterr().err


@pytest.fixture
def victim(standin_repository: Path, tmp_path: Path) -> Iterator[Victim]:
    victim = Victim(standin_repository, tmp_path / "server.log")
    yield victim
    victim.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "WATCH_EVERY_S", 1.0)
    monkeypatch.setattr(conversation, "SILENT_S", 2.0)


def test_a_run_outlasts_its_server(
    victim: Victim,
    tmp_path: Path,
    undisturbed: Path,
    impatient: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed and started again, frozen and let go, and started again after a model's process was killed.

    `make fault-check` does it with more seeds.
    """
    output = tmp_path / "out"
    with harmed(victim, output, seed=1) as done:
        assert main(arguments(output, victim.grpc_url)) == 0
    assert done
    assert "paused" in capsys.readouterr().err
    check_same(result(output), content(undisturbed))


@pytest.mark.thorough
def test_patience_ends_with_its_own_code_and_the_run_goes_on_later(
    victim: Victim, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = ["--sample-n", str(GROUPS), "--patience-s", "3"]
    with harmed(victim, output, 2, harms=("kill stub for good",)):
        assert main(arguments(output, victim.grpc_url, *more)) == 5
    said = capsys.readouterr().err
    assert "paused, for 3 s at most" in said
    assert "goes on from here" in said
    assert not (output / "failed.json").exists()
    victim.restart()
    assert main(arguments(output, victim.grpc_url)) == 0
    check_same(result(output), content(undisturbed))


def fail_on_the_second(output: Path, undisturbed: Path) -> None:
    """As if the servers had failed on the second pair of a run that has ended."""
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "group_0002")
    record = output / "records" / "000000" / "000000002.json"
    record.unlink()
    failure = {"panoramas": [], "error": "a model failed", "trouble": "server"}
    record.with_name("000000002.failed.json").write_text(json.dumps(failure))


def test_a_pair_that_a_server_failed_on_keeps_its_place_for_the_next_run(
    standin: LocalServer, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    fail_on_the_second(output, undisturbed)
    assert main(arguments(output, standin.grpc_url)) == 0
    (output / "records" / "000000" / "000000002.failed.json").unlink()
    check_same(content(output), content(undisturbed))

    shutil.rmtree(output)
    fail_on_the_second(output, undisturbed)
    more = ["--sample-n", str(GROUPS), "--retry-failed", "none"]
    assert main(arguments(output, standin.grpc_url, *more)) == 0
    assert not (output / "group_0002").exists()
    assert (output / f"group_{GROUPS + 1:04d}").is_dir()  # in its place
    assert capsys.readouterr().out
