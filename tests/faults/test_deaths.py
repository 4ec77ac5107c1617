"""Kill what serves, idle and busy: service comes back by itself, and nobody waits for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from panotriton import Client
from panotriton.client import shared_memory
from panotriton.errors import PanotritonError, RequestTimeout
from panotriton.pipeline.regions import FOLDER
from panotriton.server.processes import Stub, find_stubs
from panotriton.server.supervise import Watch
from tests.brief import BriefServer
from tests.faults.conftest import Answer, Serving, group, served, stream

MIB = 1 << 20
Panoramas = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def undisturbed(serving: Serving, panoramas: Panoramas) -> list[int]:
    kept = group(serving, panoramas)
    assert kept
    return kept


def recovered(serving: Serving) -> float:
    reloads = serving.count("panotriton_model_reloads_total")
    return reloads + serving.count("panotriton_server_restarts_total")


def mended(serving: Serving, before: float) -> None:
    """Wait until the supervision has seen the death and a new request would be answered."""
    serving.wait_until(
        lambda: recovered(serving) > before and serving.probe("/ready")[0] == 200, "service again"
    )


@pytest.mark.parametrize("model", ["preprocess", "osediff", "osediff_unet", "panorama_stream"])
def test_an_idle_models_process_is_replaced(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int], model: str
) -> None:
    before, server = recovered(serving), serving.server().pid
    serving.kill_stubs(model)
    mended(serving, before)
    assert serving.server().pid == server, "the rest of the server was not disturbed"
    assert group(serving, panoramas) == undisturbed
    assert stream(serving, panoramas)[-1] == "Done"


@pytest.mark.thorough
def test_a_process_that_dies_as_it_is_loaded_anew_is_replaced_as_well(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    """On a server of its own: back-off grows with the restarts of ten minutes."""
    with served(standin_repository, tmp_path) as serving:
        (old,) = serving.stubs("osediff_unet")
        os.kill(old.pid, signal.SIGKILL)
        deadline = time.monotonic() + serving.patience_s
        while not (new := [each for each in serving.stubs("osediff_unet") if each.pid != old.pid]):
            assert time.monotonic() < deadline, serving.text()
        os.kill(new[0].pid, signal.SIGKILL)

        def replaced() -> bool:
            if serving.probe("/ready")[0] != 200:  # or there may be no server to look at
                return False
            return not {old.pid, new[0].pid} & {stub.pid for stub in serving.stubs("osediff_unet")}

        serving.wait_until(lambda: serving.probe("/ready")[0] == 503, "503 of /ready")
        serving.wait_until(replaced, "service again")
        assert group(serving, panoramas)


@pytest.mark.thorough
def test_a_process_that_dies_as_its_server_starts_is_replaced_as_well(
    standin_repository: Path, panoramas: Panoramas, tmp_path: Path
) -> None:
    with served(standin_repository, tmp_path) as serving:
        old = serving.server().pid
        os.kill(old, signal.SIGKILL)
        deadline = time.monotonic() + serving.patience_s
        new: list[Stub] = []
        while not new:
            assert time.monotonic() < deadline, serving.text()
            servers = psutil.Process(serving.process.pid).children()
            stubs = [stub for each in servers if each.pid != old for stub in find_stubs(each.pid)]
            new = [stub for stub in stubs if stub.model == "osediff_unet"]
        os.kill(new[0].pid, signal.SIGKILL)
        serving.wait_until(lambda: serving.probe("/ready")[0] == 200, "service again")
        assert group(serving, panoramas)


def test_ready_means_all_models_where_several_died(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int]
) -> None:
    for stub in find_stubs(serving.server().pid):
        os.kill(stub.pid, signal.SIGKILL)
    serving.wait_until(lambda: serving.probe("/ready")[0] == 503, "503 of /ready")
    serving.wait_until(lambda: serving.probe("/ready")[0] == 200, "service again")
    assert group(serving, panoramas) == undisturbed


def test_readiness_tells_the_truth(serving: Serving, undisturbed: list[int]) -> None:
    """tritonserver itself says ready of a model whose process is gone."""
    before = recovered(serving)
    for stub in serving.stubs("select"):
        os.kill(stub.pid, signal.SIGKILL)
    serving.wait_until(lambda: serving.probe("/ready")[0] == 503, "503 of /ready")
    mended(serving, before)


def test_a_process_that_died_before_anyone_watched_is_missed(standin_repository: Path) -> None:
    with BriefServer(standin_repository, load_models=["crop"]) as server:
        (stub,) = find_stubs(server.pid)
        stub.kill()
        assert Watch(server.pid, server.loaded).lost() == {"crop": [stub.pid]}
        watch = Watch(server.pid)
        watch.renewed("crop")
        assert watch.lost() == {"crop": []}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("osediff", marks=pytest.mark.thorough),
        pytest.param("osediff_unet", marks=pytest.mark.thorough),
        "panorama_stream",
    ],
)
def test_callers_of_a_busy_process_get_an_answer(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int], model: str
) -> None:
    before = recovered(serving)
    calls = [
        Answer(lambda: group(serving, panoramas, prompt="slow")),
        Answer(lambda: stream(serving, panoramas, prompt="slow")),
    ]
    calls[0].join(2)
    assert not calls[0].ended()
    serving.kill_stubs(model)
    mended(serving, before)
    for call in calls:
        call.join(serving.patience_s)
        assert call.ended(), f"a caller waits for nothing:\n{serving.text()}"
        assert call.error is None or isinstance(call.error, PanotritonError)
    assert any(call.error for call in calls)
    assert group(serving, panoramas) == undisturbed


def test_a_killed_server_is_started_again_at_the_same_address(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int]
) -> None:
    before, server = recovered(serving), serving.server().pid
    call = Answer(lambda: group(serving, panoramas, prompt="slow"))
    call.join(1)
    os.kill(server, signal.SIGKILL)
    mended(serving, before)
    call.join(serving.patience_s)
    assert isinstance(call.error, PanotritonError)
    assert serving.server().pid != server
    assert "killed by SIGKILL" in serving.text()
    assert group(serving, panoramas) == undisturbed


@pytest.mark.thorough
def test_a_stopped_process_is_replaced(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int]
) -> None:
    before = recovered(serving)
    for stub in serving.stubs("preprocess"):
        os.kill(stub.pid, signal.SIGSTOP)
    mended(serving, before)
    assert group(serving, panoramas) == undisturbed


@pytest.mark.thorough
def test_a_stopped_server_is_replaced(
    serving: Serving, panoramas: Panoramas, undisturbed: list[int]
) -> None:
    before = recovered(serving)
    os.kill(serving.server().pid, signal.SIGSTOP)
    mended(serving, before)
    assert group(serving, panoramas) == undisturbed


KILLED = """
import sys, threading, numpy as np
from panotriton import Client
from panotriton.client import shared_memory
client = Client(sys.argv[1])
memory = client.shared_memory(8 << 20)
image = np.zeros((64, 64, 3), np.uint8)
slow = {"prompt": "slow", "via": memory}
threading.Thread(target=client.upscale, args=(image,), kwargs=slow).start()
print("sent", flush=True)
input()
"""


@pytest.mark.parametrize("end", ["kill", "give up"])
def test_memory_that_a_caller_left_is_let_go(
    serving: Serving, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request that is still under way; regions of callers that live stay."""
    image = np.zeros((64, 64, 3), np.uint8)
    with Client(serving.grpc) as client, client.shared_memory(MIB) as memory:
        client.upscale(image, via=memory)
        (ours,) = client.regions()
        if end == "kill":
            command = [sys.executable, "-c", KILLED, serving.grpc]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
                process.stdout.readline()
                serving.wait_until(lambda: len(client.regions()) == 2, "its region")
                process.kill()
        else:
            monkeypatch.setattr(shared_memory, "_LATE_S", 0.0)  # nor is its answer waited for
            with Client(serving.grpc, timeout_s=0.2, retries=0) as hasty:
                left = hasty.shared_memory(MIB)
                with pytest.raises(RequestTimeout):
                    hasty.upscale(image, prompt="slow", via=left)
                left.close()
        gone = [name for name in client.regions() if name != ours]
        assert gone
        serving.wait_until(lambda: client.regions() == [ours], "the end of what was left")
        assert not [name for name in gone if (FOLDER / name).exists()]
        assert client.upscale(image, via=memory).image.size == (128, 128)
        assert client.regions() == [ours]
