"""The data-set job's shard: every group exactly once, back-pressure, resuming, other replicas."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from panotriton import ConnectError, InferenceFailed, PanotritonError
from panotriton.errors import brief
from panotriton.server.launch import LocalServer
from tests.deploy.charts import CHART, ROOT

SCRIPT = CHART / "files" / "shard.py"
# The client looks at a file's header before it sends it.
PICTURE = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def shard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shard", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["shard"] = module
    spec.loader.exec_module(module)
    return module


def test_the_shards_divide_all_pairs(shard: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("".join(f"a{n}.jpg\tb{n}.jpg\n" for n in range(10)))
    pairs = shard.read_pairs(tmp_path / "pairs.tsv")
    parts = [shard.shard_of(pairs, index, 3) for index in range(3)]
    assert sorted(p.group_id for part in parts for p in part) == list(range(1, 11))
    assert pairs[0].first == tmp_path / "a0.jpg"


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a.jpg\tb.jpg\na.jpg b.jpg\n")
    command = [sys.executable, SCRIPT, "--server=127.0.0.1:1", "--shards=1"]
    command += [f"--pairs={tmp_path}/pairs.tsv", f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # the Job's podFailurePolicy does not try again
    assert "pairs.tsv:2 is 'a.jpg b.jpg'; expected two paths with one tab between" in done.stderr


def test_no_replica_is_a_failure_that_a_retry_may_mend(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a.jpg\tb.jpg\n")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(PICTURE)
    command = [sys.executable, SCRIPT, "--server=127.0.0.1:1", "--shards=1", "--patience-s=1"]
    command += [f"--pairs={tmp_path}/pairs.tsv", f"--output={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gave up after 1 s" in done.stderr
    assert not (tmp_path / "out" / "shard-0000" / "finished").exists()


PIPELINE = """
import json

import numpy as np
import triton_python_backend_utils as pb

TYPES = {"TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_FP64": np.float64}


