"""The containers' entrypoint, run for real outside a container, on the pip-carried server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from panotriton import Camera, Client, ConnectError, PanotritonError, Tls
from panotriton.server.launch import find_installation
from panotriton.server.processes import find_stubs
from panotriton.server.supervise import EXIT_GAVE_UP
from tests.deploy.certificates import certificates
from tests.deploy.charts import ROOT
from tests.server import standins

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
HEALTHCHECK = ROOT / "docker" / "healthcheck.py"
AHEAD = Camera(0, 0, 0, 90, 0)
ADMIN = {"panotriton-admin": "s3cret"}


@dataclass
class Running:
    process: subprocess.Popen[str]
    http: str
    metrics: str
    log: Path
    health: int
    grpc: int


# Not among those that the kernel gives to whoever connects somewhere or asks for any: such a one may be taken
# again before the server, which loads its models first, comes to listen on it.
PORTS = iter(random.sample(range(12_000, 32_000), 4000))


def free_port() -> int:
    """One that nobody listens on, and another each time."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the CPU image sets, for a server laid out beside the test."""
    folder = tmp_path_factory.mktemp("opt")
    found = find_installation()
    assert found.backends
    assert found.stub
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(found.backends / "python" / name, python)
    shutil.copy2(found.stub, python)
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(map(str, found.library_path)),
        "TRITONSERVER": str(found.binary),
        "TRITON_BACKENDS": str(folder / "backends"),
        "PANOTRITON_REPOSITORY": str(ROOT / "model_repository"),
        "PANOTRITON_LOAD_MODELS": "decode select",
        "PANOTRITON_HOST": "127.0.0.1",
        "PANOTRITON_SHM_MIN_BYTES": "1048576",
        "PANOTRITON_EXIT_TIMEOUT_S": "10",
    }


@pytest.fixture(scope="module")
def running(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "key").write_text("s3cret\n")
    server = start(environment | {"PANOTRITON_ADMIN_KEY_FILE": str(folder / "key")}, folder)
    try:
        wait_ready(server)
        yield server
    finally:
        stop(server)


def start(environment: dict[str, str], folder: Path, *arguments: str) -> Running:
    http, grpc, metrics, health = (free_port() for _ in range(4))
    ports = {"HTTP": http, "GRPC": grpc, "METRICS": metrics, "HEALTH": health}
    environment = environment | {f"PANOTRITON_{k}_PORT": str(v) for k, v in ports.items()}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["sh", str(ENTRYPOINT), *arguments],
            env=environment,
            cwd="/",
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    urls = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{metrics}/metrics"
    return Running(process, *urls, log, health, grpc)


def wait_ready(server: Running) -> None:
    deadline = time.monotonic() + 60
    while status(server, "v2/health/ready") != 200:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.1)


def stop(server: Running) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def status(
    server: Running, path: str, data: bytes | None = None, headers: dict[str, str] | None = None
) -> int:
    """The HTTP status of a call; 0 where nobody listens yet."""
    request = urllib.request.Request(f"{server.http}/{path}", data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def children(server: Running) -> list[int]:
    task = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return [int(child) for child in task.read_text().split()]


def test_it_becomes_the_servers_supervisor(running: Running) -> None:
    """The process that gets the container's signals is the supervisor itself, not a shell before it."""
    assert Path(f"/proc/{running.process.pid}/exe").readlink().name.startswith("python")
    (server,) = children(running)
    assert Path(f"/proc/{server}/exe").readlink().name == "tritonserver"


def test_inference_and_health_are_open(running: Running) -> None:
    assert status(running, "v2/models/decode/config") == 200
    assert status(running, "v2/models/decode/stats") == 200


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("v2/repository/index", b"{}"),
        ("v2/repository/models/decode/unload", b"{}"),
        ("v2/repository/models/decode/load", b"{}"),
        ("v2/systemsharedmemory/status", None),
        ("v2/systemsharedmemory/region/r/register", b'{"key": "/r", "offset": 0, "byte_size": 1}'),
        ("v2/cudasharedmemory/status", None),
        ("v2/trace/setting", None),
        ("v2/logging", None),
    ],
)
def test_control_and_shared_memory_need_the_key(
    running: Running, path: str, data: bytes | None
) -> None:
    assert status(running, path, data) == 403
    assert status(running, path, data, {"panotriton-admin": "guess"}) == 403


