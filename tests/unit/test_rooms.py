"""Which room of the package may import which, read from the code itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import architecture
import pytest

import panotriton

PACKAGE = Path(panotriton.__file__).parent
FOLDERS = {"pipeline", "client", "models", "server", "groups", "web", "cli"}
# Room → the rooms that it may import beside itself and errors, as docs/ARCHITECTURE.md draws it.
ALLOWED = {room: set(others) for room, (_, others) in architecture.ROOMS.items()} | {
    "prompts": set()
}
ANYWHERE = {"errors", "__version__"}  # what every room may import


def imported(code: str, package: str) -> Iterator[str]:
    """Dotted names of the modules that the code imports, at its top and inside functions."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module
            yield from (f"{start}.{alias.name}" for alias in node.names)


def broken(room: str, code: str, package: str = "panotriton") -> list[str]:
    """The imports of a room's module that the rule forbids."""
    allowed = ALLOWED[room] | ANYWHERE | {room}
    names = (name.split(".") for name in imported(code, package) if name.startswith("panotriton"))
    return [
        ".".join(name)
        for name in names
        if name[0] != "panotriton" or (len(name) > 1 and name[1] not in allowed)
    ]


def modules() -> list[tuple[str, Path]]:
    found = [(path.relative_to(PACKAGE).parts[0], path) for path in PACKAGE.rglob("*.py")]
    return [(room.removesuffix(".py"), path) for room, path in sorted(found)]


@pytest.mark.parametrize("room", sorted(ALLOWED.keys() - {"export"}))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = {
        str(path.relative_to(PACKAGE)): bad
        for place, path in modules()
        if place == room and (bad := broken(room, path.read_text(), dotted(path)))
    }
    assert not found


def dotted(path: Path) -> str:
    return ".".join(("panotriton", *path.relative_to(PACKAGE).parent.parts))


def test_every_module_has_a_room() -> None:
    outside = {room for room, path in modules()} - FOLDERS - ALLOWED.keys() - ANYWHERE
    assert outside == {"__init__", "__main__"}


def test_nothing_but_its_own_modules_imports_the_command_line() -> None:
    others = [path for room, path in modules() if room not in ("cli", "__main__")]
    for folder in ("export", "model_repository"):
        others += (Path(__file__).parents[2] / folder).rglob("*.py")
    for path in others:
        names = list(imported(path.read_text(), "panotriton"))
        assert not [name for name in names if name.split(".")[:2] == ["panotriton", "cli"]], path


def test_the_models_folder_imports_what_runs_in_the_server_alone() -> None:
    for path in (Path(__file__).parents[2] / "model_repository").rglob("*.py"):
        assert not broken("models", path.read_text()), path


@pytest.mark.parametrize(
    ("room", "planted"),
    [
        ("client", "from panotriton.server import launch"),
        ("client", "from panotriton.server.launch import LocalServer"),
        ("client", "import panotriton.models.qwen"),
        ("models", "from panotriton.client.client import Client"),
        ("models", "from panotriton import Client"),
        ("server", "def f():\n    from panotriton.models import tags"),
        ("pipeline", "from panotriton.client import pixels"),
        ("groups", "from panotriton.server.repository import check_exported"),
        ("web", "from panotriton.models.osediff import align"),
        ("web", "from panotriton_export.presets import export_preset"),
        ("groups", "from ..server import launch"),
    ],
)
def test_a_planted_import_is_found(room: str, planted: str) -> None:
    assert broken(room, planted, f"panotriton.{room}")
