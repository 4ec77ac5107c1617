"""What a run records about the server that it asked, for the group's group_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panotriton.pipeline.files import settings_file
from panotriton.pipeline.results import Health

__all__ = ["facts", "weights"]


def facts(health: Health, repository: Path | None) -> dict[str, Any]:
    """The server's name and version, and its weights where its repository is at hand.

    A server does not tell what its networks were exported from: with `repository` None, nor do we.
    """
    found: dict[str, Any] = {"server": f"{health.name} {health.version}".strip()}
    return found | ({"weights": weights(repository)} if repository else {})


def weights(repository: Path) -> dict[str, str]:
    """What identifies an exported repository's weights, by model: a checksum, an architecture."""
    osediff = _settings(repository, "osediff")
    qwen = _settings(repository, "qwen")
    return {"osediff": f"sha256:{osediff['weights_sha256']}", "qwen": str(qwen["architecture"])}


def _settings(repository: Path, model: str) -> Any:
    """The file that an export leaves beside `model`'s code."""
    return json.loads((repository / model / "1" / settings_file(model)).read_text(encoding="utf-8"))