def test_the_key_opens_them(running: Running) -> None:
    assert status(running, "v2/repository/index", b"{}", ADMIN) == 200
    assert status(running, "v2/systemsharedmemory/status", None, ADMIN) == 200


def test_grpc_is_restricted_as_http_is(running: Running) -> None:
    import tritonclient.grpc as triton  # noqa: PLC0415
    from tritonclient.utils import InferenceServerException  # noqa: PLC0415

    command = Path(f"/proc/{running.process.pid}/cmdline").read_bytes().split(b"\0")
    port = next(part for part in command if part.startswith(b"--grpc-port=")).split(b"=")[1]
    with triton.InferenceServerClient(f"127.0.0.1:{port.decode()}") as client:
        assert client.is_model_ready("decode")
        with pytest.raises(InferenceServerException, match="restricted"):
            client.unload_model("decode")
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_system_shared_memory_status()
        headers = {"triton-grpc-protocol-panotriton-admin": "s3cret"}
        assert client.get_model_repository_index(headers=headers).models


def test_metrics_have_quantiles(running: Running) -> None:
    with urllib.request.urlopen(running.metrics, timeout=10) as reply:
        assert "nv_inference_request_summary_us" in reply.read().decode()


def test_the_log_carries_iso_times(running: Running) -> None:
    assert f"{time.gmtime().tm_year}-" in running.log.read_text()


