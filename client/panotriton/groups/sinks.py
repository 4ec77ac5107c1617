"""How a group is kept: as a folder of files, as a tar for webdataset, as a Parquet file of rows.

Each group is one unit, written whole by whoever made it, and holds its own record: what lies complete in its
place is never made again.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from panotriton.errors import InvalidInput, quoted
from panotriton.groups import layout
from panotriton.groups.folder import RESULT, fill_group, jpeg_bytes, result_entry
from panotriton.groups.plan import Pair
from panotriton.groups.report import write_report
from panotriton.groups.store import FolderStore, Store, json_bytes, open_store
from panotriton.pipeline.quality import finite_or_none
from panotriton.pipeline.results import Group, Interval
from panotriton.pipeline.scratch import PREFIX, Scratch

__all__ = ["LAYOUTS", "Record", "Sink", "open_sink"]

LAYOUTS = ("folder", "webdataset", "parquet")
Record = dict[str, Any]
"""A group's entry of results.json, with its key, and how many bytes it takes."""

_AT_ONCE = 16  # files of a group on their way to an object store
_DATA = "data"
_HEADER = "PANOTRITON.group"


def open_sink(place: str, kind: str, *, pages: bool = False) -> Sink:
    """What keeps groups below a path or a URL. Raises InvalidInput where that cannot work."""
    if kind not in LAYOUTS:
        raise InvalidInput(f"format is {quoted(kind)}; expected one of {', '.join(LAYOUTS)}")
    store = open_store(place)
    if pages and not (kind == "folder" and isinstance(store, FolderStore)):
        raise InvalidInput(
            "HTML pages are written into groups' folders on a disk alone: leave them out"
        )
    if kind == "parquet":
        _arrow()
    kinds = {"webdataset": TarSink, "parquet": ParquetSink}
    if kind in kinds:
        return kinds[kind](store)
    return FolderSink(store, pages) if isinstance(store, FolderStore) else UploadSink(store)


class Sink:
    """Keeps groups. `find` and `write` return a group's record."""

    suffix = ""  # of the files that hold groups, where those are no folders

    def __init__(self, store: Store) -> None:
        self.store = store

    def find(self, pair: Pair) -> Record | None:
        """What is complete already, None where it is not, or is of other content."""
        raise NotImplementedError

    def write(
        self, pair: Pair, group: Group, bases: tuple[str, str], about: Mapping[str, Any]
    ) -> Record:
        """Keep a group; where somebody was faster, what they have kept."""
        raise NotImplementedError

    def remove(self, index: int) -> None:
        """A group that the run does not need."""
        raise NotImplementedError


class FolderSink(Sink):
    """group_0001/ … in a folder. One appears by one rename, which fails where there is one."""

    def __init__(self, store: FolderStore, pages: bool) -> None:
        super().__init__(store)
        self._root = store.folder
        self._pages = pages

    def find(self, pair: Pair) -> Record | None:
        folder = layout.group_folder(self._root, pair.group_id)
        if not layout.is_group(folder):
            return None
        content = json.loads((folder / layout.INFO).read_text(encoding="utf-8"))
        if content.get("key") != pair.key:
            return None
        return _record(pair, content, _size(folder))

    def write(
        self, pair: Pair, group: Group, bases: tuple[str, str], about: Mapping[str, Any]
    ) -> Record:
        part = self._aside(pair)
        try:
            return self._written(pair, group, bases, about, part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk above all
            raise

    def _written(
        self,
        pair: Pair,
        group: Group,
        bases: tuple[str, str],
        about: Mapping[str, Any],
        part: Path,
    ) -> Record:
        part.mkdir(parents=True)
        result = fill_group(group, part, pair.group_id, bases, {"key": pair.key, **about})
        if self._pages:
            write_report(part)
        record = _record(pair, result, _size(part))
        folder = layout.group_folder(self._root, pair.group_id)
        try:
            part.rename(folder)
        except OSError:  # there is one
            if known := self.find(pair):
                shutil.rmtree(part)
                return known
            stale = self._aside(pair)
            folder.rename(stale)  # of other content, or not whole
            part.rename(folder)
            shutil.rmtree(stale)
        return record

    def _aside(self, pair: Pair) -> Path:
        name = f"{pair.group_id:09d}.{uuid.uuid4().hex[:12]}"
        return self._root / layout.WORK / name

    def remove(self, index: int) -> None:
        shutil.rmtree(layout.group_folder(self._root, index + 1), ignore_errors=True)


class UploadSink(Sink):
    """The same folders in an object store; group_info.json is written last, and once."""

    def find(self, pair: Pair) -> Record | None:
        content = self.store.read_json(f"{_folder(pair.index)}/{layout.INFO}")
        return _record(pair, content, content["bytes"]) if _is_of(pair, content) else None

    def write(
        self, pair: Pair, group: Group, bases: tuple[str, str], about: Mapping[str, Any]
    ) -> Record:
        with Scratch(f"{PREFIX}group-") as scratch:
            place = scratch / "group"
            fill_group(group, place, pair.group_id, bases, {"key": pair.key, **about})
            files = sorted(path for path in place.rglob("*") if path.is_file())
            size = sum(path.stat().st_size for path in files)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda path: self._upload(pair, place, path), files))
            content = json.loads((place / layout.INFO).read_text(encoding="utf-8"))
        content["bytes"] = size
        info = f"{_folder(pair.index)}/{layout.INFO}"
        if not self.store.create(info, json_bytes(content)):
            if known := self.find(pair):
                return known
            self.store.write(info, json_bytes(content))  # another run's
        return _record(pair, content, size)

    def _upload(self, pair: Pair, place: Path, path: Path) -> None:
        if path.name != layout.INFO:
            name = f"{_folder(pair.index)}/{path.relative_to(place).as_posix()}"
            self.store.write(name, path.read_bytes())

    def remove(self, index: int) -> None:
        self.store.remove(_folder(index))


