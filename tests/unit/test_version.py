"""One version: the package's, the command's, and what files and pages say."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import panotriton
from panotriton.cli import main

ROOT = Path(__file__).parents[2]


def test_the_package_has_the_version_that_is_declared() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert panotriton.__version__ == metadata.version("panotriton") == declared[1]


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"panotriton {panotriton.__version__}\n"


def test_no_other_module_asks_for_the_version() -> None:
    package = ROOT / "client" / "panotriton"
    asking = 'metadata.version("panotriton")'
    found = [path for path in package.glob("**/*.py") if asking in path.read_text()]
    assert found == [package / "__init__.py"]


def test_every_public_name_has_a_heading_in_the_api_page() -> None:
    page = (ROOT / "docs" / "API.md").read_text()
    headings = set(re.findall(r"^##? (?:panotriton\.)?(\w+)$", page, re.MULTILINE))
    names = {name for name in panotriton.__all__ if not name.startswith("__")}
    assert names <= headings
