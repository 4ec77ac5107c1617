"""What a data-set run has left in its folder, compared in one short line per difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def content(output: Path) -> dict[str, bytes]:
    """Every file below `output` by its relative name."""
    files = (path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def result(output: Path) -> dict[str, bytes]:
    """All but the diary of what servers did meanwhile: a harm may or may not meet a group in the making."""
    return {name: data for name, data in content(output).items() if ".attempt-" not in name}


def check_same(
    found: Mapping[str, bytes], expected: Mapping[str, bytes], when: object = ""
) -> None:
    """Both have the same files with the same bytes; an AssertionError names those that differ.

    A plain comparison prints every picture of both runs.
    """
    differences = [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is not expected" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} differs: {_excerpt(found[name])}, expected {_excerpt(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ),
    ]
    assert not differences, "\n".join([*differences[:12], f"{len(differences)} in all {when}"])


def _excerpt(data: bytes) -> str:
    return f"{len(data)} bytes {data[:60]!r}"