class _FileSink(Sink):
    """One file a group, below data/."""

    def _name(self, index: int) -> str:
        return f"{_DATA}/group_{index + 1:09d}{self.suffix}"

    def write(
        self, pair: Pair, group: Group, bases: tuple[str, str], about: Mapping[str, Any]
    ) -> Record:
        record = {"key": pair.key, **_entry(pair, group, bases)}
        data = self._encoded(pair, group, {**about, **record})
        if not self.store.create(self._name(pair.index), data):
            if known := self.find(pair):
                return known
            self.store.write(self._name(pair.index), data)  # another run's
        return _record(pair, record, len(data))

    def find(self, pair: Pair) -> Record | None:
        try:
            data = self.store.read(self._name(pair.index))
        except FileNotFoundError:
            return None
        content = self._decoded(data)
        return _record(pair, content, len(data)) if _is_of(pair, content) else None

    def remove(self, index: int) -> None:
        self.store.remove(self._name(index))

    def _encoded(self, pair: Pair, group: Group, content: Record) -> bytes:
        raise NotImplementedError

    def _decoded(self, data: bytes) -> Any:
        raise NotImplementedError


class TarSink(_FileSink):
    """A tar a group: one sample for each kept interval, whose members webdataset groups by their name.

    `000000012-yaw03.json` says what the sample is, `.txt` describes it, `.p1_00.jpg` to `.p2_10.jpg` are the
    two sequences from left to right. The archive's own header holds the group's record, so that a group of
    which nothing was kept is one, too.
    """

    suffix = ".tar"

    def _encoded(self, pair: Pair, group: Group, content: Record) -> bytes:
        data = io.BytesIO()
        head = {_HEADER: json.dumps(content)}
        with tarfile.open(None, "w", data, format=tarfile.PAX_FORMAT, pax_headers=head) as tar:
            for interval in group.intervals:
                for name, member in _members(pair, group, interval):
                    _add(tar, name, member)
        return data.getvalue()

    def _decoded(self, data: bytes) -> Any:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return json.loads(tar.pax_headers[_HEADER])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of time 0 and nobody: the same group is the same file
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _members(pair: Pair, group: Group, interval: Interval) -> Iterator[tuple[str, bytes]]:
    sample = _sample(pair, interval.interval)
    about = {
        "key": pair.key,
        "group_id": pair.group_id,
        "interval": interval.interval,
        "yaw_bounds": list(interval.yaw_bounds),
        "panoramas": [Path(name).name for name in pair.panoramas],
        "scores": [_scores(group, p, interval.interval) for p in (1, 2)],
        "cameras": [[asdict(camera) for camera in s.cameras] for s in interval.sequences],
    }
    yield f"{sample}.json", json_bytes(about)
    yield f"{sample}.txt", interval.description.encode()
    for p, sequence in enumerate(interval.sequences, start=1):
        for index, image in enumerate(sequence.images):
            yield _view(pair, interval.interval, p, index), jpeg_bytes(image)


