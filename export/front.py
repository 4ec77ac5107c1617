"""What an export leaves beside the models that run a super-resolution network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from panotriton.pipeline.files import settings_file
from panotriton.pipeline.networks import NETWORKS, fronts
from panotriton.pipeline.scratch import atomic

__all__ = ["front_folders", "write_settings"]


def front_folders(repository: Path, network: str) -> list[Path]:
    """Where files of `network` go, each to all of them.

    Not to one place: a server fetches each model of an object store into a folder of its own.
    """
    folders = [repository / model / "1" for model in fronts(network)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def write_settings(folder: Path, network: str, settings: Mapping[str, Any]) -> None:
    """Write what `panotriton.models.one_step.read_network` reads: settings, and models by role."""
    content = {**settings, "models": asdict(NETWORKS[network])}
    path = folder / settings_file(network)
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
