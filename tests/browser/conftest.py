"""A server with networks that take milliseconds, for the page that needs one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from panotriton.server.launch import LocalServer
from tests.server import standins


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("standin")
    repository = standins.build(folder / "repository")
    with LocalServer(repository, log_file=folder / "server.log") as running:
        yield running