def test_the_healthcheck_follows_the_server(running: Running) -> None:
    while ask_supervisor(running, "ready") != 200:  # it looks twice a second
        assert running.process.poll() is None
        time.sleep(0.1)

    def check(port: int) -> subprocess.CompletedProcess[str]:
        environment = {"PANOTRITON_HEALTH_PORT": str(port)}
        return subprocess.run(
            [sys.executable, HEALTHCHECK],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    healthy = check(running.health)
    assert healthy.returncode == 0, healthy.stderr
    assert check(free_port()).returncode == 1


def test_sigterm_ends_it_cleanly_and_nobody_guesses_the_key(
    environment: dict[str, str], tmp_path: Path
) -> None:
    server = start(environment | {"PANOTRITON_LOAD_MODELS": "select"}, tmp_path)
    try:
        wait_ready(server)
        assert status(server, "v2/repository/index", b"{}") == 403
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    finally:
        stop(server)


# In place of the half second that a stand-in takes: as long as it is not let go.
CLOSED = """
def closed():
    from pathlib import Path
    Path("{begun}").touch()
    while not Path("{let_go}").exists():
        time.sleep(0.05)
"""


def test_a_group_in_flight_outlives_sigterm_and_newcomers_are_refused(
    environment: dict[str, str], tmp_path: Path
) -> None:
    repository = standins.build(tmp_path / "repository")
    begun, let_go = tmp_path / "begun", tmp_path / "let_go"
    model = repository / "osediff_unet" / "1" / "model.py"
    code = model.read_text().replace("time.sleep(0.5)", "closed()")
    model.write_text(code + CLOSED.format(begun=begun, let_go=let_go))
    own = {
        "PANOTRITON_REPOSITORY": str(repository),
        "PANOTRITON_LOAD_MODELS": "*",
        "PANOTRITON_EXIT_TIMEOUT_S": "240",
    }
    server = start(environment | own, tmp_path)
    panoramas = np.zeros((2, 64, 128, 3), np.uint8)
    options = {"seed": 7, "crop_size": 64, "interpolations": 0}
    try:
        wait_ready(server)
        with Client(f"127.0.0.1:{server.grpc}", retries=0) as client, ThreadPoolExecutor(1) as pool:
            while ask_supervisor(server, "ready") != 200:
                time.sleep(0.1)
            group = pool.submit(client.process, *panoramas, prompt="slow", **options)
            while not begun.exists():
                assert not group.done()
                time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            while client.ready():
                time.sleep(0.1)
            with Client(client.url, retries=0) as newcomer, pytest.raises(PanotritonError):
                newcomer.process(*panoramas, **options)
            assert not group.done(), server.log.read_text()
            let_go.touch()
            assert len(group.result(240).pairs) == 16
        assert server.process.wait(60) == 0
    finally:
        stop(server)


def test_a_front_asks_a_pool_for_what_it_does_not_load(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """As the chart starts both: the pool with its networks alone, the front with all the others."""
    own = {"PANOTRITON_REPOSITORY": str(standins.build(tmp_path / "repository"))}
    networks = "osediff_unet osediff_vae_decoder"
    (tmp_path / "pool").mkdir()
    pool = start(environment | own | {"PANOTRITON_LOAD_MODELS": networks}, tmp_path / "pool")
    place = f"{networks.replace(' ', ',')}=127.0.0.1:{pool.grpc}"
    own |= {"PANOTRITON_LOAD_MODELS": "*", "PANOTRITON_PLACE": place}
    front = start(environment | own, tmp_path)
    try:
        wait_ready(pool)
        wait_ready(front)
        with Client(f"127.0.0.1:{front.grpc}") as client:
            sharp = client.upscale(np.zeros((64, 64, 3), np.uint8))
            assert sharp.numpy().shape == (128, 128, 3)
        assert asked(pool, "osediff_unet")
        assert status(front, "v2/models/osediff/ready") == 200
        assert status(front, "v2/models/osediff_unet/ready") != 200
    finally:
        stop(front)
        stop(pool)


def asked(server: Running, model: str) -> bool:
    """Whether a model has been asked anything yet."""
    with urllib.request.urlopen(f"{server.http}/v2/models/{model}/stats", timeout=10) as reply:
        return bool(json.load(reply)["model_stats"][0]["execution_count"])


def test_a_dead_model_is_loaded_anew_and_a_dead_server_ends_the_container(
    environment: dict[str, str], tmp_path: Path
) -> None:
    server = start(environment | {"PANOTRITON_LOAD_MODELS": "select"}, tmp_path)

    def wait_supervised() -> None:
        deadline = time.monotonic() + 60
        while ask_supervisor(server, "ready") != 200:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.1)

    try:
        wait_supervised()
        (tritonserver,) = children(server)
        (stub,) = find_stubs(tritonserver)
        stub.kill()
        while "loaded anew" not in server.log.read_text():
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.1)
        wait_supervised()
        os.kill(tritonserver, signal.SIGKILL)
        assert server.process.wait(20) == EXIT_GAVE_UP
        assert "ended by itself, killed by SIGKILL" in server.log.read_text()
    finally:
        stop(server)


