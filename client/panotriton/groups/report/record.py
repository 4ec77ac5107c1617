"""A group's folder read back: what `groups.folder` wrote, as frozen values, images left on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panotriton.errors import InvalidInput, brief
from panotriton.groups import layout
from panotriton.groups.folder import process_command
from panotriton.pipeline.camera import Camera, interval_bounds
from panotriton.pipeline.contract import INTERVALS
from panotriton.pipeline.quality import SUB_SCORES
from panotriton.pipeline.stages import is_part

__all__ = ["IntervalRecord", "PairRecord", "Record", "Stage", "ViewRecord", "read_record"]


@dataclass(frozen=True, slots=True)
class PairRecord:
    """One left|right pair. `score` and `sub_scores` are None where the reply has none.

    `before` is the crop (None where intermediates were not kept), `after` is super-resolved.
    """

    panorama: int
    interval: int
    left: Camera
    right: Camera
    score: float | None
    sub_scores: Mapping[str, float | None]
    raw: str
    before: Path | None
    after: Path

    def rank(self) -> float:
        """What to sort by: no score counts below every score."""
        return -1.0 if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One image of a sequence and its camera."""

    path: Path
    camera: Camera


@dataclass(frozen=True, slots=True)
class IntervalRecord:
    """One yaw interval. `sequences` has one entry per panorama, and none where it was dropped."""

    number: int
    pairs: tuple[PairRecord, PairRecord]
    kept: bool
    description: str
    description_error: str
    sequences: tuple[tuple[ViewRecord, ...], ...]

    @property
    def yaw_bounds(self) -> tuple[float, float]:
        """In degrees."""
        return interval_bounds(self.number)

    @property
    def lowest(self) -> PairRecord | None:
        """The pair that decides; None where neither has a score."""
        scored = [pair for pair in self.pairs if pair.score is not None]
        return min(scored, key=PairRecord.rank, default=None)


@dataclass(frozen=True, slots=True)
class Stage:
    """A model's work in this run; `part` where its time is inside another stage's."""

    model: str
    part: bool
    executions: int
    inferences: int
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Record:
    """Everything a report shows. Facts that the run did not record are None or empty.

    `weights` is what identifies them, by model: a checksum or an architecture.
    """

    folder: Path
    group_id: int
    panoramas: tuple[Path, ...]
    options: Mapping[str, Any]
    version: str | None
    server: str | None
    weights: Mapping[str, str]
    command: str
    seconds: float | None
    intervals: tuple[IntervalRecord, ...]
    stages: tuple[Stage, ...]

    @property
    def pairs(self) -> tuple[PairRecord, ...]:
        """All 16, interval by interval."""
        return tuple(pair for interval in self.intervals for pair in interval.pairs)

    @property
    def kept(self) -> tuple[IntervalRecord, ...]:
        """Intervals that reached the threshold."""
        return tuple(interval for interval in self.intervals if interval.kept)

    @property
    def best(self) -> PairRecord:
        """The pair of the highest score among the kept, or among all where none is."""
        kept = [pair for interval in self.kept for pair in interval.pairs]
        return max(kept or self.pairs, key=PairRecord.rank)

    @property
    def threshold(self) -> float | None:
        """What the lowest score had to reach."""
        return self.options.get("threshold")

    @property
    def image_count(self) -> int:
        """Images in all sequences."""
        return sum(len(views) for interval in self.kept for views in interval.sequences)


def read_record(folder: Path) -> Record:
    """Read a group's folder.

    Raises InvalidInput where group_info.json is missing, is no JSON, or lacks what a report needs.
    """
    info = _read_json(folder / layout.INFO)
    try:
        return _record(folder, info)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InvalidInput(
            f"{folder / layout.INFO} is not as a run writes it ({type(error).__name__}: {error}); "
            "expected the file of `panotriton process -o`: run it again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{brief(path)} does not exist; expected a group's folder such as out/group_0001, as "
            "`panotriton process -o out` writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{brief(path)} cannot be read ({brief(error)}); expected JSON: run the group again"
        ) from error


def _record(folder: Path, info: dict[str, Any]) -> Record:
    panoramas = tuple(Path(path) for path in info["panoramas"])
    options = info.get("options", {})
    return Record(
        folder=folder,
        group_id=int(info["group_id"]),
        panoramas=panoramas,
        options=options,
        version=info.get("version"),
        server=info.get("server"),
        weights={str(name): str(value) for name, value in info.get("weights", {}).items()},
        command=info.get("command") or process_command(panoramas, options),
        seconds=info.get("seconds"),
        intervals=_intervals(folder, info, layout.distinct_bases(*(p.stem for p in panoramas))),
        stages=tuple(_stage(stage) for stage in info.get("stages", ())),
    )


def _intervals(
    folder: Path, info: dict[str, Any], bases: tuple[str, str]
) -> tuple[IntervalRecord, ...]:
    kept = {int(entry["interval"]): entry for entry in info["intervals"]}
    scores = {(int(s["panorama"]), int(s["interval"])): s for s in info["scores"]}
    found = []
    for number in range(1, INTERVALS + 1):
        first, second = (_pair(folder, bases[p - 1], scores[p, number]) for p in (1, 2))
        entry = kept.get(number, {})
        found.append(
            IntervalRecord(
                number=number,
                pairs=(first, second),
                kept=number in kept,
                description=entry.get("description") or "",
                description_error=entry.get("description_error") or "",
                sequences=tuple(_sequence(folder, s) for s in entry.get("sequences", ())),
            )
        )
    return tuple(found)


def _pair(folder: Path, base: str, score: dict[str, Any]) -> PairRecord:
    interval = int(score["interval"])
    left, right = (
        Camera(**_read_json(folder / layout.params(base, interval, side))) for side in layout.SIDES
    )
    before = folder / layout.pair(base, interval)
    return PairRecord(
        panorama=int(score["panorama"]),
        interval=interval,
        left=left,
        right=right,
        score=_number(score["final_score"]),
        sub_scores={key: _number(score[key]) for key in SUB_SCORES},
        raw=str(score["raw"]),
        before=before if before.is_file() else None,
        after=folder / layout.sharp_pair(base, interval),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _sequence(folder: Path, entry: dict[str, Any]) -> tuple[ViewRecord, ...]:
    return tuple(ViewRecord(folder / v["path"], Camera(**v["params"])) for v in entry["images"])


def _stage(entry: dict[str, Any]) -> Stage:
    model = str(entry["model"])
    return Stage(
        model=model,
        part=is_part(model),
        executions=int(entry["executions"]),
        inferences=int(entry["inferences"]),
        queue_s=entry["queue_ms"] / 1e3,
        compute_s=entry["compute_ms"] / 1e3,
    )