def _sample(pair: Pair, interval: int) -> str:
    return f"{pair.group_id:09d}-yaw{interval:02d}"


def _view(pair: Pair, interval: int, panorama: int, index: int) -> str:
    return f"{_sample(pair, interval)}.p{panorama}_{index:02d}.jpg"


def _entry(pair: Pair, group: Group, bases: tuple[str, str]) -> dict[str, Any]:
    """The entry of results.json, whose paths are the views' names in the group's one file."""
    entry = result_entry(group, bases, pair.group_id)
    for interval in entry["intervals"]:
        for sequence in interval["sequences"]:
            for index, image in enumerate(sequence["images"]):
                place = interval["interval"], sequence["panorama"]
                image["path"] = _view(pair, *place, index)
    return entry


def _scores(group: Group, panorama: int, interval: int) -> dict[str, float | None]:
    pair = next(p for p in group.pairs if (p.panorama, p.interval) == (panorama, interval))
    return {name: finite_or_none(score) for name, score in asdict(pair.quality).items()}


class ParquetSink(_FileSink):
    """A Parquet file a group: one row for each view of a kept interval, the image as JPEG bytes.

    `image` is a struct of bytes and path, as `datasets` reads images. The group's record is in the schema's
    metadata.
    """

    suffix = ".parquet"

    def _encoded(self, pair: Pair, group: Group, content: Record) -> bytes:
        pa, parquet = _arrow()
        rows = [row for interval in group.intervals for row in _rows(pair, group, interval)]
        schema = _schema(pa).with_metadata(
            {"panotriton": json.dumps(content), "huggingface": json.dumps(_FEATURES)}
        )
        data = io.BytesIO()
        # JPEG does not get smaller.
        parquet.write_table(pa.Table.from_pylist(rows, schema), data, compression="none")
        return data.getvalue()

    def _decoded(self, data: bytes) -> Any:
        _, parquet = _arrow()
        return json.loads(parquet.read_schema(io.BytesIO(data)).metadata[b"panotriton"])


_CAMERA = ("yaw", "pitch", "roll", "vfov", "xi")
_QUALITY = ("final_score", "correlation", "balance", "richness", "clarity", "coherence")
_FEATURES = {"info": {"features": {"image": {"_type": "Image"}}}}


def _schema(pa: Any) -> Any:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [
            ("key", pa.string()),
            ("group_id", pa.int64()),
            ("interval", pa.int32()),
            ("panorama", pa.int32()),
            ("weight_idx", pa.int32()),
            ("image", image),
            *((name, pa.float64()) for name in (*_CAMERA, *_QUALITY)),
            ("description", pa.string()),
        ]
    )


def _rows(pair: Pair, group: Group, interval: Interval) -> Iterator[dict[str, Any]]:
    for p, sequence in enumerate(interval.sequences, start=1):
        scores = _scores(group, p, interval.interval)
        for index, (image, camera) in enumerate(
            zip(sequence.images, sequence.cameras, strict=True)
        ):
            path = _view(pair, interval.interval, p, index)
            yield {
                "key": pair.key,
                "group_id": pair.group_id,
                "interval": interval.interval,
                "panorama": p,
                "weight_idx": index,
                "image": {"bytes": jpeg_bytes(image), "path": path},
                "description": interval.description,
                **asdict(camera),
                **scores,
            }


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # noqa: PLC0415 an extra's
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput(
            "the format parquet needs pyarrow: pip install 'panotriton[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _size(folder: Path) -> int:
    """Of the group itself: its page may come later, or never."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != layout.REPORT)
    return sum(path.stat().st_size for path in files)


def _is_of(pair: Pair, content: Any) -> bool:
    return bool(content) and content.get("key") == pair.key


def _record(pair: Pair, content: Mapping[str, Any], size: int) -> Record:
    return {"key": pair.key, "bytes": size, **{name: content[name] for name in RESULT}}


def _folder(index: int) -> str:
    return layout.group_folder(Path(), index + 1).as_posix()
