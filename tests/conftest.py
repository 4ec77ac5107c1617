"""One real server with the small preset for all server tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from panotriton.errors import ServerStartError
from panotriton.models.imports import uncollected
from panotriton.pipeline.networks import OSEDIFF
from panotriton.server.launch import LocalServer
from panotriton.server.repository import check_exported
from tests.brief import BriefServer
from tests.repositories import with_settings
from tests.server import standins

# What tests import while they are collected stays.
_COLLECTION = ExitStack()
_COLLECTION.enter_context(uncollected())
# Each worker's share of the cores, and its servers'; threads of OpenMP that spin while they wait for one that
# another process keeps from running make a test ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
# A shell starts background jobs with SIGINT ignored, and so would be what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where test files run at once, the longest begin first, so that none is left over when the others are done;
# and by turns such as keep a core busy and such as kill, freeze and wait.
LONGEST = (
    "server/test_pipeline.py",
    "unit/test_export_osediff.py",
    "server/test_client_trouble.py",
    "unit/test_gpu_graphs.py",
    "server/test_qwen.py",
    "server/test_client.py",
    "unit/test_qwen.py",
    "server/test_serve.py",
    "unit/test_export_tagger.py",
    "server/test_client_memory.py",
    "unit/test_gateway.py",
    "server/test_admission.py",
    "server/test_cluster.py",
    "browser/test_live.py",
    "server/test_dataset.py",
    "unit/test_small_training.py",
    "server/test_poison.py",
    "unit/test_qwen_decode.py",
    "server/test_client_stream.py",
    "server/test_report.py",
    "server/test_object_store.py",
    "browser/test_report.py",
    "server/test_onnxruntime_backend.py",
)
# Each of these is one worker's: they share the small preset's server, or the tagger's export.
TOGETHER = {
    "server/test_pipeline.py": "small",
    "server/test_placement.py": "small",
    "server/test_gateway.py": "small",
    "server/test_local.py": "small",
    "unit/test_export_tagger.py": "tagger",
    "server/test_tagger.py": "tagger",
}
ROOT = Path(__file__).parent.parent
PANORAMAS = ROOT / "tests" / "data" / "panoramas"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """--dist loadfile, but with some files as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 only where it is installed

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file.removeprefix("tests/"), file)

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    _COLLECTION.close()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The small preset's repository; `make test` has exported it."""
    folder = ROOT / "repository"
    try:
        check_exported(folder)
    except ServerStartError as error:
        pytest.fail(str(error), pytrace=False)
    return folder


@pytest.fixture(scope="session")
def quick_repository(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Super-resolution works at a quarter of the usual size, by one instance of each network, which compile
    for each size that comes: groups take seconds."""
    from panotriton_export.configs import set_instances  # noqa: PLC0415, which brings ONNX

    copy = with_settings(repository, tmp_path_factory.mktemp("quick"), process_size=128)
    for name in (OSEDIFF.encoder, OSEDIFF.denoiser, OSEDIFF.decoder):
        set_instances(copy / name, 1)
    return copy


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `tests.tagger.Tagger`."""
    from tests.tagger import make  # noqa: PLC0415, which brings PyTorch

    return make(tmp_path_factory.mktemp("tagger"))


@pytest.fixture(scope="session")
def server(
    quick_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    yield from _running(quick_repository, tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def standin_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pipeline around networks that take milliseconds, or half a second where PROMPT is slow."""
    return standins.build(tmp_path_factory.mktemp("standin") / "repository")


@pytest.fixture(scope="session")
def standin(
    standin_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    yield from _running(standin_repository, tmp_path_factory.mktemp("standin"))


def _running(repository: Path, folder: Path) -> Iterator[LocalServer]:
    with BriefServer(repository, log_file=folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def panoramas() -> tuple[np.ndarray, np.ndarray]:
    """Two real panoramas, (512, 1024, 3) uint8 RGB."""
    images = (cv2.imread(str(PANORAMAS / f"{name}.jpg")) for name in ("courtyard", "interior"))
    first, second = (cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images)
    return first, second
