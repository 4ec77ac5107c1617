"""A tiny random tagger in upstream's files, and its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from panotriton_export.graph import ParityResult
from panotriton_export.tagger import Source, export_tagger, open_tagger
from panotriton_export.tagger.random_ram import RandomFiles, write_random

__all__ = ["Tagger", "make"]


@dataclass(frozen=True)
class Tagger:
    """files: exported to `repository`, for CUDA; results, lines: what the export compared and said."""

    files: RandomFiles
    source: Source
    repository: Path
    results: list[ParityResult]
    lines: list[str]


def make(folder: Path) -> Tagger:
    files, lines = write_random(folder / "ram", seed=1), []
    source = open_tagger(files.ram, files.dape, files.tags, files.thresholds)
    repository = folder / "repository"
    results = export_tagger(source, repository, provider="cuda", report=lines.append)
    return Tagger(files, source, repository, results, lines)
