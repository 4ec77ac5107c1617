"""What `make` installs and exports, and what it leaves alone; with a command in the export's place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPORT = "#!/bin/sh\ntest ! -e broken || exit 1\nmkdir -p repository && echo exported >> exports\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout in which the demo's packages are installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for source in ("export/a.py", "model_repository/b.py", "client/panotriton/prompts/c.txt"):
        (tmp_path / source).parent.mkdir(parents=True)
        (tmp_path / source).write_text(source)
    command = tmp_path / ".venv" / "bin" / "panotriton"
    command.parent.mkdir(parents=True)
    command.write_text(EXPORT)
    command.chmod(0o755)
    (tmp_path / ".venv" / ".demo").touch()
    return tmp_path


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Of the make that runs these tests, if one does.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "MAKE"}
    command = ["make", "-C", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def exports(tree: Path) -> int:
    assert make(tree, "repository/.small").returncode == 0
    return len((tree / "exports").read_text().splitlines())


def test_the_preset_is_exported_when_a_source_has_another_content(tree: Path) -> None:
    source = tree / "export" / "a.py"
    assert exports(tree) == exports(tree) == 1
    os.utime(source)  # as another checkout leaves it
    assert exports(tree) == 1
    source.write_text("changed")
    assert exports(tree) == exports(tree) == 2
    source.rename(tree / "export" / "d.py")
    assert exports(tree) == 3


def test_an_export_that_failed_is_tried_again(tree: Path) -> None:
    (tree / "broken").touch()
    assert make(tree, "repository/.small").returncode != 0
    (tree / "broken").unlink()
    assert exports(tree) == 1


def test_uv_installs_where_it_is(tree: Path) -> None:
    (tree / ".venv" / ".demo").unlink()
    uv = make(tree, "-n", "demo", "UV=/opt/uv").stdout
    assert "/opt/uv pip install --python .venv/bin/python --quiet -c constraints.txt -e" in uv
    pip = make(tree, "-n", "demo", "UV=").stdout
    assert ".venv/bin/python -m pip install --no-compile --quiet -c constraints.txt -e" in pip


def test_the_demo_installs_less_than_the_tests_do(tree: Path) -> None:
    (tree / ".venv" / ".demo").unlink()
    demo, test = (make(tree, "-n", target).stdout for target in ("demo", "test"))
    assert "-e '.[export]'" in demo
    assert "[dev]" not in demo
    assert test.index("-e '.[export]'") < test.index("-e '.[dev]'") < test.index("-m pytest")