def ask_supervisor(server: Running, probe: str) -> int:
    """The status of one of its probes; 0 where it does not listen yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.health}/{probe}", timeout=10) as it:
            return int(it.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def test_local_callers_may_share_memory_when_it_is_said(
    environment: dict[str, str], tmp_path: Path
) -> None:
    local = {"PANOTRITON_CLIENT_SHM": "true", "PANOTRITON_LOAD_MODELS": "select"}
    server = start(environment | local, tmp_path, "--log-verbose=1")
    try:
        wait_ready(server)
        assert status(server, "v2/systemsharedmemory/status") == 200
        assert status(server, "v2/repository/index", b"{}") == 403
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().split(b"\0")
        assert command[-2] == b"--log-verbose=1"
    finally:
        stop(server)


def flags(environment: dict[str, str], tmp_path: Path, known: str) -> list[str]:
    """What the entrypoint would start a server with that knows these flags."""
    server = tmp_path / "tritonserver"
    server.write_text(
        f'#!/bin/sh\n[ "$1" = --help ] && echo "{known}" && exit 1\nprintf "%s\\n" "$@"\n'
    )
    server.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ENTRYPOINT), "--id=x"],
        env=environment | {"TRITONSERVER": str(server)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_newer_releases_get_their_flags(environment: dict[str, str], tmp_path: Path) -> None:
    old = flags(environment, tmp_path, "  --http-port <integer>")
    assert not [flag for flag in old if "max-input-size" in flag or "client-shm" in flag]
    known = "  --http-max-input-size <integer>\n  --allow-client-shm <boolean>"
    new = flags(environment, tmp_path, known)
    assert set(new) - set(old) >= {"--http-max-input-size=1073741824", "--allow-client-shm=false"}


def test_what_a_config_leaves_out_is_not_guessed_and_pools_are_bounded(
    environment: dict[str, str], tmp_path: Path
) -> None:
    old = flags(environment, tmp_path, "")
    assert {"--disable-auto-complete-config", "--grpc-infer-allocation-pool-size=4"} <= set(old)
    assert not [flag for flag in old if "response-pool" in flag]
    new = flags(environment, tmp_path, "  --grpc-max-response-pool-size <integer>")
    assert "--grpc-max-response-pool-size=4" in new


def network(folder: Path, kind: str) -> Path:
    """A repository of one network."""
    (folder / "osediff_unet").mkdir(parents=True)
    (folder / "osediff_unet" / "config.pbtxt").write_text(
        f'backend: "onnxruntime"\ninstance_group [ {{ kind: KIND_{kind} count: 1 }} ]\n'
    )
    return folder


def begun(environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What the entrypoint says before a server that only ends."""
    server = tmp_path / "tritonserver"
    server.write_text("#!/bin/sh\nexit 0\n")
    server.chmod(0o755)
    return subprocess.run(
        ["sh", str(ENTRYPOINT)],
        env=environment | {"TRITONSERVER": str(server)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_gpu_that_no_network_would_use_is_no_start(
    environment: dict[str, str], tmp_path: Path
) -> None:
    asked = environment | {"PANOTRITON_GPU": "true"}
    idle = asked | {"PANOTRITON_REPOSITORY": str(network(tmp_path / "idle", "CPU"))}
    done = begun(idle, tmp_path)
    assert done.returncode == 2
    assert "is KIND_CPU and leaves the GPU idle: panotriton export --preset small" in done.stderr
    assert "--provider cuda" in done.stderr
    assert "GPU idle" not in begun(idle | {"PANOTRITON_GPU": "false"}, tmp_path).stderr
    used = asked | {"PANOTRITON_REPOSITORY": str(network(tmp_path / "used", "GPU"))}
    assert "GPU idle" not in begun(used, tmp_path).stderr


def test_numpy_2_is_no_start(environment: dict[str, str], tmp_path: Path) -> None:
    package = tmp_path / "packages" / "numpy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.0.0"\n')
    done = begun(environment | {"PYTHONPATH": str(package.parent)}, tmp_path)
    assert done.returncode == 2
    assert "python3 -m pip install 'numpy<2'" in done.stderr


def test_a_limit_between_steps_goes_to_servers_that_know_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment = environment | {"PANOTRITON_MAX_INFLIGHT": "16", "TMPDIR": str(tmp_path)}
    done = begun(environment, tmp_path)
    assert "knows no max_inflight_requests" in done.stderr
    assert not (tmp_path / "panotriton-repository").exists()
    for _ in range(2):  # a container that is started again finds what it made
        started = flags(environment, tmp_path, "max_inflight_requests")
    (chosen,) = (f.partition("=")[2] for f in started if f.startswith("--model-repository="))
    config = Path(chosen, "panorama", "config.pbtxt").read_text()
    read = text_format.Parse(config, model_config_pb2.ModelConfig())
    assert read.ensemble_scheduling.max_inflight_requests == 16
    served = {"PANOTRITON_REPOSITORY": chosen, "PANOTRITON_LOAD_MODELS": "preprocess"}
    server = start(environment | served | {"PANOTRITON_MAX_INFLIGHT": "0"}, tmp_path)
    try:
        wait_ready(server)  # its models are links there
    finally:
        stop(server)


@pytest.mark.parametrize("mutual", ["false", "true"])
def test_tls_and_callers_certificates(
    environment: dict[str, str], tmp_path: Path, mutual: str
) -> None:
    certificates(tmp_path)
    tls = {"PANOTRITON_TLS_FOLDER": str(tmp_path), "PANOTRITON_TLS_MUTUAL": mutual}
    tls |= {"PANOTRITON_LOAD_MODELS": "crop"}
    server = start(environment | tls, tmp_path)
    try:
        wait_ready(server)
        url = f"localhost:{server.grpc}"
        caller = Tls(tmp_path / "ca.crt", tmp_path / "caller.crt", tmp_path / "caller.key")
        with Client(url, tls=caller) as client:
            crops = client.crop(np.zeros((64, 128, 3), np.uint8), [AHEAD], size=64)
            assert len(crops) == 1
        for stranger in (None, Tls(tmp_path / "ca.crt"))[: 2 if mutual == "true" else 1]:
            with Client(url, tls=stranger, retries=0) as client, pytest.raises(ConnectError):
                client.crop(np.zeros((64, 128, 3), np.uint8), [AHEAD], size=64)
    finally:
        stop(server)


def test_all_models_and_tracing_on_demand(environment: dict[str, str], tmp_path: Path) -> None:
    del (environment := dict(environment))["PANOTRITON_LOAD_MODELS"]
    plain = flags(environment, tmp_path, "")
    assert "--load-model=*" in plain
    assert "--model-control-mode=explicit" in plain
    assert not [flag for flag in plain if "trace-config" in flag]
    url = "http://otel:4318/v1/traces"
    traced = flags(environment | {"PANOTRITON_OTLP_URL": url}, tmp_path, "")
    assert f"--trace-config=opentelemetry,url={url}" in traced
    assert "--trace-config=rate=100" in traced
    assert traced[-1] == "--id=x"


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("PANOTRITON_REPOSITORY", "/nowhere", "no model in /nowhere: expected NAME/config.pbtxt"),
        ("PANOTRITON_SHM_MIN_BYTES", "1000000000000000", "--shm-size=2g"),
        ("PANOTRITON_HTTP_PORT", "http", "PANOTRITON_HTTP_PORT is 'http'; expected a whole number"),
        ("PANOTRITON_CLIENT_SHM", "yes", "expected true or false"),
        ("PANOTRITON_ADMIN_KEY_FILE", "/nowhere", "missing or empty"),
        ("PANOTRITON_ADMIN_KEY_FILE", "/etc/passwd", "other characters than A-Z"),
        ("TRITONSERVER", "/nowhere", "not an executable"),
        ("PANOTRITON_PLACE", "qwen=qwen", "'qwen=qwen' is not NAME[,NAME]=HOST:PORT"),
        ("PANOTRITON_PLACE", "osediff=a:8001", "'osediff' cannot be placed"),
        ("PANOTRITON_GPU", "yes", "expected true or false or auto"),
        ("PANOTRITON_TLS_FOLDER", "/nowhere", "/nowhere/tls.crt is missing or empty"),
    ],
)
def test_a_wrong_setting_is_named(
    environment: dict[str, str], setting: str, value: str, says: str
) -> None:
    done = subprocess.run(
        ["sh", str(ENTRYPOINT)],
        env=environment | {setting: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_an_object_store_is_left_to_the_server(environment: dict[str, str], tmp_path: Path) -> None:
    started = flags(environment | {"PANOTRITON_REPOSITORY": "s3://bucket/models"}, tmp_path, "")
    assert "--model-repository=s3://bucket/models" in started


def test_every_setting_that_a_deployment_makes_is_read() -> None:
    """One that the entrypoint did not know would be lost in silence."""
    read = set(re.findall(r"\$\{(PANOTRITON_\w+)", ENTRYPOINT.read_text()))
    folder = ROOT / "docker"
    deployments = (folder / "chart" / "templates" / "_pod.tpl", folder / "compose.yaml")
    for path in deployments:
        given = set(re.findall(r"PANOTRITON_[A-Z_]+", path.read_text()))
        assert given
        assert given <= read, path


def test_only_the_models_asked_for_are_loaded(running: Running) -> None:
    request = urllib.request.Request(f"{running.http}/v2/repository/index", b"{}", ADMIN)
    with urllib.request.urlopen(request, timeout=10) as reply:
        index = json.load(reply)
    ready = {entry["name"] for entry in index if entry.get("state") == "READY"}
    assert ready == {"decode", "select"}
