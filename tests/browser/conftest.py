"""A Chromium, and a server with networks that take milliseconds for the page that needs one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from docs.screenshots import chromium, installed
from panotriton.server.launch import LocalServer
from tests.brief import BriefServer
from tests.server import standins


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("standin")
    repository = standins.build(folder / "repository")
    with BriefServer(repository, log_file=folder / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Skipped aloud on a machine without one; there is no such machine in continuous integration."""
    if installed() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium: apt-get install chromium (Debian, Ubuntu), or put Chrome on the PATH"
        )
    with chromium(installed()) as running:
        yield running
