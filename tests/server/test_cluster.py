"""Data-set runs on a Ray cluster: the result is that of one undisturbed process, whatever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from panotriton.cli import main
from panotriton.server.launch import LocalServer
from tests.replica import Replica
from tests.server.cluster import HARMS, Cluster, replicas, run_harmed, write_panoramas
from tests.server.outputs import check_same, result

REAL = Path(__file__).parent.parent / "data" / "panoramas"
GROUPS = 16
OPTIONS = ["--crop-size", "64", "--interpolations", "1", "--upscale", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ray") / "log")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Replica]]:
    with replicas(4, "--seconds", 0.4) as started:
        yield started


@pytest.fixture(scope="module")
def panoramas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve, and one that is broken: 78 pairs, of which 12 fail."""
    return write_panoramas(tmp_path_factory.mktemp("in"), 12, broken=True)


def arguments(panoramas: Path, output: Path, servers: list[Replica]) -> list[str]:
    run = ["dataset", str(panoramas), "-o", str(output), "--sample-n", str(GROUPS)]
    return [*run, "--url", ",".join(server.url for server in servers), *OPTIONS, "--json"]


@pytest.fixture(scope="module")
def undisturbed(
    panoramas: Path, servers: list[Replica], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """One process."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(panoramas, output, servers)) == 0
    return result(output)


def check_harmed(
    harms: list[str],
    seed: int,
    place: tuple[Path, Path, list[Replica], Cluster],
    undisturbed: dict[str, bytes],
) -> None:
    panoramas, output, servers, cluster = place
    more = ["--engine", "ray", "--address", cluster.address]
    more += ["--workers", "2", "--worker-cpus", "0.25"]
    command = [sys.executable, "-m", "panotriton", *arguments(panoramas, output, servers), *more]
    done = run_harmed(command, output, cluster, servers, harms, seed, GROUPS)
    assert len(done) == len(harms), done
    found = result(output)
    check_same(found, undisturbed, done)
    failed = json.loads(found["failed.json"])
    assert failed
    assert all("broken.png" in entry["error"] for entry in failed.values())
    ids = [entry["group_id"] for entry in json.loads(found["results.json"])]
    assert len(ids) == len(set(ids)) == GROUPS


def test_whatever_is_killed_the_result_is_that_of_one_process(
    panoramas: Path,
    servers: list[Replica],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
) -> None:
    """A worker, a replica and the driver, each killed once at a moment that is seeded."""
    place = (panoramas, tmp_path / "out", servers, cluster)
    check_harmed(list(HARMS), 0, place, undisturbed)


def test_a_real_tritonserver_makes_the_same_groups_for_a_cluster(
    standin: LocalServer, cluster: Cluster, tmp_path: Path
) -> None:
    """Up to a number of kept intervals: groups that were begun beyond it are not in the result."""
    words = ["dataset", str(REAL), "--target-n", "6", "--url", standin.grpc_url, *OPTIONS, "--json"]
    assert main([*words, "-o", str(tmp_path / "local")]) == 0
    more = ["-o", str(tmp_path / "ray"), "--engine", "ray", "--address", cluster.address]
    more += ["--workers", "2", "--worker-cpus", "0.25"]
    command = [sys.executable, "-m", "panotriton", *words, *more]
    done = subprocess.run(command, env=cluster.environment, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    check_same(result(tmp_path / "ray"), result(tmp_path / "local"))
    assert "group_0001/group_info.json" in result(tmp_path / "ray")


@pytest.mark.thorough
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_may_be_killed_at_any_moment(
    panoramas: Path,
    servers: list[Replica],
    cluster: Cluster,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    harm: str,
    seed: int,
) -> None:
    """Three times in one run, at moments that are seeded."""
    place = (panoramas, tmp_path / "out", servers, cluster)
    check_harmed([harm] * 3, seed, place, undisturbed)
