"""Groups with which servers die, servers that drain, are full, slow or of other weights."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from panotriton.cli import main
from panotriton.groups.plan import group_seed
from tests.replica import Replica
from tests.server.cluster import free_port, recorded, write_panoramas
from tests.server.outputs import check_same, result

SEED, GROUPS = 3, 12
POISON = 4  # the pair with which a server dies


@pytest.fixture(scope="module")
def panoramas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_panoramas(tmp_path_factory.mktemp("in"), 7)


@pytest.fixture
def start() -> Iterator[Callable[..., Replica]]:
    started: list[Replica] = []

    def one(*arguments: object) -> Replica:
        started.append(Replica(free_port(), *arguments))
        return started[-1]

    yield one
    for replica in started:
        replica.kill()


def run(panoramas: Path, output: Path, servers: list[Replica], *more: str) -> int:
    words = ["dataset", str(panoramas), "-o", str(output), "--seed", str(SEED), "--json"]
    words += ["--url", ",".join(server.url for server in servers)]
    words += ["--crop-size", "64", "--interpolations", "1", "--upscale", "1", "--patience-s", "30"]
    return main([*words, *(more or ("--sample-n", str(GROUPS)))])


@pytest.fixture
def undisturbed(panoramas: Path, tmp_path: Path, start: Callable[..., Replica]) -> Any:
    output = tmp_path / "undisturbed"
    assert run(panoramas, output, [start()], "--sample-n", str(GROUPS + 1)) == 0
    return json.loads((output / "results.json").read_text())


class Nurse:
    """Starts replicas again that have died, as Kubernetes does."""

    def __init__(self, servers: list[Replica]) -> None:
        self.deaths = 0
        self._servers = servers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            for server in self._servers:
                if not server.alive:
                    self.deaths += 1
                    server.kill()
                    server.restart()

    def __enter__(self) -> Nurse:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_server_that_goes_when_its_group_is_made_ends_no_run(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica], undisturbed: Any
) -> None:
    """Between the answer and what else the run wants to know of the server."""
    output = tmp_path / "out"
    servers = [start("--shy", tmp_path / "shy")]
    with Nurse(servers) as nurse:
        assert run(panoramas, output, servers, "--sample-n", str(GROUPS + 1)) == 0
        assert nurse.deaths == 1
    check_same(result(output), result(tmp_path / "undisturbed"))


def test_a_group_with_which_servers_die_is_left_after_three(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica], undisturbed: Any
) -> None:
    output = tmp_path / "out"
    poison = ("--seconds", 0.1, "--poison", group_seed(SEED, POISON))
    servers = [start(*poison) for _ in range(2)]
    records = output / "records" / "000000"
    with Nurse(servers) as nurse:
        assert run(panoramas, output, servers, "--sample-n", str(GROUPS)) == 0
        assert nurse.deaths == 3
    attempts = [json.loads(path.read_text()) for path in sorted(records.glob("*5.attempt-*"))]
    assert len(attempts) == 3
    failed = json.loads((output / "failed.json").read_text())
    assert list(failed) == [str(POISON + 1)]
    letter = failed[str(POISON + 1)]
    assert letter["trouble"] == "server"
    assert letter["attempts"] == attempts
    urls = {server.url for server in servers}
    assert all(a["replica"] in urls and a["time"] and a["error"] for a in attempts)
    results = json.loads((output / "results.json").read_text())
    assert results == [entry for entry in undisturbed if entry["group_id"] != POISON + 1]

    with Nurse(servers) as nurse:  # a finished run, run again, does not try it any more
        assert run(panoramas, output, servers, "--max-failed", "0", "--sample-n", str(GROUPS)) == 6
        assert nurse.deaths == 0


def test_attempts_are_counted_over_restarts(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica]
) -> None:
    output = tmp_path / "out"
    record = output / "records" / "000000" / f"{POISON + 1:09d}.attempt-1.json"
    record.parent.mkdir(parents=True)
    attempt = {"replica": "10.0.0.9:8001", "time": "2026-01-01T00:00:00+00:00", "error": "gone"}
    for number in (1, 2):  # as earlier runs have left them
        record.with_name(f"{POISON + 1:09d}.attempt-{number}.json").write_text(json.dumps(attempt))
    servers = [start("--poison", group_seed(SEED, POISON))]
    with Nurse(servers) as nurse:
        assert run(panoramas, output, servers) == 0
    assert nurse.deaths == 1
    letter = json.loads((output / "failed.json").read_text())[str(POISON + 1)]
    assert letter["attempts"][:2] == [attempt, attempt]
    assert len(letter["attempts"]) == 3


def test_a_server_that_drains_counts_for_nothing(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica], undisturbed: Any
) -> None:
    gate, output = tmp_path / "drains", tmp_path / "out"
    servers = [start("--gate", gate, "--seconds", 0.1)]

    def drain() -> None:
        for share in (2, 6):
            while recorded(output) < share:
                time.sleep(0.02)
            gate.touch()
            time.sleep(2)
            gate.unlink()

    thread = threading.Thread(target=drain)
    thread.start()
    assert run(panoramas, output, servers) == 0
    thread.join()
    assert not list(output.rglob("*.attempt-*"))
    assert json.loads((output / "results.json").read_text()) == undisturbed[:GROUPS]


def test_a_full_server_gets_fewer_at_once(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica], undisturbed: Any
) -> None:
    output = tmp_path / "out"
    servers = [start("--busy", 1, "--seconds", 0.05)]
    more = ["--in-flight", "4", "--sample-n", str(GROUPS)]
    assert run(panoramas, output, servers, *more) == 0
    assert not list(output.rglob("*.attempt-*"))
    assert json.loads((output / "results.json").read_text()) == undisturbed[:GROUPS]


def test_a_replica_of_other_weights_is_left_out_and_so_is_another_run(
    panoramas: Path,
    tmp_path: Path,
    start: Callable[..., Replica],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    ours, other = start("--late", 0.5), start("--weights", "sha256:other")
    assert run(panoramas, output, [ours], "--sample-n", "4") == 0
    assert run(panoramas, output, [ours, other]) == 0
    assert f"{other.url} serves other weights than the run's" in capsys.readouterr().err
    manifest = json.loads((output / "dataset.json").read_text())
    assert manifest["weights"]["osediff"] == "sha256:stand-in"
    assert run(panoramas, output, [other], "--sample-n", "20") == 2
    said = capsys.readouterr().err
    assert "weights: osediff (sha256:stand-in, now sha256:other)" in said


def test_groups_of_a_replica_that_has_turned_to_other_weights_are_made_by_another(
    panoramas: Path,
    tmp_path: Path,
    start: Callable[..., Replica],
    undisturbed: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    turned, ours = start("--turn", 2, "--seconds", 0.05), start("--seconds", 0.1)
    assert run(panoramas, output, [turned, ours], "--sample-n", str(GROUPS + 1)) == 0
    assert f"{turned.url} serves other weights than the run's" in capsys.readouterr().err
    check_same(result(output), result(tmp_path / "undisturbed"))
    assert not list(output.rglob("*.attempt-*"))


def test_a_replica_that_turns_back_is_taken_again(
    panoramas: Path, tmp_path: Path, start: Callable[..., Replica], undisturbed: Any
) -> None:
    output, later = tmp_path / "out", []
    turned = start("--turn", 2, "--seconds", 0.05)

    def turn_back() -> None:
        turned.kill()
        later.append(Replica(int(turned.url.rpartition(":")[2])))

    timer = threading.Timer(3, turn_back)
    timer.start()
    try:  # it is the only one there is
        assert run(panoramas, output, [turned], "--sample-n", str(GROUPS + 1)) == 0
    finally:
        timer.join()
        later[0].kill()
    check_same(result(output), result(tmp_path / "undisturbed"))


def test_a_changed_panorama_is_another_run(
    panoramas: Path,
    tmp_path: Path,
    start: Callable[..., Replica],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, server = tmp_path / "out", start()
    copies = write_panoramas(tmp_path / "in", 7)
    assert run(copies, output, [server], "--sample-n", "4") == 0
    (copies / "p003.png").write_bytes((copies / "p004.png").read_bytes())
    assert run(copies, output, [server]) == 2
    assert "panoramas (1 changed, as " in capsys.readouterr().err
