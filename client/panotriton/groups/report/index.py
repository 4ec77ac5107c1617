"""The page over all groups of an output folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from panotriton.errors import InvalidInput, brief
from panotriton.groups import layout
from panotriton.groups.report.document import render, save, template
from panotriton.groups.report.picture import data_uri, read_picture, within
from panotriton.groups.report.record import Record, read_record
from panotriton.groups.report.verdict import outcome

__all__ = ["write_index"]

_THUMBS_BYTES = 20_000_000
_THUMB_PX = 480


@dataclass(frozen=True, slots=True)
class Entry:
    """One group on the index. `link` is relative to the page, None where there is no report yet."""

    record: Record
    outcome: str
    thumb: str
    kept: int
    images: int
    link: str | None


@dataclass(frozen=True, slots=True)
class FailedPair:
    """A pair of panoramas that gave no group; `panoramas` are their names without suffix."""

    group_id: int
    panoramas: tuple[str, ...]
    error: str


def write_index(root: Path, output: Path | None = None) -> Path:
    """Write `root`/index.html (or `output`) over the group folders in `root`; returns its path.

    A group links to its report.html where `write_report` has made one; pairs that a data-set run notes
    in failed.json are shown as such. The page is self-contained;
    its thumbnails share 20 MB. Raises InvalidInput where `root` has no group.
    """
    folders = layout.group_folders(root)
    if not folders:
        raise InvalidInput(
            f"{brief(root)} has no group; expected folders such as group_0001 with a group_info.json, as "
            "`panotriton process -o` writes them"
        )
    path = output or root / layout.INDEX
    entries = [_entry(folder, path.parent, _THUMBS_BYTES // len(folders)) for folder in folders]
    styles = (template("page.css"),)
    page = render(
        "index.html",
        scripts=(),
        styles=styles,
        name=root.resolve().name,
        entries=entries,
        failures=_failures(root / layout.FAILED),
    )
    return save(page, path)


def _failures(path: Path) -> list[FailedPair]:
    if not path.is_file():
        return []
    return [
        FailedPair(
            int(number), tuple(Path(name).stem for name in known["panoramas"]), known["error"]
        )
        for number, known in json.loads(path.read_text(encoding="utf-8")).items()
    ]


def _entry(folder: Path, base: Path, max_bytes: int) -> Entry:
    record = read_record(folder)
    report = folder / layout.REPORT
    return Entry(
        record=record,
        outcome=outcome(record),
        thumb=data_uri(within(read_picture(record.best.after), _THUMB_PX), max_bytes),
        kept=len(record.kept),
        images=record.image_count,
        link=quote(Path(os.path.relpath(report, base)).as_posix()) if report.is_file() else None,
    )
