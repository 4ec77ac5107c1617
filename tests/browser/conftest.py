"""A Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from docs.screenshots import chromium, installed


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Skipped aloud on a machine without one; there is no such machine in continuous integration."""
    if installed() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium: apt-get install chromium (Debian, Ubuntu), or put Chrome on the PATH"
        )
    with chromium(installed()) as running:
        yield running
