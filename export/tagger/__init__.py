"""The tagger: RAM's and DAPE's checkpoints and RAM's tag lists → the repository's osediff_tagger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from panotriton.models.tags import Tags
from panotriton.pipeline.files import TAGS
from panotriton.server.repository import copy_model
from panotriton_export.configs import find_engine, fit_config, name_weights, set_engine
from panotriton_export.front import front_folders
from panotriton_export.graph import ParityResult, export_component
from panotriton_export.half import compare_in_half
from panotriton_export.pickles import CheckpointError
from panotriton_export.tagger.checkpoint import Ram, open_ram
from panotriton_export.tagger.graph import NAME, tagger_component
from panotriton_export.tagger.lists import read_tags

__all__ = ["CheckpointError", "Source", "export_tagger", "open_tagger"]


@dataclass(frozen=True, slots=True)
class Source:
    """Files that were checked against each other."""

    ram: Ram
    tags: Tags


def open_tagger(ram: Path, dape: Path, tags: Path, thresholds: Path) -> Source:
    """Open ram_swin_large_14m.pth, DAPE.pth and the two lists; takes a second.

    Raises CheckpointError for files that are broken or do not fit each other.
    """
    opened = open_ram(ram, dape)
    return Source(opened, read_tags(tags, thresholds, opened.sizes.tags))


def export_tagger(
    source: Source,
    repository: Path,
    *,
    precision: str = "fp32",
    provider: str = "cpu",
    report: Callable[[str], None] = print,
) -> list[ParityResult]:
    """Write osediff_tagger into `repository`, and tags.json, from which the models that use it know of it.

    precision, provider: as of `export_osediff`. Raises ExportError where the graph differs from
    PyTorch, and leaves what was there.
    """
    engine = find_engine(provider, precision)
    component = tagger_component(source.ram.load(), precision)
    results = compare_in_half(component, precision)
    results += export_component(component, repository, engine, precision)
    copy_model(NAME, repository)
    fit_config(repository / NAME)
    set_engine(repository / NAME, engine, precision)
    for folder in front_folders(repository, "osediff"):
        source.tags.write(folder)
    graph = repository / NAME / "1"
    files = sorted(path for path in graph.iterdir() if path.name.startswith("model.onnx"))
    name_weights(repository / NAME, *files, (folder / TAGS).read_bytes())
    for result in results:
        report(str(result))
    return results
