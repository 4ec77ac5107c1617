"""Why an interval was kept or dropped, in words."""

from __future__ import annotations

from dataclasses import dataclass

from panotriton.groups.report.record import IntervalRecord, Record

__all__ = ["Verdict", "outcome", "verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind` is kept, dropped or failed: what the page colours by. `notes` are what went wrong."""

    kind: str
    reason: str
    notes: tuple[str, ...]


def verdict(interval: IntervalRecord, threshold: float | None) -> Verdict:
    """Dropped by its score, or failed for want of one."""
    notes = tuple(_notes(interval))
    lowest = interval.lowest
    if lowest is None or lowest.score is None:
        reason = "Neither pair has a score: no reply of the scorer has a valid Final Score line."
        return Verdict("failed", reason, ())
    found = f"panorama {lowest.panorama} scored {lowest.score:.2f}"
    limit = "the threshold" if threshold is None else f"the threshold of {threshold:.2f}"
    if interval.kept:
        return Verdict("kept", f"Lowest score: {found}, which reaches {limit}.", notes)
    return Verdict("dropped", f"{found[0].upper()}{found[1:]}, below {limit}.", notes)


def _notes(interval: IntervalRecord) -> list[str]:
    notes = [
        f"Panorama {pair.panorama} has no score: the scorer's reply has no valid Final Score line. "
        "The other panorama decided alone."
        for pair in interval.pairs
        if pair.score is None
    ]
    if interval.description_error:
        notes.append(f"No description: {interval.description_error}")
    return notes


def outcome(record: Record) -> str:
    """The group in one sentence."""
    kept = len(record.kept)
    if not kept:
        return "No interval reached the threshold."
    return f"{kept} of {len(record.intervals)} yaw intervals kept, {record.image_count} images."
