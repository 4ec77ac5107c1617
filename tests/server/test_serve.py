"""`panotriton serve`: starting, stopping and refusing, as a user sees it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from panotriton.client.client import Client
from panotriton.errors import ServerStartError
from panotriton.server import launch as launcher
from panotriton.server.launch import LocalServer, find_installation
from tests.brief import BriefServer

COMMAND = [sys.executable, "-m", "panotriton"]
FREE_PORTS = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]


def regions(command: list[str]) -> list[str]:
    """Shared memory of the server with this command line: others may run beside it."""
    setting = "--backend-config=python,shm-region-prefix-name="
    (prefix,) = (part.removeprefix(setting) for part in command if part.startswith(setting))
    return [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


def test_a_server_keeps_freed_memory_unless_told_otherwise(
    standin: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = psutil.Process(standin.pid).environ()
    assert environment["MALLOC_ARENA_MAX"] == "1"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == str(2 << 30)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert launcher.environment(())["MALLOC_ARENA_MAX"] == "4"


@pytest.mark.parametrize(
    ("end", "models"),
    [(signal.SIGINT, "decode,crop"), (signal.SIGTERM, "osediff_unet")],
)
def test_serve_tells_where_it_listens_and_leaves_nothing(
    repository: Path, end: signal.Signals, models: str
) -> None:
    command = [*COMMAND, "serve", "--repository", str(repository), *FREE_PORTS, "--models", models]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if line.startswith("ready"):
            break
    address = dict(line[:2] for line in lines if len(line) == 2)
    assert address["gRPC"].startswith("127.0.0.1:")
    children = psutil.Process(process.pid).children(recursive=True)
    (command_line,) = (c.cmdline() for c in children if "tritonserver" in c.name())
    assert regions(command_line)
    with Client(address["gRPC"]) as client:
        assert client.ready()
    process.send_signal(end)
    assert process.wait(60) == 0
    process.stdout.close()
    assert not [child for child in children if child.is_running()]
    assert not regions(command_line)


def test_a_killed_server_leaves_no_region(repository: Path) -> None:
    with LocalServer(repository, load_models=["decode", "select"]) as server:
        command_line = psutil.Process(server.pid).cmdline()
        assert regions(command_line)
        os.killpg(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert not regions(command_line)


def test_whoever_lacks_the_key_is_told_what_is_loaded(repository: Path) -> None:
    with BriefServer(repository, load_models=["decode", "select"], controlled=True) as server:
        with Client(server.grpc_url) as client:
            index = {model.name for model in client.models() if model.ready}
        with Client(server.http_url, protocol="http") as client:
            loaded = client.models()
    assert index == {"decode", "select"} == {model.name for model in loaded}
    assert all(model.ready for model in loaded)


def test_a_server_ends_with_the_process_that_started_it(repository: Path) -> None:
    code = (
        "import sys, time, pathlib; from panotriton.server.launch import LocalServer\n"
        "server = LocalServer(pathlib.Path(sys.argv[1]), load_models=['decode'])\n"
        "with server: print(server.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([server], timeout=60)
    assert not server.is_running()


def test_a_server_outlasts_the_thread_that_started_it(repository: Path) -> None:
    server = BriefServer(repository, load_models=["decode"])
    starter = threading.Thread(target=server.__enter__)
    starter.start()
    starter.join()
    time.sleep(0.5)
    with Client(server.grpc_url) as client:
        assert client.ready()
    server.stop()


def test_a_server_starts_past_a_proxy_and_again_where_old_files_were_removed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with BriefServer(repository, load_models=["decode"], start_timeout_s=60) as server:
        (stub,) = Path(f"/proc/{server.pid}/cwd").resolve().glob("backends/python/*stub")
        stub.unlink()
        server.kill()
        server.start()
        assert server.control.healthy("ready")


@pytest.mark.parametrize("host", ["::1", "no.such.host.invalid", "198.51.100.7"])
def test_an_address_of_none_is_named(repository: Path, host: str) -> None:
    with pytest.raises(ServerStartError, match=f"cannot listen on {host}: .* expected an IPv4"):
        LocalServer(repository, host=host)


CRASHES = """#!/bin/sh
[ -s {counted} ] && [ $(wc -l < {counted}) -ge {times} ] && exec {binary} "$@"
echo >> {counted}
kill -ABRT $$
"""


@pytest.mark.parametrize("times", [2, 3])
def test_a_crash_while_models_load_is_tried_again(
    repository: Path, tmp_path: Path, times: int
) -> None:
    real, wrapper = find_installation(), tmp_path / "tritonserver"
    places = {"counted": tmp_path / "crashes", "binary": real.binary}
    wrapper.write_text(CRASHES.format(times=times, **places))
    wrapper.chmod(0o755)
    server = LocalServer(
        repository, load_models=["decode"], installation=replace(real, binary=wrapper)
    )
    if times == 3:
        with pytest.raises(ServerStartError, match="exit code -6"), server:
            pass
        return
    with server, Client(server.grpc_url) as client:
        assert client.ready()


def test_a_taken_port_is_named(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerStartError, match=rf"127\.0\.0\.1:{port}.*--http-port"),
            LocalServer(repository, http_port=port),
        ):
            pass


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_an_unexported_repository_is_refused_with_the_command_that_exports_it(
    tmp_path: Path, repository: Path
) -> None:
    result = run("serve", "--repository", str(tmp_path / "none"))
    assert result.returncode == 2
    assert f"panotriton export --preset small --output {tmp_path}/none" in result.stderr
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (copy / "osediff_unet" / "1" / "model.onnx").unlink()
    result = run("serve", "--repository", str(copy))
    assert result.returncode == 2
    assert "osediff_unet/1/model.onnx is missing" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_repository_may_lie_anywhere(
    tmp_path: Path, standin_repository: Path, repository: Path
) -> None:
    folder = tmp_path / "a b" / "ré \"po's $(x);*"
    shutil.copytree(standin_repository, folder)
    graph = "osediff_text_encoder"  # one that the onnxruntime backend opens
    shutil.copytree(repository / graph, folder / "graph" / graph)
    with BriefServer(folder, load_models=["decode", "crop"]) as server:
        assert Client(server.grpc_url).ready()
    with BriefServer(folder / "graph") as server:
        assert Client(server.grpc_url).ready()


def test_a_broken_model_is_named(tmp_path: Path, standin_repository: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(standin_repository, copy)
    (copy / "osediff" / "1" / "osediff.json").write_text("{")
    with pytest.raises(ServerStartError, match="model osediff: .*JSON"), LocalServer(copy):
        pass


def test_models_of_another_version_are_told_to_be_exported_again(
    tmp_path: Path, standin_repository: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(standin_repository, copy)
    model = copy / "options" / "1" / "model.py"
    model.write_text("from panotriton.models.requests import gone\n" + model.read_text())
    with (
        pytest.raises(ServerStartError, match="model options: .*gone.*\n.*export it again"),
        LocalServer(copy, load_models=["options"]),
    ):
        pass


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(ServerStartError, match=r"numpy 2\.1\.0 .* silently empty: pip install"):
        find_installation()


def test_an_unserved_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "python_version", lambda: "3.99")
    with pytest.raises(
        ServerStartError, match=r"no stub for Python 3\.99; use one of .*3\.11.*docker"
    ):
        find_installation()


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.sys, "platform", "darwin")
    with pytest.raises(ServerStartError, match="Linux x86_64, this is darwin .* docker"):
        find_installation()


def test_an_old_glibc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.platform, "libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(ServerStartError, match=r"needs glibc 2\.35, this system has 2\.31"):
        find_installation()


def test_a_missing_libpython_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(launcher.Path, "exists", lambda self: False)
    with pytest.raises(ServerStartError, match=r"libpython3\.\d+\.so.*apt-get install libpython3"):
        launcher.libpython_folder()


def test_a_missing_wheel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.util, "find_spec", lambda name: None)
    with pytest.raises(ServerStartError, match=r"pip install 'panotriton\[serve\]'"):
        find_installation()


def test_only_flags_that_the_server_knows_are_passed(repository: Path, tmp_path: Path) -> None:
    server = LocalServer(repository)
    installation = find_installation()
    command = server._command(installation, tmp_path)
    own = command[command.index(str(installation.binary)) + 1 :]
    flags = {part.split("=")[0] for part in own}
    assert "--http-address" in flags
    assert flags <= find_installation().flags
    assert "--allow-client-shm" not in flags  # 26.05 and later


@pytest.mark.parametrize(("host", "control"), [("127.0.0.1", 200), ("0.0.0.0", 403)])
def test_model_control_is_for_local_callers_only(repository: Path, host: str, control: int) -> None:
    with BriefServer(repository, host=host, load_models=["decode"]) as server:
        request = urllib.request.Request(f"http://{server.http_url}/v2/repository/index", b"{}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                status = response.status
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
    assert status == control


def test_the_log_can_be_followed(repository: Path) -> None:
    with BriefServer(repository, load_models=["decode"]) as server:
        began = time.monotonic()
        assert any("Started GRPCInferenceService" in line for line in server.log_lines())
        assert time.monotonic() - began < 60
