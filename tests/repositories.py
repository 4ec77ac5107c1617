"""Copies of a repository that differ in what a test is about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def with_settings(repository: Path, folder: Path, **settings: object) -> Path:
    """A copy below `folder` whose osediff has these instead of its own."""
    copy = Path(shutil.copytree(repository, folder / "repository"))
    path = copy / "osediff" / "1" / "osediff.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy
