"""A group's folder: what each of its files is called, as the file-path services named them.

```
group_0001/
  pairs/           {base}_yaw01_pair.jpg                   left crop | right crop
  params/          {base}_yaw01_left_params.json, …_right_params.json         one camera each
                   shared_right_params.json, panorama1_left_params.json       eight cameras each
  osediff/         {base}_yaw01_pair.jpg                   the pairs, super-resolved
  descriptions/    {base}_yaw01_pair.json
  interpolated/    {base}_yaw01_pair_left.jpg, …_right.jpg, …_left_interp_01.jpg
  interpolated_sr/ {base}_yaw01_pair_left_interp_01.jpg    the views in between, super-resolved
  group_info.json  report.html
```
Beside the groups lie results.json, index.html and failed.json. `base` is what a panorama's files are
named after, yaw01 to yaw08 are the intervals. Functions that take no folder return paths relative to
the group's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = [
    "FAILED",
    "FOLDERS",
    "INDEX",
    "INFO",
    "INTERPOLATED",
    "LEFT_1_PARAMS",
    "REPORT",
    "RESULTS",
    "RIGHT_PARAMS",
    "SHARP",
    "SIDES",
    "WORK",
    "base_prefix",
    "between_name",
    "between_view",
    "description",
    "distinct_bases",
    "enclosing_group",
    "end_name",
    "end_view",
    "group_folder",
    "group_folders",
    "group_number",
    "is_group",
    "pair",
    "pair_name",
    "params",
    "sharp_pair",
]

FOLDERS = ("pairs", "params", "osediff", "descriptions", "interpolated", "interpolated_sr")
_PAIRS, _PARAMS, SHARP, _DESCRIPTIONS, INTERPOLATED, _SHARP_VIEWS = FOLDERS
SIDES = ("left", "right")

RIGHT_PARAMS = f"{_PARAMS}/shared_right_params.json"
LEFT_1_PARAMS = f"{_PARAMS}/panorama1_left_params.json"
INFO, REPORT = "group_info.json", "report.html"
RESULTS, INDEX, FAILED = "results.json", "index.html", "failed.json"

WORK = ".work"  # where a run writes what is not complete

_GROUP = "group_"
_ENCLOSING = re.compile(rf"^(.*?/{_GROUP}\d+)/")


def group_folder(root: Path, group_id: int) -> Path:
    """The folder of a group under the output root."""
    return root / f"{_GROUP}{group_id:04d}"


def group_number(folder: Path) -> int | None:
    """The number of a group's folder by its name; None for any other, a half-written one among them."""
    number = folder.name.removeprefix(_GROUP)
    return int(number) if number != folder.name and number.isdecimal() else None


def group_folders(root: Path) -> list[Path]:
    """Finished groups under the output root, by name."""
    return sorted(folder for folder in root.glob(f"{_GROUP}*") if is_group(folder))


def is_group(folder: Path) -> bool:
    """Whether `folder` is a finished group's."""
    return os.path.isfile(folder / INFO)  # noqa: PTH113 false of names that no file can have, too


def enclosing_group(path: str) -> str | None:
    """The group's folder that a path leads through, the outermost; None where there is none."""
    found = _ENCLOSING.match(path)
    return found[1] if found else None


def distinct_bases(first: str, second: str) -> tuple[str, str]:
    """What two panoramas' files are named after: their own names, numbered where those are equal."""
    return (first, second) if first != second else (f"{first}_1", f"{second}_2")


def base_prefix(base: str) -> str:
    """What the names of all files of one panorama begin with."""
    return f"{base}_yaw"


def pair_name(base: str, interval: int) -> str:
    """What a pair's images are called, without a suffix."""
    return f"{_interval_name(base, interval)}_pair"


def end_name(pair: str, side: str) -> str:
    """What the left or right half of the pair called `pair` is called, without a suffix."""
    return f"{pair}_{side}"


def between_name(left: str, i: int) -> str:
    """What view i of 1…N after the left half called `left` is called, without a suffix."""
    return f"{left}_interp_{i:02d}"


def pair(base: str, interval: int) -> str:
    """A pair image before super-resolution."""
    return f"{_PAIRS}/{pair_name(base, interval)}.jpg"


def sharp_pair(base: str, interval: int) -> str:
    """A pair image after it."""
    return f"{SHARP}/{pair_name(base, interval)}.jpg"


def params(base: str, interval: int, side: str) -> str:
    """A pair's left or right camera."""
    return f"{_PARAMS}/{_interval_name(base, interval)}_{side}_params.json"


def description(base: str, interval: int) -> str:
    """What an interval shows."""
    return f"{_DESCRIPTIONS}/{pair_name(base, interval)}.json"


def end_view(base: str, interval: int, side: str) -> str:
    """A kept pair's left or right half, super-resolved."""
    return f"{INTERPOLATED}/{end_name(pair_name(base, interval), side)}.jpg"


def between_view(base: str, interval: int, i: int, *, sharp: bool) -> str:
    """View i of 1…N between the two, before super-resolution or after it."""
    name = between_name(end_name(pair_name(base, interval), "left"), i)
    return f"{_SHARP_VIEWS if sharp else INTERPOLATED}/{name}.jpg"


def _interval_name(base: str, interval: int) -> str:
    return f"{base_prefix(base)}{interval:02d}"