class TritonPythonModel:
    \"\"\"Answers as if no interval were kept; a file that ends in "broken" is refused.\"\"\"

    def initialize(self, args):
        self.outputs = json.loads(args["model_config"])["output"]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        if pb.get_input_tensor_by_name(request, "ENCODED_1").as_numpy().item().endswith(b"broken"):
            error = pb.TritonError("ENCODED_1 is broken", pb.TritonError.INVALID_ARG)
            return pb.InferenceResponse(error=error)
        return pb.InferenceResponse([self._zeros(output) for output in self.outputs])

    def _zeros(self, output):
        dims = [int(d) for d in output["dims"]]
        shape = [0 if d < 0 and i == 0 else abs(d) * (8 if d < 0 else 1) for i, d in enumerate(dims)]
        if output["data_type"] == "TYPE_STRING":
            return pb.Tensor(output["name"], np.full(shape, b"", np.object_))
        values = np.zeros(shape, TYPES[output["data_type"]])
        if values.dtype == np.float64:
            values[...] = (0, 0, 0, 90, 0)  # a camera
        return pb.Tensor(output["name"], values)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A real server with a stand-in for the ensemble, of the same inputs and outputs."""
    repository = tmp_path_factory.mktemp("repository")
    config = (ROOT / "model_repository" / "panorama_encoded" / "config.pbtxt").read_text()
    config = config[: config.index("ensemble_scheduling")].replace(
        'platform: "ensemble"', 'backend: "python"'
    )
    (repository / "panorama_encoded" / "1").mkdir(parents=True)
    (repository / "panorama_encoded" / "config.pbtxt").write_text(config)
    (repository / "panorama_encoded" / "1" / "model.py").write_text(PIPELINE)
    with LocalServer(repository) as running:
        yield running


def test_a_shard_works_through_its_pairs_and_resumes(server: LocalServer, tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(6)]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(PICTURE + (b"broken" if n == 2 else b""))
    (tmp_path / "pairs.tsv").write_text("".join(f"{name}\tother.jpg\n" for name in names))
    (tmp_path / "other.jpg").write_bytes(PICTURE)
    command = [sys.executable, SCRIPT, f"--server={server.grpc_url}", "--shards=2", "--index=0"]
    command += [f"--pairs={tmp_path}/pairs.tsv", f"--output={tmp_path}/out"]
    told = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told += [line for line in done.stdout.splitlines() if line.startswith("shard")]
    folder = tmp_path / "out" / "shard-0000"
    results = json.loads((folder / "results.json").read_text())
    assert [entry["group_id"] for entry in results] == [1, 5]
    failures = json.loads((folder / "failures.json").read_text())
    assert failures == {"3": f"{brief(tmp_path / '2.jpg')} is broken"}
    assert told == [
        "shard 0 of 2: 3 to do, 0 done before",
        "shard 0: 2 done, 1 failed",
        "shard 0 of 2: 1 to do, 2 done before",
        "shard 0: 0 done, 1 failed",
    ]


@pytest.mark.parametrize(("replicas", "shards"), [(200, 25), (190, 25), (3, 8), (1, 1), (7, 3)])
def test_the_shares_cover_every_replica_once(shard: ModuleType, replicas: int, shards: int) -> None:
    names = [f"r{n:03d}" for n in range(replicas)]
    held: Counter[str] = Counter()
    for rank in range(shards):
        part = shard.share(names, rank, shards)
        assert sum(part.values()) == pytest.approx(replicas / shards)
        for name, weight in part.items():
            held[name] += weight
    assert held == {name: pytest.approx(1.0) for name in names}


def test_finished_shards_leave_their_replicas_to_the_others(
    shard: ModuleType, tmp_path: Path
) -> None:
    for index in (0, 2):
        (tmp_path / f"shard-{index:04d}").mkdir()
        (tmp_path / f"shard-{index:04d}" / "finished").touch()
    assert shard.unfinished(tmp_path, 4, 1) == [1, 3]
    assert shard.unfinished(tmp_path, 4, 2) == [1, 2, 3]  # applied anew, with more pairs


def test_never_more_in_flight_than_the_window(shard: ModuleType) -> None:
    pairs = [shard.PanoramaPair(n, Path("a"), Path("b")) for n in range(40)]
    lock, now, peak = threading.Lock(), 0, 0
    finished: list[int] = []

    def work(pair: object) -> int:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return 0

    shard.run(
        pairs,
        work,
        lambda pair, group: finished.append(pair.group_id),
        lambda pair, error: pytest.fail(str(error)),
        window=lambda: 5,
        most=8,
    )
    assert sorted(finished) == list(range(40))
    assert peak == 5


def test_a_refused_group_does_not_stop_the_others(shard: ModuleType) -> None:
    pairs = [shard.PanoramaPair(n, Path("a"), Path("b")) for n in range(5)]
    done: list[int] = []
    failed: list[int] = []

    def work(pair: object) -> int:
        if pair.group_id == 3:  # type: ignore[attr-defined]
            raise InferenceFailed("osediff: broken")
        return 0

    shard.run(
        pairs,
        work,
        lambda pair, group: done.append(pair.group_id),
        lambda pair, error: failed.append(pair.group_id),
        window=lambda: 2,
        most=2,
    )
    assert (sorted(done), failed) == ([0, 1, 2, 4], [3])


def test_a_lost_replica_rests_and_another_answers(shard: ModuleType) -> None:
    replicas = shard.Replicas(lambda: ["dead", "live"], lambda: (0, 1), per_replica=2)
    used = []
    for _ in range(6):
        try:
            with replicas.borrow() as address:
                used.append(address)
                if address == "dead":
                    raise ConnectError("gone")
        except PanotritonError:
            continue
    assert used.count("dead") == 1
    assert used.count("live") == 5
    assert replicas.window() == 4


def test_what_results_json_has_is_not_done_again(shard: ModuleType, tmp_path: Path) -> None:
    assert shard.finished(tmp_path) == set()
    (tmp_path / "results.json").write_text(json.dumps([{"group_id": 1}, {"group_id": 4}]))
    assert shard.finished(tmp_path) == {1, 4}
