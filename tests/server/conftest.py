"""A second server for tests of the client, with networks that take milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

from panotriton.server.launch import LocalServer
from tests.brief import BriefServer


@pytest.fixture(scope="session")
def standin_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = util.spec_from_file_location("standins", Path(__file__).with_name("standins.py"))
    assert spec is not None
    assert spec.loader is not None
    standins = util.module_from_spec(spec)
    spec.loader.exec_module(standins)
    folder: Path = standins.build(tmp_path_factory.mktemp("standin") / "repository")
    return folder


@pytest.fixture(scope="session")
def standin(
    standin_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("standin") / "server.log"
    with BriefServer(standin_repository, log_file=log) as running:
        yield running
