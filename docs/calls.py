"""Which models a Python model asks, read from its code: no config knows the calls of a model.py.

Followed is what the class TritonPythonModel reaches by name, also through modules of panotriton.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from panotriton.pipeline.networks import NETWORKS

ROOT = Path(__file__).parent.parent

Place = tuple[Path, str]  # a file and a name that it defines


def calls(model: str, names: set[str]) -> tuple[list[str], set[str]]:
    """The models among `names` that `model` asks, and the tensors that its code builds by name."""
    path = ROOT / "model_repository" / model / "1" / "model.py"
    asked, built = set(), set()
    for node in _reached(path) if path.exists() else ():
        keys = {id(key): key for part in _parts(node, ast.Dict) for key in part.keys}
        for text in _parts(node, ast.Constant):
            (built if id(text) in keys else asked).add(text.value)
    # A network is named to be looked up: asked are the models of its roles.
    return sorted((asked & names) - {model} - NETWORKS.keys()), built


def _reached(path: Path) -> Iterator[ast.AST]:
    """The definitions that a model.py's class reaches, itself first."""
    waiting, seen = [(path, "TritonPythonModel")], set()
    while waiting:
        place = waiting.pop()
        node = _definitions(place[0]).get(place[1])
        if place in seen or node is None:
            continue
        seen.add(place)
        yield node
        waiting += _named(place[0], node)


def _named(path: Path, node: ast.AST) -> Iterator[Place]:
    """What a definition names: of its own file, or of one that this file imports."""
    imported = _imports(path)
    for name in _parts(node, ast.Name):
        yield imported.get(name.id, (path, name.id))
    for part in _parts(node, ast.Attribute):  # module.name
        if isinstance(part.value, ast.Name) and part.value.id in imported:
            folder, module = imported[part.value.id]
            yield folder.parent / f"{module}.py", part.attr


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text() if path.exists() else "")


@cache
def _definitions(path: Path) -> dict[str, ast.AST]:
    """Top-level functions, classes and constants, by name."""
    found: dict[str, ast.AST] = {}
    for node in _tree(path).body:
        names = [name.id for name in _parts(node, ast.Name) if isinstance(name.ctx, ast.Store)]
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            names = [getattr(node, "name", "")]
        found |= dict.fromkeys(names, node)
    return found


@cache
def _imports(path: Path) -> dict[str, Place]:
    """Name → where it is defined, for what comes from panotriton, imports within functions too."""
    found = {}
    for node in _parts(_tree(path), ast.ImportFrom):
        if (node.module or "").startswith("panotriton"):
            source = ROOT / "client" / (node.module or "").replace(".", "/")
            file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            found |= {alias.asname or alias.name: (file, alias.name) for alias in node.names}
    return found


def _parts(node: ast.AST, kind: type) -> Iterator[ast.AST]:
    return (part for part in ast.walk(node) if isinstance(part, kind))
