"""Data-set runs whose server is killed, frozen and loses processes: the result is the undisturbed one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from panotriton.cli import main
from panotriton.client import conversation
from tests.server import standins
from tests.server.harm import Victim, harmed
from tests.server.test_dataset import arguments, content

pytestmark = pytest.mark.thorough
SEEDS = int(os.environ.get("PANOTRITON_FAULTS_SEEDS", "6"))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    victim = Victim(standins.build(folder / "repository"), folder / "server.log")
    yield victim
    victim.close()


@pytest.fixture(scope="module")
def undisturbed(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(output, victim.grpc_url)) == 0
    return content(output)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_outlasts_its_server(
    victim: Victim,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(conversation, "WATCH_EVERY_S", 1.0)
    monkeypatch.setattr(conversation, "SILENT_S", 2.0)
    output = tmp_path / "out"
    protocol = ("grpc", "http")[seed % 2]
    url = victim.grpc_url if protocol == "grpc" else victim.http_url
    more = ["--sample-n", "6", "--protocol", protocol]
    with harmed(victim, output, seed) as done:
        assert main(arguments(output, url, *more)) == 0
    assert done
    assert content(output) == undisturbed, done


def test_a_freeze_is_given_up_in_the_stated_time(
    victim: Victim,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten seconds until the server is asked, twenty for its answer: it is frozen for a minute."""
    output = tmp_path / "out"
    with harmed(victim, output, 0, harms=("freeze",), frozen_s=60):
        assert main(arguments(output, victim.grpc_url)) == 0
    assert "has not said for 20 s that it lives" in capsys.readouterr().err
    assert content(output) == undisturbed
