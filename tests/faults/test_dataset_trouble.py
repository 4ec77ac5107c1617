"""Data-set runs whose server is killed, drained, frozen and loses processes, and which are killed themselves:
the result is the undisturbed one.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from panotriton.cli import main
from tests.server import standins
from tests.server.harm import Victim, harmed, made
from tests.server.outputs import check_same, result
from tests.server.test_dataset import arguments

pytestmark = pytest.mark.thorough
SEEDS = int(os.environ.get("PANOTRITON_FAULTS_SEEDS", "3"))
UNREACHED = 3  # the exit code
PAIRS = ("--sample-n", "10")
RUN = """
import sys
from panotriton.cli import main
from panotriton.client import conversation
conversation.WATCH_EVERY_S, conversation.SILENT_S = 1.0, 2.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    victim = Victim(standins.build(folder / "repository"), folder / "server.log")
    yield victim
    victim.close()


@pytest.fixture(scope="module")
def undisturbed(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(output, victim.grpc_url, *PAIRS)) == 0
    return result(output)


@contextmanager
def running(output: Path, url: str, protocol: str) -> Iterator[subprocess.Popen[str]]:
    """The same run in a process of its own, which asks a silent server early."""
    words = arguments(output, url, *PAIRS, "--protocol", protocol)
    with (output.parent / "run.log").open("a") as log:
        process = subprocess.Popen([sys.executable, "-c", RUN, *words], stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_outlasts_its_server_and_itself(
    victim: Victim, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    output = tmp_path / "out"
    protocol = ("grpc", "http")[seed % 2]
    url = victim.grpc_url if protocol == "grpc" else victim.http_url
    draw = random.Random(seed)
    deadline, killed_at, moment = time.monotonic() + 300, draw.randrange(6), draw.uniform(0, 0.3)
    harms = ("kill", "drain", "freeze", "kill a stub")
    with harmed(victim, output, seed, harms, within_s=0.3) as done:
        with running(output, url, protocol) as first:
            while made(output) < killed_at and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(moment)
            assert not first.poll(), (tmp_path / "run.log").read_text()  # or it was quicker
        code = UNREACHED
        for _ in range(3):  # on a busy machine the next server may take longer than a new run waits
            with running(output, url, protocol) as run:
                code = run.wait(300)
            if code != UNREACHED:
                break
        assert code == 0, f"{code}: " + (tmp_path / "run.log").read_text()
    assert len(done) >= 2, done  # on a quick machine the run ends before the others
    check_same(result(output), undisturbed, done)


def test_a_freeze_is_given_up_in_the_stated_time(
    victim: Victim,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten seconds until the server is asked, twenty for its answer: it is frozen for a minute."""
    output = tmp_path / "out"
    with harmed(victim, output, 0, harms=("freeze",), frozen_s=60):
        assert main(arguments(output, victim.grpc_url, *PAIRS)) == 0
    assert "has not said for 20 s that it lives" in capsys.readouterr().err
    check_same(result(output), undisturbed)
