"""The gateway as a process on three ports, before a real tritonserver: old clients, tensors, Ctrl-C."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from panotriton.client.client import Client
from panotriton.pipeline.camera import CAMERA_FIELDS
from panotriton.pipeline.results import Group, Sequence
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer

ROOT = Path(__file__).parent.parent
PANORAMAS = [ROOT / "data" / "panoramas" / f"{name}.jpg" for name in ("courtyard", "interior")]
COMMAND = [sys.executable, "-m", "panotriton", "gateway"]
ANY_PORTS = ["--preprocess-port=0", "--osediff-port=0", "--quality-port=0"]
CROP, BETWEEN, THRESHOLD = 64, 2, 0.5
RUN_THRESHOLD = 0.6  # drops some, by the scores of the networks that stand in there


def example(name: str) -> ModuleType:
    """An example as its user's interpreter would load it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paths = example("gateway_paths")
post = paths.post


class Running:
    """A gateway process: the URL of each service, and the folder that it writes to."""

    def __init__(self, url: str, output: Path, root: Path = PANORAMAS[0].parent) -> None:
        self.output = output
        roots = [f"--root={root}"]
        options = ["--url", url, "--output", str(output), "--crop-size", str(CROP)]
        command = [*COMMAND, *options, *roots, *ANY_PORTS, "--seed=7", "--shared-memory"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.urls: dict[str, str] = {}
        for line in self.process.stdout:
            if line.startswith("ready"):
                return
            service, address = line.split()[:2]
            self.urls[service] = address
        raise AssertionError(f"the gateway ended with {self.process.wait()}")

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Its exit code and last line after a signal."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        return self.process.returncode, rest.strip()


@pytest.fixture(scope="module")
def gateway(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(server.grpc_url, tmp_path_factory.mktemp("gateway") / "out")
    yield running
    assert running.stop(signal.SIGINT) == (0, "stopped")
    assert not list(Path("/dev/shm").glob(f"panotriton_{running.process.pid}_*"))


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="module")
def old_group(gateway: Running) -> list[dict[str, Any]]:
    client = paths.PathClient(gateway.urls, BETWEEN, THRESHOLD)
    made: list[dict[str, Any]] = client.process(PANORAMAS, 1)
    return made


@pytest.fixture(scope="module")
def new_group(gateway: Running, old_group: list[dict[str, Any]], client: Client) -> Group:
    """The same group by one request, with the cameras that the gateway left in params/."""
    params = gateway.output / "group_0001" / "params"
    cameras = np.empty((2, 8, 2, 5))
    for index in np.ndindex(2, 8, 2):
        p, k, side = index
        name = f"{PANORAMAS[p].stem}_yaw{k + 1:02d}_{('left', 'right')[side]}_params.json"
        fields = json.loads((params / name).read_text())
        cameras[index] = [fields[field] for field in CAMERA_FIELDS]
    return client.process(
        *PANORAMAS,
        cameras=cameras,
        crop_size=CROP,
        threshold=0.0,
        interpolations=BETWEEN,
        intermediates=True,
    )


def read(path: str | Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def coded(image: np.ndarray) -> np.ndarray:
    """What JPEG leaves of an image."""
    bgr = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_an_old_client_finishes_a_group_with_the_old_layout(
    gateway: Running, old_group: list[dict[str, Any]]
) -> None:
    kept = len(old_group)
    assert kept > 0
    folder = gateway.output / "group_0001"
    count = {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()}
    assert count == {
        "pairs": 16,
        "params": 2 + 32,
        "osediff": 16,
        "descriptions": 1,
        "interpolated": 2 * kept * (2 + BETWEEN),
        "interpolated_sr": 2 * kept * BETWEEN,
    }
    for entry in old_group:
        for p, panorama in enumerate(("panorama1", "panorama2")):
            images = [Path(path).relative_to(folder) for path in entry[panorama]["images"]]
            stem = f"{PANORAMAS[p].stem}_yaw{entry['interval']:02d}_pair_left"
            assert str(images[0]) == f"interpolated/{stem}.jpg"
            assert str(images[1]) == f"interpolated_sr/{stem}_interp_01.jpg"
            assert len(images) == BETWEEN + 2
        assert entry["panorama2"]["description"]


def test_its_crops_are_those_of_one_request_but_for_jpeg(
    gateway: Running, old_group: list[dict[str, Any]], new_group: Group
) -> None:
    folder = gateway.output / "group_0001"
    for pair in new_group.pairs:
        assert pair.image is not None
        name = f"{PANORAMAS[pair.panorama - 1].stem}_yaw{pair.interval:02d}_pair.jpg"
        np.testing.assert_array_equal(read(folder / "pairs" / name), coded(pair.image))
    for old, new in sequences(old_group, new_group):
        for path, crop in zip(old["images"][1:-1], new.crops or (), strict=True):
            file = folder / "interpolated" / Path(path).name
            np.testing.assert_array_equal(read(file), coded(crop))
        for fields, camera in zip(old["params"], new.cameras, strict=True):
            row = [fields[name] for name in CAMERA_FIELDS]
            np.testing.assert_allclose(row, camera.to_array(), rtol=1e-12)


def test_its_sharp_images_are_those_of_one_request_but_for_jpeg(
    gateway: Running, old_group: list[dict[str, Any]], new_group: Group, client: Client
) -> None:
    """Twice JPEG aside: the files hold what the network makes of the JPEG pairs, to the grey level."""
    folder = gateway.output / "group_0001"
    names = sorted(path.name for path in (folder / "pairs").iterdir())
    pairs = np.stack([read(folder / "pairs" / name) for name in names])
    again = client.infer("osediff", {"IMAGES": pairs}, ("IMAGES_SR",))["IMAGES_SR"]
    for name, sharp, pair in zip(names, again, new_group.pairs, strict=True):
        got = read(folder / "osediff" / name)
        assert cv2.PSNR(got, coded(sharp)) > 40
        assert cv2.PSNR(got, np.ascontiguousarray(pair.sharp)) > 20
    for old, new in sequences(old_group, new_group):
        for path, image in zip(old["images"], new.images, strict=True):
            assert cv2.PSNR(read(path), np.ascontiguousarray(image)) > 20


def sequences(old: list[dict[str, Any]], new: Group) -> Iterator[tuple[dict[str, Any], Sequence]]:
    """The sequences of the intervals that the old client kept, and the same of the new group."""
    intervals = {interval.interval: interval for interval in new.intervals}
    for entry in old:
        for p, sequence in enumerate(intervals[entry["interval"]].sequences, start=1):
            yield entry[f"panorama{p}"], sequence


def tensor(array: np.ndarray, **options: Any) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {
        "tensor": data,
        "shape": array.shape,
        "dtype": array.dtype.name,
        "layout": "NHWC",
    } | options


def array(reply: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(reply["tensor"])
    return np.frombuffer(data, reply["dtype"]).reshape(reply["shape"])


def test_the_tensor_twins_give_the_pipelines_images(
    gateway: Running, new_group: Group, panoramas: tuple[np.ndarray, np.ndarray]
) -> None:
    """Stage by stage from the same cameras; batches of another make-up may round to the next grey level."""
    urls = gateway.urls
    cameras = np.stack([[p.left.to_array(), p.right.to_array()] for p in new_group.pairs])
    cameras = cameras.reshape(2, 8, 2, 5)
    body = tensor(np.stack(panoramas), cameras=cameras.tolist())
    pairs = array(post(f"{urls['preprocess']}/preprocess_tensor", body))
    np.testing.assert_array_equal(pairs, np.stack([pair.image for pair in new_group.pairs]))
    sharp = array(post(f"{urls['osediff']}/super_resolution_tensor", tensor(pairs)))
    expected = np.stack([pair.sharp for pair in new_group.pairs])
    assert np.abs(sharp.astype(int) - expected).max() <= 1
    scores = post(f"{urls['quality']}/evaluate_pairs_tensor", tensor(expected))["results"]
    got = [score["final_score"] or 0.0 for score in scores]
    wanted = np.nan_to_num([pair.quality.final_score for pair in new_group.pairs])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    body = tensor(np.stack(panoramas), cameras=cameras.tolist(), num_interpolations=BETWEEN)
    views = array(post(f"{urls['preprocess']}/interpolate_tensor", body))
    crops = [crop for i in new_group.intervals for s in i.sequences for crop in s.crops or ()]
    np.testing.assert_array_equal(views, np.stack(crops))
    rights = np.stack([i.sequences[1].images[-1] for i in new_group.intervals])
    replies = post(f"{urls['quality']}/generate_descriptions_tensor", tensor(rights))["results"]
    assert [r["description"] for r in replies] == [i.description for i in new_group.intervals]


def test_the_numpy_example(gateway: Running, client: Client) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    sharp = example("gateway_numpy").super_resolve(gateway.urls["osediff"], images)
    expected = client.infer("osediff", {"IMAGES": images}, ("IMAGES_SR",))["IMAGES_SR"]
    assert np.abs(sharp.astype(int) - expected).max() <= 1


def test_the_pytorch_example(gateway: Running) -> None:
    torch = pytest.importorskip("torch")
    images = torch.rand(1, 3, 64, 64)
    sharp = example("gateway_torch").super_resolve(gateway.urls["osediff"], images)
    assert sharp.shape == (1, 3, 128, 128)
    assert sharp.dtype == torch.float32
    assert 0 <= sharp.min() < sharp.max() <= 1


def test_the_tensorflow_example(gateway: Running) -> None:
    tf = pytest.importorskip("tensorflow")
    images = tf.random.uniform((64, 64, 3))
    sharp = example("gateway_tensorflow").super_resolve(gateway.urls["osediff"], images)
    assert sharp.shape == (128, 128, 3)
    assert sharp.dtype == tf.float32


def test_it_listens_on_loopback_and_opens_nothing_else(gateway: Running) -> None:
    assert set(gateway.urls) == {"preprocess", "osediff", "quality"}
    for service, url in gateway.urls.items():
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
            assert json.load(reply) == {"status": "healthy", "service": service}
    body = {"image_path": "/etc/hostname", "group_id": 1}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{gateway.urls['preprocess']}/preprocess_for_group", body)
    with caught.value as reply:
        assert reply.status == 403
        assert "--root" in json.load(reply)["error"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_three(tmp_path: Path, end: signal.Signals) -> None:
    running = Running("127.0.0.1:1", tmp_path / "out")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{running.urls['quality']}/health", timeout=60)
    with caught.value as reply:
        assert reply.status == 503
        assert "panotriton serve" in json.load(reply)["error"]
    assert running.stop(end) == (0, "stopped")


def refused(*arguments: str) -> str:
    command = [*COMMAND, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused("-o", str(tmp_path), *ANY_PORTS, "--quality-port", str(port))
    assert f"127.0.0.1:{port}" in error
    assert "--quality-port" in error


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused("-o", str(tmp_path), "--root", str(tmp_path / "none"), *ANY_PORTS)
    assert f"root {tmp_path}/none: No such file" in error


# Runs of many groups


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of panoramas."""
    root = tmp_path_factory.mktemp("folders")
    for folder, names in (("a", ("city", "forest")), ("b", ("interior", "sunset"))):
        (root / folder).mkdir()
        for name in names:
            shutil.copy(PANORAMAS[0].with_name(f"{name}.jpg"), root / folder)
    return [root / "a", root / "b"]


@pytest.fixture(scope="module")
def whole_run(
    standin: LocalServer, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of three groups that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    running = Running(standin.grpc_url, output, folders[0].parent)
    paths.PathClient(running.urls, BETWEEN, RUN_THRESHOLD).run(output, folders, sample_n=3)
    running.stop(signal.SIGINT)
    return output


def files(output: Path, groups: int) -> dict[str, bytes]:
    """What a run has left of its first groups, by path; the output's own name left out."""
    return {
        str(path.relative_to(output)): path.read_bytes().replace(str(output).encode(), b"out")
        for number in range(1, groups + 1)
        for path in sorted((output / f"group_{number:04d}").rglob("*"))
        if path.is_file()
    }


def kept(output: Path) -> list[int]:
    """How many intervals each group has kept."""
    infos = sorted(output.glob("group_*/group_info.json"))
    return [len(json.loads(info.read_text())["kept"]) for info in infos]


class Stage:
    """A server on one port and a gateway before it, which are killed and started again."""

    def __init__(self, repository: Path, output: Path, root: Path) -> None:
        self._repository, self._output, self._root = repository, output, root
        self.server = BriefServer(repository)

    def __enter__(self) -> Stage:
        self.server.__enter__()
        self.gateway = Running(self.server.grpc_url, self._output, self._root)
        return self

    def __exit__(self, *failure: object) -> None:
        self.gateway.process.kill()
        self.gateway.process.communicate()
        self.server.stop()
        for region in Path("/dev/shm").glob(f"panotriton_{self.gateway.process.pid}_*"):
            region.unlink()  # what a killed gateway cannot remove

    def kill_server(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()

    def restart_server(self) -> None:
        self.server = BriefServer(self._repository, grpc_port=self.server.grpc_port)
        self.server.__enter__()


class Doomed(paths.PathClient):  # type: ignore[misc, name-defined]
    """Kills the gateway and the server while it waits for the answer to one of its calls."""

    def __init__(self, stage: Stage, call: int) -> None:
        super().__init__(stage.gateway.urls, BETWEEN, RUN_THRESHOLD)
        self._stage, self._calls_left = stage, call

    def call(self, service: str, endpoint: str, body: Any) -> list[Any]:
        self._calls_left -= 1
        ask = super().call
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, service, endpoint, body)
            if not self._calls_left:
                time.sleep(0.2)  # into the work
                self._stage.gateway.process.kill()
                os.kill(self._stage.server.pid, signal.SIGKILL)
            return list(answer.result())


@pytest.mark.parametrize(("mode", "call"), [("sample_n", 9), ("target_n", 10)])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(
    standin_repository: Path,
    standin: LocalServer,
    folders: list[Path],
    whole_run: Path,
    tmp_path: Path,
    mode: str,
    call: int,
) -> None:
    counts = kept(whole_run)
    goal = 2 if mode == "sample_n" else counts[0] + 1
    output, root = tmp_path / "out", folders[0].parent
    with Stage(standin_repository, output, root) as stage, pytest.raises(OSError):
        Doomed(stage, call).run(output, folders, **{mode: goal})
    assert [path.parent.name for path in output.glob("*/group_info.json")] == ["group_0001"]
    assert (output / "group_0002" / "error.json").exists()
    first = files(output, 1)
    again = Running(standin.grpc_url, output, root)
    paths.PathClient(again.urls, BETWEEN, RUN_THRESHOLD).run(output, folders, **{mode: goal})
    again.stop(signal.SIGINT)
    done = len(kept(output))
    assert files(output, 1) == first
    assert files(output, done) == files(whole_run, done)
    names = {path.name for path in output.iterdir()}
    assert names == {"results.json", *(f"group_{number:04d}" for number in range(1, done + 1))}
    results = json.loads((output / "results.json").read_text())
    assert [entry["group_id"] for entry in results] == list(range(1, done + 1))
    total = [sum(counts[:number]) for number in range(done + 1)]
    assert done == goal if mode == "sample_n" else total[done - 1] < goal <= total[done]


def test_no_group_number_is_lost_while_the_server_is_away(
    standin_repository: Path, folders: list[Path], whole_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with Stage(standin_repository, output, folders[0].parent) as stage:
        client = paths.PathClient(stage.gateway.urls, BETWEEN, RUN_THRESHOLD)
        client.run(output, folders, sample_n=1)
        stage.kill_server()
        with pytest.raises(urllib.error.HTTPError) as caught:
            client.run(output, folders, sample_n=2)
        with caught.value as reply:
            assert reply.status == 503
            assert int(reply.headers["Retry-After"]) > 0
        assert (output / "group_0002" / "error.json").exists()
        stage.restart_server()
        client.run(output, folders, sample_n=2)
    assert files(output, 2) == files(whole_run, 2)
    assert {path.name for path in output.glob("group_*")} == {"group_0001", "group_0002"}


def test_a_frozen_server_does_not_hold_health(gateway: Running, server: LocalServer) -> None:
    url = f"{gateway.urls['quality']}/health"
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, timeout=5)
        with caught.value as reply:
            assert reply.status == 503
    finally:
        os.kill(server.pid, signal.SIGCONT)
    with urllib.request.urlopen(url, timeout=5) as reply:
        assert reply.status == 200


def test_one_service_has_a_process_of_its_own(tmp_path: Path) -> None:
    command = [*COMMAND, "-o", str(tmp_path), *ANY_PORTS, "--service", "quality"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [next(process.stdout), next(process.stdout)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert lines[0].split()[0] == "quality"
    assert lines[1].startswith("ready")
    assert process.returncode == 0
