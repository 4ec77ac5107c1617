"""What modules take from each other: names that the other one offers, and none that are private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where each package lies, by the name that it is imported by.
PACKAGES = {"panotriton": ROOT / "client" / "panotriton", "panotriton_export": ROOT / "export"}
FOLDERS = (*PACKAGES.values(), *(ROOT / name for name in ("model_repository", "docs", "tests")))
SOURCES = [path for folder in FOLDERS for path in sorted(folder.glob("**/*.py"))]


def module_path(name: str) -> Path | None:
    """The file of a module of this project, by its dotted name; None for others."""
    package, *parts = name.split(".")
    if package not in PACKAGES:
        return None
    place = PACKAGES[package].joinpath(*parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file if file.is_file() else None


@cache
def offered(path: Path) -> list[str] | None:
    """A module's __all__, or None where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


@cache
def defined(path: Path) -> frozenset[str]:
    """The names that a module's top level binds."""
    return frozenset(_bound(ast.parse(path.read_text()).body))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If):
            yield from _bound([*node.body, *node.orelse])
        else:
            names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


@cache
def taken(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every name that a file imports from a module of this project, or reads of it."""
    return list(_taken(path))


def _taken(path: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(path.read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{_source(path, node)}.{alias.name}"
                if module_path(full):
                    modules[alias.asname or alias.name] = full
                else:
                    yield _source(path, node), alias.name
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            module = modules[ast.unparse(node.value)]
            if module_path(f"{module}.{node.attr}") is None:
                yield module, node.attr


def _source(path: Path, node: ast.ImportFrom) -> str:
    """The module that is imported from, relative imports resolved."""
    if not node.level:
        return node.module or ""
    for name, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            package = (name, *path.relative_to(folder).parts[: -node.level])
            return ".".join((*package, *filter(None, [node.module])))
    return node.module or ""


def own(path: Path, module: str) -> Path | None:
    """The file of a module that is this project's: of a package, or a script beside the importing one."""
    beside = path.parent / f"{module.replace('.', '/')}.py"
    script = ROOT / "tests" / "bench" / beside.name
    return module_path(module) or next((file for file in (beside, script) if file.is_file()), None)


def test_only_public_names_are_taken_from_other_modules() -> None:
    private = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in SOURCES
        for module, name in taken(path)
        if name.startswith("_") and not name.startswith("__") and own(path, module)
    ]
    assert not private


def test_names_are_taken_from_modules_that_offer_them() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests")
        for module, name in taken(path)
        if (file := module_path(module)) and (names := offered(file)) is not None
        if name not in names and not name.startswith("__")
    ]
    assert not missing


def test_what_is_taken_exists() -> None:
    absent = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in SOURCES
        for module, name in taken(path)
        if (file := module_path(module)) and not name.startswith("__")
        if name not in defined(file)
    ]
    assert not absent


def test_a_module_defines_what_it_offers() -> None:
    undefined = {
        str(path.relative_to(ROOT)): absent
        for path in SOURCES
        if (absent := set(offered(path) or ()) - defined(path))
    }
    assert not undefined
