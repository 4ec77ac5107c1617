"""The end of a server: groups in flight finish, newcomers are told at once, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from panotriton.client.client import Client
from panotriton.client.leftovers import find_leftovers
from panotriton.errors import PanotritonError
from panotriton.pipeline.scratch import PREFIX
from panotriton.server.processes import find_stubs
from panotriton.server.supervise import EXIT_GAVE_UP
from tests.faults.conftest import Answer, Serving, group, served, stream

Panoramas = tuple[np.ndarray, np.ndarray]


def prefix(serving: Serving) -> str:
    """What the names of the server's regions begin with."""
    setting = "--backend-config=python,shm-region-prefix-name="
    (name,) = (part for part in serving.server().cmdline() if part.startswith(setting))
    return name.removeprefix(setting)


def test_groups_in_flight_finish_and_newcomers_are_refused(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path) as serving:
        name = prefix(serving)
        undisturbed = group(serving, panoramas)
        calls = [
            Answer(lambda: group(serving, panoramas, prompt="slow")),
            Answer(lambda: stream(serving, panoramas, prompt="slow")),
        ]
        calls[0].join(2)
        serving.process.send_signal(signal.SIGTERM)
        serving.wait_until(lambda: serving.probe("/ready") == (503, "draining\n"), "draining")
        with Client(serving.grpc, retries=0) as client:
            serving.wait_until(lambda: not client.ready(), "the server's own word of it")
        for newcomer in (group, stream):
            with pytest.raises(PanotritonError):
                newcomer(serving, panoramas)
        assert not calls[0].ended(), "newcomers were refused while groups were in flight"
        for call in calls:
            call.join(240)
            assert call.error is None, serving.text()
        assert calls[0].result == undisturbed
        assert serving.process.wait(60) == 0
        assert not list(Path("/dev/shm").glob(f"{name}*"))
        assert "not all requests" not in serving.text()


@pytest.mark.thorough
def test_the_drain_is_bounded(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path, "--drain-s=1") as serving:
        call = Answer(lambda: group(serving, panoramas, prompt="slow"))
        call.join(2)
        serving.process.send_signal(signal.SIGHUP)
        assert serving.process.wait(60) == 0
        call.join(30)
        assert isinstance(call.error, PanotritonError)
        assert "not all requests ended within 1 s" in serving.text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "answered"),
    [("preprocess", (True, True)), ("panorama_stream", (True, False))],
)
def test_a_drain_waits_for_no_dead_process_and_loses_nobody_else(
    standin_repository: Path,
    panoramas: Panoramas,
    tmp_path: Path,
    model: str,
    answered: tuple[bool, bool],
) -> None:
    """answered: whether the group is, and the stream."""
    with served(standin_repository, tmp_path, "--drain-s=300") as serving:
        calls = [
            Answer(lambda: group(serving, panoramas, prompt="slow")),
            Answer(lambda: stream(serving, panoramas, prompt="slow")),
        ]
        calls[0].join(2)
        serving.process.send_signal(signal.SIGTERM)
        serving.wait_until(lambda: "stopping" in serving.text(), "the drain's begin")
        serving.kill_stubs(model)
        assert serving.process.wait(120) == 0, serving.text()
        for call in calls:
            call.join(5)
            assert call.ended(), serving.text()
            assert call.error is None or isinstance(call.error, PanotritonError)
        errors = [call.error for call in calls]
        assert tuple(error is None for error in errors) == answered, (errors, serving.text())
        assert ("; ending without them" in serving.text()) == (not all(answered))


@pytest.mark.thorough
def test_a_drain_of_a_frozen_server_ends(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    """One that is frozen for seconds alone loses nothing."""
    with served(standin_repository, tmp_path) as serving:
        call = Answer(lambda: group(serving, panoramas, prompt="slow"))
        call.join(2)
        serving.process.send_signal(signal.SIGTERM)
        serving.wait_until(lambda: "stopping" in serving.text(), "the drain's begin")
        serving.server().suspend()
        time.sleep(8)
        serving.server().resume()
        call.join(120)
        assert call.error is None, serving.text()
        assert serving.process.wait(60) == 0
    with served(standin_repository, tmp_path) as serving:
        call = Answer(lambda: group(serving, panoramas, prompt="slow"))
        call.join(1)
        serving.server().suspend()
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(serving.patience_s) == 0, serving.text()
        assert "stopped for 15 s" in serving.text()
        call.join(5)
        assert isinstance(call.error, PanotritonError)


@pytest.mark.thorough
def test_a_second_signal_ends_at_once(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path) as serving:
        name = prefix(serving)
        call = Answer(lambda: stream(serving, panoramas, prompt="slow"))
        call.join(2)
        serving.process.send_signal(signal.SIGINT)
        serving.wait_until(lambda: "stopping" in serving.text(), "the drain's begin")
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(30) == 130
        call.join(30)
        assert isinstance(call.error, PanotritonError)
        assert not list(Path("/dev/shm").glob(f"{name}*"))


@pytest.mark.thorough
def test_a_server_that_dies_again_and_again_is_given_up(
    standin_repository: Path, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path, "--restarts=1") as serving:
        first = serving.server().pid
        os.kill(first, signal.SIGKILL)
        serving.wait_until(lambda: "serving again" in serving.text(), "the second start")
        os.kill(serving.server().pid, signal.SIGKILL)
        assert serving.process.wait(60) == EXIT_GAVE_UP
        assert "given up after 1 start" in serving.text()


def test_nothing_stays_when_launcher_and_server_are_killed_at_once(
    standin_repository: Path, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path) as serving:
        server, name = serving.server(), prefix(serving)
        stubs = [stub.pid for stub in find_stubs(server.pid)]
        asleep = stubs.pop()  # which cannot end by itself
        os.kill(asleep, signal.SIGSTOP)
        os.kill(serving.process.pid, signal.SIGKILL)
        os.kill(server.pid, signal.SIGKILL)
        serving.process.wait()
        serving.wait_until(
            lambda: not {stub.pid for stub in find_stubs()}.intersection(stubs), "the stubs' end"
        )
        regions = list(Path("/dev/shm").glob(f"{name}*"))
        assert regions, "what the doctor is for"
        time.sleep(6)  # it leaves files alone that are younger than 5 s
        before = set(Path(tempfile.gettempdir()).glob(f"{PREFIX}server-*"))
        fixed = subprocess.run(
            [sys.executable, "-m", "panotriton", "doctor", "--fix", "--url", "localhost:1"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert fixed.returncode == 0, fixed.stdout
        assert asleep not in {stub.pid for stub in find_stubs()}
        assert not [path for path in regions if path.exists()]
        assert not {left.path for left in find_leftovers()}.intersection(regions)
        assert [folder for folder in before if not folder.exists()], "its temporary folder"
